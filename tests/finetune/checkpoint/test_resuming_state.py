"""What a resumed run takes from its checkpoint besides weights and moments."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_tools import checkpoint, logged, stop_after, train, trainer

from finetune.data import Batch
from finetune.errors import UserError


class BreaksAt:
    """Training data whose batch of this number cannot be read."""

    def __init__(self, data: Any, number: int):
        self.data, self.number, self.taken = data, number, 0

    def __next__(self) -> Batch:
        self.taken += 1
        if self.taken == self.number:
            raise UserError("bad.wav is truncated")
        batch: Batch = next(self.data)
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)


def test_a_step_whose_second_batch_is_broken_is_taken_again_in_full(
    config: Path, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"num_microbatches": 2, "max_steps": 4, "ckpt_freq": 0}
    train(config, tmp_path / "whole", how)
    run = trainer(config, tmp_path / "broken", how)
    run.train_data = BreaksAt(run.train_data, 6)  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"bad\.wav is truncated"):
        run.train()
    assert checkpoint(tmp_path / "broken", 2).is_dir()
    train(config, tmp_path / "broken", {**how, "resume": True})
    assert logged(tmp_path / "broken") == logged(tmp_path / "whole")


def test_what_has_been_said_of_ttt_is_not_said_again(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "steps TTT changes its layers' outputs by"
    how: dict[str, Any] = {"max_steps": 9, "ckpt_freq": 6}
    stop_after(trainer(config, tmp_path, how), 7)
    assert capsys.readouterr().out.count(line) == 1
    train(config, tmp_path, {**how, "resume": True})
    assert capsys.readouterr().out.count(line) == 0


def test_a_damaged_checkpoint_is_answered_with_the_ways_that_are_open(
    config: Path, finished_run: Callable[..., Any], tmp_path: Path
) -> None:
    def refused(resume: bool | str) -> str:
        with pytest.raises(UserError) as stopped:
            trainer(config, run_dir, {"resume": resume})
        return str(stopped.value)

    run_dir = tmp_path / "run"
    finished_run(run_dir, {"ckpt_freq": 2})
    first, last = checkpoint(run_dir, 2), checkpoint(run_dir, 4)
    cut = (last / "resume.pt").read_bytes()[:100]
    (last / "resume.pt").write_bytes(cut)
    from_weights = f"moshi_paths.init_from: {last}."
    said = refused(True)
    assert f"Delete {last} to resume from the one before. Or: " in said
    assert said.endswith(from_weights)
    # The one before is there, and damaged as well: that was looked at.
    shutil.copytree(first, tmp_path / "kept")
    (first / "resume.pt").write_bytes(cut)
    said = refused("auto")
    assert "Delete" not in said and said.endswith(from_weights)
    shutil.rmtree(first)
    said = refused(True)
    assert "Delete" not in said and said.endswith(from_weights)
    train(config, tmp_path / "new", {"moshi_paths.init_from": str(last), "max_steps": 1})
    for weights in (last / "consolidated").glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1])
    said = refused(True)
    assert "Delete" not in said and "init_from" not in said and "--overwrite_run_dir" in said
    shutil.move(tmp_path / "kept", first)
    assert refused(True).endswith(f"Delete {last} to resume from the one before.")
