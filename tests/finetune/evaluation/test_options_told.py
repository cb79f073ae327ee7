"""A report has the options that its tasks have read, all of them and no others."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import evaluation_tools
import pytest
from evaluation_tools import options

from finetune.evaluation import evaluate_checkpoint
from finetune.evaluation.common_options import ALWAYS_READ
from finetune.evaluation.tasks import TASKS
from finetune.evaluation.tasks.spoken_recall.options import RecallOptions

# Fixtures: pytest finds them by their names in this module.
_pictures = evaluation_tools._pictures
pair_folder = evaluation_tools.pair_folder
trained = evaluation_tools.trained

COMMON = {"checkpoint", "tasks", "out", "overwrite", "device", "wandb.project",
          "wandb.offline", "wandb.run_name", "batch_size"}  # fmt: skip
WITH_DATA = COMMON | {"data", "limit", "seed"}


def noting(read: set[str], method: Callable[..., Any], options: Any) -> Callable[..., Any]:
    """Return a task's method in which the options that are read are noted."""
    plain = type(options)

    class Noting(plain):  # type: ignore[misc,valid-type]
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    def noted(*arguments: Any) -> Any:
        object.__setattr__(options, "__class__", Noting)
        try:
            return method(*arguments)
        finally:
            object.__setattr__(options, "__class__", plain)

    return noted


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (
            "position",
            WITH_DATA | {"arms", "reset_frames", "baseline", "bin_sec", "max_sec", "block_frames"},
        ),
        (
            "health",
            WITH_DATA
            | {f"health.{name}" for name in ("num_continuations", "prompt_sec", "health_sec")}
            | {"health.temperature", "health.text_temperature"},
        ),
        (
            "pairs",
            COMMON
            | {"pairs", "block_frames", "pair.side", "pair.text", "pair.text_weight"}
            | {f"pair.{name}" for name in ("first_codebook_weight", "other_codebooks_weight")}
            | {"pair.length_norm"},
        ),
        (
            "spoken_recall",
            COMMON | {"seed", *(f"recall.{each.name}" for each in fields(RecallOptions))},
        ),
    ],
)
def test_a_report_has_the_options_that_its_task_has_read(
    trained: tuple[Path, Path],
    pair_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    told: set[str],
) -> None:
    given: dict[str, Any] = {"pairs": pair_folder / "pairs.jsonl"} if task == "pairs" else {}
    if task == "spoken_recall":
        given["recall"] = RecallOptions(
            num_talks=1, distances_sec=(10.0,), num_facts=1, answer_sec=1.0
        )
    asked = options(trained, tmp_path / "out", tasks=(task,), **given)
    read: set[str] = set()
    for name in ("prepare", "run"):
        method = getattr(TASKS[task], name)
        monkeypatch.setattr(TASKS[task], name, noting(read, method, asked))
    results = evaluate_checkpoint(asked)
    assert set(results["options"]) == told
    assert json.loads((tmp_path / "out/results.json").read_text())["options"].keys() == told
    page = (tmp_path / "out/report.html").read_text()
    everything = {each.name for each in fields(asked)}
    by_the_task = {name.split(".")[0] for name in told} - {*ALWAYS_READ, "data", "limit"}
    assert read & everything - {*ALWAYS_READ} == by_the_task
    shown = page[page.index("<h2>Options</h2>") :]
    assert all(f"<td>{name}</td>" in shown for name in told)
    assert shown.count("<tr>") == 1 + len(told)
