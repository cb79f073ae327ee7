"""What is said of a run that is replaced."""

from pathlib import Path
from typing import Any

import pytest
from training_tools import train


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"ckpt_freq": 1, "max_steps": 3, "num_ckpt_keep": 2}, "2 checkpoints, the last of step 3"),
        ({"do_ckpt": False, "max_steps": 1}, "without a checkpoint"),
    ],
)
def test_what_is_replaced_is_said_and_kept_in_the_log(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: dict[str, Any],
    told: str,
) -> None:
    run_dir = tmp_path / "run"
    train(config, run_dir, overrides)
    assert "replaces the run" not in capsys.readouterr().out
    train(config, run_dir, {"max_steps": 1, "overwrite_run_dir": True})
    line = f"replaces the run in {run_dir} ({told}), which is deleted once this one has a"
    assert capsys.readouterr().out.count(line) == 1
    assert (run_dir / "log.train.txt").read_text().count(line) == 1
