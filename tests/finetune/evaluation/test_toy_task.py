"""A task that is defined here and registered goes all the way through `moshi-ttt evaluate`."""

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from data_tools import write_dataset, write_recording
from matplotlib.figure import Figure
from training_tools import write_model

from finetune.__main__ import main
from finetune.evaluation.tasks import TASKS
from finetune.evaluation.tasks.base import Task, TaskOptions
from finetune.report import Table


@dataclass(frozen=True)
class LoudnessOptions(TaskOptions):
    loud_from: float = 0.1
    """RMS from which on a recording is loud."""


class Loudness(Task):
    """How loud the recordings are."""

    name = "loudness"
    title = "Loudness of the recordings"
    options = LoudnessOptions

    def __init__(self) -> None:
        self.measured: list[Any] = []

    def run(self, bench: Any, options: Any, prepared: Any) -> dict[str, Any]:
        records = bench.records(self.name, {"loud_from": options.loud_from})
        done = {record["recording"] for record in records}
        for recording in bench.recordings:
            if recording.path.name not in done:
                audio, _ = soundfile.read(recording.path)
                rms = float(np.sqrt(np.mean(audio**2)))
                records.append({"recording": recording.path.name, "rms": rms})
                self.measured.append(recording.path.name)
        levels = {record["recording"]: record["rms"] for record in records}
        loud = sum(rms >= options.loud_from for rms in levels.values())
        return {"levels": levels, "num_loud": loud, "model_width": bench.model.dim}

    def sentences(self, found: Any) -> list[Any]:
        return [f"{found['num_loud']} of {len(found['levels'])} recordings are loud."]

    def figure(self, found: Any, model: Any) -> Figure:
        figure = Figure(figsize=(4, 2))
        figure.subplots().bar(range(len(found["levels"])), found["levels"].values())
        return figure

    def tables(self, found: Any) -> list[Any]:
        return [Table(("recording", "root mean square"), list(found["levels"].items()))]

    def csv(self, found: Any) -> Table:
        return Table(("recording", "rms"), list(found["levels"].items()))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Loudness:
    """The task, registered as long as the test runs."""
    task = Loudness()
    monkeypatch.setitem(TASKS, task.name, task)
    return task


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The command, on a stock checkpoint and two recordings; returns its exit status."""
    model = write_model(tmp_path / "model", context=10)
    write_dataset(tmp_path / "data", [1.0, 1.0])

    def run(*words: Any) -> str | int | None:
        files = [f"--data={tmp_path / 'data/all.jsonl'}", f"--out={tmp_path / 'out'}"]
        given = [f"--checkpoint={model}", "--device=cpu", *files, *words]
        monkeypatch.setattr(sys, "argv", ["moshi-ttt", "evaluate", *given])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code

    return run


def add_recording(folder: Path, name: str) -> None:
    """Put one more recording into the data set of a folder."""
    line = write_recording(folder, name, 1.0, seed=5)
    with (folder / "all.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def test_a_task_of_ones_own_is_run_reported_and_not_repeated(
    toy: Loudness, evaluate: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--tasks=loudness", "--loud_from=1e-3") == 0
    assert "- 2 of 2 recordings are loud." in capsys.readouterr().out
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    levels = results["loudness"]["levels"]
    audio, _ = soundfile.read(tmp_path / "data/0.wav")
    assert levels["0.wav"] == pytest.approx(np.sqrt(np.mean(audio**2)))
    assert results["conclusions"] == ["2 of 2 recordings are loud."]
    assert results["options"]["loud_from"] == 1e-3 and "position" not in results
    page = (out / "report.html").read_text()
    assert "<h2>Loudness of the recordings</h2>" in page and page.count("<svg") == 1
    assert "<li>2 of 2 recordings are loud.</li>" in page
    assert f"<td>0.wav</td><td>{levels['0.wav']}</td>" in page
    with (out / "loudness.csv").open() as file:
        assert next(csv.DictReader(file)) == {"recording": "0.wav", "rms": str(levels["0.wav"])}

    # What is there is not measured again; what has come since is, and its name is text alone.
    add_recording(tmp_path / "data", "<i>&.wav")
    assert toy.measured == ["0.wav", "1.wav"]
    assert evaluate("--tasks=loudness", "--loud_from=1e-3") == 0
    assert toy.measured == ["0.wav", "1.wav", "<i>&.wav"]
    page = (out / "report.html").read_text()
    assert "<td>&lt;i&gt;&amp;.wav</td>" in page and "<i>" not in page
    assert "3 of 3 recordings are loud." in page
    # Results of other options are not mixed with these.
    assert evaluate("--tasks=loudness", "--loud_from=0.5") == 1
    assert "loud_from was 0.001, is 0.5" in capsys.readouterr().err


def test_its_options_are_read_and_explained_like_all_others(
    toy: Loudness, evaluate: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--help") in (0, None)
    assert "RMS from which on a recording is loud. [number]" in capsys.readouterr().out
    for words, message in (
        (
            ["--tasks=loudnes"],
            "expected position or pairs or health or spoken_recall or loudness, got 'loudnes'",
        ),
        (["--tasks=loudness", "--loud_from=very"], "--loud_from: expected a number"),
        (["--tasks=loudness", "--loud_form=1"], "Did you mean --loud_from?"),
    ):
        assert evaluate(*words) == 1
        assert message in capsys.readouterr().err
    assert toy.measured == []


def test_without_it_there_is_no_such_task_or_option(
    evaluate: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--tasks=loudness") == 1 and evaluate("--loud_from=1") == 1
    said = capsys.readouterr().err
    assert "got 'loudness'" in said and "unknown option: --loud_from" in said
