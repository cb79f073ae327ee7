"""The table of what fits which GPU."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from recordings_tools import call
from training_tools import LORA

from finetune.config import TrainArgs, load_config
from finetune.model import plan_model
from finetune.plan import estimate
from finetune.plan import memory as counted
from finetune.plan import table as module
from finetune.plan.plan import shape_of
from finetune.plan.search import ENOUGH_BATCH, largest
from finetune.plan.table import COMPARED

ROOT = Path(__file__).parents[3]


def needs(args: TrainArgs, batch_size: int, precision: Any, state: Any) -> float:
    """GB that a batch takes."""
    optim = dataclasses.replace(args.optim, state=state)
    args = dataclasses.replace(args, batch_size=batch_size, base_precision=precision, optim=optim)
    model = plan_model(args, shape_of(args.moshi_paths)[0])
    return estimate(args, model, 1).peak / 1e9 / (1 - counted.FRAGMENTATION)


def cells_of(args: TrainArgs, monkeypatch: pytest.MonkeyPatch, sizes: list[float]) -> list[Any]:
    """The rows of the table for GPUs of these sizes, cell by cell."""
    monkeypatch.setattr(sys.modules["finetune.plan.table"], "GPUS_GB", sizes)
    lines = list(module(args))
    assert f"that let\n{ENOUGH_BATCH} fit" in "\n".join(lines)
    head, _, *rows = (line for line in lines if line.startswith("|"))
    assert head == "| GPU | LoRA | LoRA and TTT | TTT alone | all weights |"
    return [row.strip("| ").split(" | ") for row in rows]


def test_each_cell_prefers_what_changes_least_and_lets_enough_fit(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counted, "RESERVED_BYTES", 0)
    changes = {"gradient_checkpointing": True, "duration_sec": 100}
    args = load_config(config, {**LORA, **changes})
    one = needs(args, 1, "nf4", "float32")
    few = needs(args, ENOUGH_BATCH - 1, "bfloat16", "float32")
    enough = needs(args, ENOUGH_BATCH, "bfloat16", "float32")
    narrow = needs(args, ENOUGH_BATCH, "nf4", "float32")
    assert 1.001 * few < needs(args, ENOUGH_BATCH, "nf4", "int8") and narrow < enough
    sizes = [0.999 * one, 1.001 * one, 1.001 * few, (narrow + enough) / 2, 1.001 * enough]
    assert [row[2] for row in cells_of(args, monkeypatch, sizes)] == [
        "–",
        "**1**, `base_precision: nf4`",
        # Fewer bits would not let more fit.
        "**7**",
        "**8**, `base_precision: nf4`",
        "**8**",
    ]


MOSHI = ["plan", "example/moshi_ttt.yaml", "--table"]


def rows_of(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("|")][2:]


def test_the_table_is_of_the_gpus_that_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*MOSHI, "--gpu_memory=141") == 0
    (one,) = rows_of(capsys.readouterr().out)
    assert one.startswith("| 141 GB |") and one in (ROOT / "README.md").read_text()
    assert call(*MOSHI, "--gpu_memory=141", "--gpus=4") == 0
    said = capsys.readouterr().out
    (four,) = rows_of(said)
    assert "sequences of 100 s on each of 4 GPUs" in said
    # Four share all weights, where these train; LoRA's base each has for itself.
    assert four.split("|")[:5] == one.split("|")[:5] and "optim.state" not in four
    assert four.split("|")[5] != one.split("|")[5]


def test_the_table_is_of_the_sequences_that_are_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(*MOSHI, "--gpu_memory=80", "--duration_sec=200") == 0
    said = capsys.readouterr().out
    assert "sequences of 200 s" in said
    (row,) = rows_of(said)
    batches = [int(cell.strip(" *")) for cell in row.split("|")[2:4]]
    # Half of the README's 81 and 65.
    assert batches == [40, 32]


def test_without_ttt_in_the_run_the_table_needs_none_that_fits(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default layers of TTT are Moshi 7B's; this model has two."""
    content = yaml.safe_load(config.read_text())
    del content["ttt"]
    content["lora"] = {"enable": True}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    words = ("plan", path, "--table", "--gpu_memory=24")
    assert call(*words) == 0
    said = capsys.readouterr().out
    assert "\n| GPU | LoRA | all weights |\n" in said
    assert "no columns with TTT, which this run has not: as it is set, ttt.start_layer: 5" in said
    assert call(*words, "--ttt.start_layer=1") == 0
    assert "\n| GPU | LoRA | LoRA and TTT | TTT alone | all" in capsys.readouterr().out
    assert call(*words, "--ttt.enabled=true") == 1, "a run that would not start"


@pytest.mark.parametrize("key", COMPARED)
def test_what_the_table_compares_is_not_given(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"batch_size": 2, "selective_layers": 2, "base_precision": "nf4"}
    values |= {"optim.state": "int8", "full_finetuning": "false"}
    value = values.get(key, "true")
    assert call(*MOSHI, f"--{key}={value}", "--lora.rank=8") == 1
    found = capsys.readouterr()
    assert f"would not read --{key}. Leave" in found.err and not found.out


@pytest.mark.parametrize("most", [0, 1, 5, 6, 7, 8, 100])
@pytest.mark.parametrize("limit", [0, 1, 6, 7, 8, 99, 1000])
def test_the_largest_number_is_found(limit: int, most: int) -> None:
    assert largest(lambda number: number <= limit, most) == min(limit, most)


@pytest.mark.slow
def test_the_readme_shows_the_table_of_moshi() -> None:
    command = [sys.executable, "-m", "finetune", "plan", "--config", "example/moshi_ttt.yaml"]
    done = subprocess.run([*command, "--table"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 8 and "\n".join(rows) in (ROOT / "README.md").read_text()
