"""A small trained checkpoint, pairs of recordings, and options, for tests of evaluations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from data_tools import speech_like, write_dataset, write_jsonl
from matplotlib.figure import Figure
from training_tools import checkpoint, train

from finetune.evaluation import Options
from finetune.evaluation.tasks.health.options import ContinuationOptions

LOOKED_AT = ("test_a_report_that_stands_alone", "test_of_recordings_without_an_update")
"""Tests whose pictures are drawn: one with all there can be, and one with hardly anything."""


@pytest.fixture(autouse=True)
def _pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave figures undrawn, which takes most of a small evaluation; they are made all the same."""
    if not request.node.name.startswith(LOOKED_AT):
        monkeypatch.setattr(Figure, "savefig", lambda self, target, **_: target.write("<svg/>"))


@pytest.fixture
def pair_folder(tmp_path: Path) -> Path:
    """Two pairs of silence (good) and noise, mono, of different lengths; one of them 16 kHz."""
    for index, (sec, rate) in enumerate([(1.0, 24000), (1.7, 16000)]):
        soundfile.write(tmp_path / f"good{index}.wav", np.zeros(round(sec * rate)), rate)
        noise = speech_like(sec, rate, channels=1, seed=index)
        soundfile.write(tmp_path / f"bad{index}.wav", noise, rate)
    lines = [
        {"good": f"good{i}.wav", "bad": f"bad{i}.wav", "id": f"p{i}", "group": "ab"[i]}
        for i in range(2)
    ]
    write_jsonl(tmp_path / "pairs.jsonl", lines)
    return tmp_path


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with TTT, its data, and what its training logged."""
    run_dir = tmp_path_factory.mktemp("evaluate") / "run"
    data = write_dataset(run_dir.parent / "data", [4.0, 3.1, 2.3, 4.0], seed=9)
    overrides: dict[str, Any] = {
        "do_eval": True,
        "data.eval_data": str(data),
        "health_sec": 1,
        "duration_sec": 3.2,
    }
    overrides |= {"model.attention_context": 10, "param_dtype": "float32"}
    train(config, run_dir, overrides)
    return checkpoint(run_dir, 4), data


def options(trained: tuple[Path, Any], out: Path, **changes: Any) -> Any:
    path, data = trained
    health = ContinuationOptions(num_continuations=2, prompt_sec=0.4, health_sec=1.0)
    given: dict[str, Any] = {
        "tasks": ("position",),
        "bin_sec": 0.8,
        "batch_size": 2,
        "device": "cpu",
    }
    given |= {"data": str(data), "health": health, "block_frames": 7}
    return Options.complete()(checkpoint=path, out=out, **{**given, **changes})
