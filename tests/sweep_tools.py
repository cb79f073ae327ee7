"""Sweeps of small runs for tests: their file, and the command in the tests' own process."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.figure import Figure
from training_tools import PLAIN

from finetune.__main__ import main
from finetune.config import load_config
from finetune.errors import UserError
from finetune.sweep.run import Children
from finetune.trainer import Trainer

COMMON: dict[str, Any] = {
    **PLAIN,
    "max_steps": 4,
    "do_eval": True,
    "eval_freq": 2,
    "model.attention_context": 9,
}


@pytest.fixture
def write(config: Path, tmp_path: Path) -> Callable[..., Any]:
    def write_sweep(runs: Any, **others: Any) -> Path:
        content: dict[str, Any] = {
            "base": str(config),
            "sweep_dir": str(tmp_path / "sweep"),
            "overrides": COMMON,
        }
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(content | {"runs": runs} | others, sort_keys=False))
        return path

    return write_sweep


DRAWN = "test_runs_are_compared_in_a_table_a_picture_and_a_page"
"""The test whose pictures are drawn."""


@pytest.fixture
def commands(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Runs are trained in this process, which is faster; the command lines that were given.

    Figures are made, but drawn for one test alone.
    """
    given: list[Any] = []
    if request.node.name != DRAWN:
        monkeypatch.setattr(Figure, "savefig", lambda self, target, **_: target.write(b"png"))

    def train_here(self: Any, command: Any, log: Any, label: Any, environment: Any) -> int:
        base, *options = command[command.index("train") + 1 :]
        given.append(options)
        overrides = dict(option.removeprefix("--").split("=", 1) for option in options)
        try:
            return Trainer(load_config(base, overrides)).train()
        except UserError as error:
            log.write(f"\nerror: {error}\n")
            return 1

    monkeypatch.setattr(Children, "run", train_here)
    return given


def sweep(*arguments: Any) -> str | int:
    """`moshi-ttt sweep ...` in this process; its exit status."""
    old, sys.argv = sys.argv, ["moshi-ttt", "sweep", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as leaving:
            main()
    finally:
        sys.argv = old
    return leaving.value.code or 0
