"""The table of what fits which GPU."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training_tools import LORA

from finetune.config import TrainArgs, load_config
from finetune.model import plan_model
from finetune.plan import estimate
from finetune.plan import memory as counted
from finetune.plan import table as module
from finetune.plan.plan import shape_of

ROOT = Path(__file__).parents[3]


def needs(args: TrainArgs, batch_size: int, precision: Any, state: Any) -> float:
    """GB that a batch takes."""
    optim = dataclasses.replace(args.optim, state=state)
    args = dataclasses.replace(
        args, batch_size=batch_size, base_precision=precision, optim=optim, duration_sec=100.0
    )
    model = plan_model(args, shape_of(args.moshi_paths)[0])
    return estimate(args, model, 1).peak / 1e9 / (1 - counted.FRAGMENTATION)


def cells_of(args: TrainArgs, monkeypatch: pytest.MonkeyPatch, sizes: list[float]) -> list[Any]:
    """The rows of the table for GPUs of these sizes, cell by cell."""
    monkeypatch.setattr(sys.modules["finetune.plan.table"], "GPUS_GB", sizes)
    lines = list(module(args))
    assert lines[2] == "| GPU | LoRA | LoRA and TTT | TTT alone | all weights |"
    return [line.strip("|").split(" | ") for line in lines[4:]]


def test_each_cell_has_the_largest_batch_of_the_least_change_that_fits(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counted, "RESERVED_BYTES", 0)
    args = load_config(config, {**LORA, "gradient_checkpointing": True})
    wide, narrow = needs(args, 3, "bfloat16", "float32"), needs(args, 1, "nf4", "float32")
    rows = cells_of(args, monkeypatch, [0.999 * narrow, 1.001 * narrow, 1.001 * wide])
    assert [row[2] for row in rows] == ["–", "**1**, `base_precision: nf4`", "**3**"]
    assert narrow < needs(args, 1, "bfloat16", "float32")


@pytest.mark.slow
def test_the_readme_shows_the_table_of_moshi() -> None:
    command = [sys.executable, "-m", "finetune", "plan", "--config", "example/moshi_ttt.yaml"]
    done = subprocess.run([*command, "--table"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 8 and "\n".join(rows) in (ROOT / "README.md").read_text()
