"""`moshi-ttt data check`: what is wrong is found before a run is trained on it."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import COMMAND, Program
from recordings_tools import add, call, findings_of, speech

from finetune.data.inspection.findings import Inspection
from finetune.recordings import check

ROOT = Path(__file__).parents[3]


def test_the_page_names_each_finding_and_needs_no_other_file(tmp_path: Path) -> None:
    silent = speech()
    silent[:, 0] = 0
    add(tmp_path, "<b>silent", silent)
    page = tmp_path / "out/page.html"
    assert call("data", "check", tmp_path / "data.jsonl", "--html", page, "--workers=1") == 1
    text = page.read_text()
    assert "silent-channel" in text and "&lt;b&gt;silent.wav" in text and "<b>silent" not in text
    assert "src=" not in text and "href=" not in text


def test_only_what_changed_is_inspected_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        add(tmp_path, name)
    add(tmp_path, "c", np.repeat(speech()[:, :1], 2, axis=1))
    inspected: list[Any] = []
    inspect = check._inspect

    def noted(recording: Any, **options: Any) -> Inspection:
        inspected.append(recording.path.stem)
        return inspect(recording, **options)

    monkeypatch.setattr(check, "_inspect", noted)
    first = findings_of(tmp_path / "data.jsonl")
    assert sorted(inspected) == ["a", "b", "c"]
    assert findings_of(tmp_path / "data.jsonl") == first and len(inspected) == 3, (
        "what was found before is kept"
    )
    (tmp_path / "b.json").write_text(json.dumps({"alignments": []}))
    findings_of(tmp_path / "data.jsonl")
    assert inspected[3:] == ["b"]
    findings_of(tmp_path / "data.jsonl", "--fast")
    assert sorted(inspected[4:]) == ["a", "b", "c"], "another inspection"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1" + "0" * 400])
def test_a_length_that_is_no_number_is_a_finding_of_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: str
) -> None:
    add(tmp_path, "a")
    add(tmp_path, "b", speech(1))
    with (tmp_path / "data.jsonl").open("a") as lines:
        lines.write(f'{{"path": "c.wav", "duration": {number}}}\n')
    out = tmp_path / "found.json"
    assert call("data", "check", tmp_path / "data.jsonl", "--json", out, "--workers=2") == 1
    found = json.loads(out.read_text())["recordings"]
    wrong = {each["origin"].rpartition(":")[2]: each["findings"] for each in found}
    assert [finding["code"] for finding in wrong["3"]] == ["malformed-line"]
    assert "must be a finite number" in wrong["3"][0]["message"]
    assert "malformed-line" not in str([wrong["1"], wrong["2"]]), "the others are looked at"


def test_processes_look_at_each_recording_once(tmp_path: Path) -> None:
    for number in range(35):
        add(tmp_path, f"{number:02}", np.zeros((24_000, 2)) if number == 17 else speech(number))
    for options in (["--fast"], []):
        out = tmp_path / "found.json"
        words = [tmp_path / "data.jsonl", "--workers=2", "--json", out, *options]
        assert call("data", "check", *words) == 1
        recordings = json.loads(out.read_text())["recordings"]
        assert [Path(each["path"]).stem for each in recordings] == [f"{i:02}" for i in range(35)]
        assert [bool(each["findings"]) for each in recordings] == [i == 17 for i in range(35)]


def test_a_file_that_cannot_be_kept_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add(tmp_path, "a")
    (tmp_path / "taken").write_text("")
    cache = tmp_path / "taken/cache"
    assert call("data", "check", tmp_path / "data.jsonl", "--cache", cache, "--workers=1") == 0
    assert "--cache" in caplog.text


def test_stopped_and_called_again_it_goes_on(tmp_path: Path) -> None:
    for number in range(400):
        add(tmp_path, f"{number:03}", speech(number, 2.0))
    kept = tmp_path / ".data.jsonl.checked"
    process = Program(COMMAND, "data", "check", tmp_path / "data.jsonl", stderr_apart=True)
    deadline = time.monotonic() + 120
    while not (kept.exists() and kept.read_bytes().count(b"\n") > 5):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped by SIGINT" in errors, errors
    assert "Traceback" not in errors
    num_kept = _num_results(kept)
    assert 5 <= num_kept < 400
    assert call("data", "check", tmp_path / "data.jsonl", "--workers=1") == 0
    assert _num_results(kept) == 400, "each result was made once"


def _num_results(path: Path) -> int:
    return sum(line.startswith("[") for line in path.read_text().splitlines())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}/no.jsonl"], "does not exist"),
        (["{tmp}/a,b:1.jsonl"], "(commas separate paths, so that none may be in a name)"),
        (["{tmp}/data.jsonl", "--batch_size=2"], "--batch_size is no option"),
        (
            ["{tmp}/data.jsonl", "--data.main_channel=up"],
            "data.main_channel: expected left or right, got 'up'",
        ),
        (["{tmp}/data.jsonl", "--tokenizer={tmp}/data.jsonl"], "is no sentencepiece model"),
        (["{tmp}/no.yaml"], "There is no configuration file"),
    ],
)
def test_a_mistake_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    add(tmp_path, "a")
    assert call("data", "check", *[word.format(tmp=tmp_path) for word in words]) == 1
    said = capsys.readouterr().err
    assert message in said and said.startswith("\nerror: ")


def test_a_list_with_moshi_on_the_right_is_checked_without_a_configuration(tmp_path: Path) -> None:
    swapped = speech()[:, ::-1]
    swapped[:, 0] *= 0.01
    add(tmp_path, "a", swapped)
    data, right = tmp_path / "data.jsonl", "--data.main_channel=right"
    assert call("data", "stats", data, right, "--workers=1") == 0
    found = [findings_of(data, *option) for option in ([], [right], [])]
    assert found[0] == found[2], "what was found of one side is not taken for the other's"
    assert "swapped-channels" in str(found[0]) and "swapped-channels" not in str(found[1])
    picture = tmp_path / "shown.png"
    assert call("data", "show", data, right, "--out", picture) == 0 and picture.exists()


def test_a_line_without_its_length_is_told_what_is_expected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(tmp_path, "a")
    (tmp_path / "data.jsonl").write_text('{"path": "a.wav"}\n')
    assert call("data", "check", tmp_path / "data.jsonl", "--workers=1") == 1
    said = capsys.readouterr().out
    assert "data.jsonl:1: malformed line: `duration` is missing: expected {" in said
    assert "1 recording, 0.00 h: 1 with errors" in said


def test_that_there_is_no_tokenizer_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, note = tmp_path / "data.jsonl", "text tokens were not looked at"
    report = tmp_path / "found.json"
    for name, times in (("a", 1), ("", 0), ("b", 1)):
        if name:
            add(tmp_path, name, speech(len(name) + ord(name)))
        assert call("data", "check", data, "--workers=1", "--json", report) == 0
        assert capsys.readouterr().out.count(note) == times
        assert note in report.read_text(), "a report is complete"
    assert call("data", "stats", data, "--workers=1") == 0
    assert "tokenizer" not in capsys.readouterr().out
