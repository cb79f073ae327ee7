"""`moshi-ttt data check`: what is wrong is found before a run is trained on it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from recordings_tools import DIALOGUES, call

from finetune.data.inspection.findings import Inspection
from finetune.recordings import check

ROOT = Path(__file__).parents[3]
TOKENIZER = ROOT / "example/demo/model/tokenizer.model"
WORDS = [["hello", [0.1, 0.4], "SPEAKER_MAIN"], ["yes", [0.6, 0.9], "SPEAKER_USER"]]


def speech(seed: int = 0, duration_sec: float = 1.0) -> np.ndarray:
    """Stereo noise where `WORDS` are said: left, then right."""
    rng = np.random.default_rng(seed)
    samples = rng.normal(0, 0.1, (round(24_000 * duration_sec), 2)).astype(np.float32)
    samples[:, 0] *= np.arange(len(samples)) < 12_000
    samples[:, 1] *= np.arange(len(samples)) >= 12_000
    return samples


def add(
    folder: Path,
    name: str,
    samples: np.ndarray | None = None,
    words: Any = WORDS,
    duration_sec: float | None = None,
    **options: Any,
) -> None:
    """Write a recording with its transcript and its line in data.jsonl."""
    samples = speech() if samples is None else samples
    soundfile.write(folder / f"{name}.wav", samples, 24_000, **options)
    (folder / f"{name}.json").write_text(json.dumps({"alignments": words}))
    duration_sec = len(samples) / 24_000 if duration_sec is None else duration_sec
    with (folder / "data.jsonl").open("a") as file:
        file.write(json.dumps({"path": f"{name}.wav", "duration": duration_sec}) + "\n")


def found(folder: Path, *options: Any) -> tuple[Any, dict[str, set[Any]]]:
    """Exit status, and the codes of what was found by the name of the recording."""
    out = folder / "found.json"
    options = (*options, "--json", out, "--tokenizer", TOKENIZER, "--workers=1")
    status = call("data", "check", folder / "data.jsonl", *options)
    content = json.loads(out.read_text())
    codes = {
        Path(each["path"] or each["origin"]).stem: {f["code"] for f in each["findings"]}
        for each in content["recordings"]
    }
    return status, codes | {"together": {f["code"] for f in content["together"]}}


def test_the_clean_demonstration_has_no_findings(capsys: pytest.CaptureFixture[str]) -> None:
    status = call(
        "data", "check", ROOT / "example/demo.yaml", f"--cache={os.devnull}", "--workers=1",
        f"--data.train_data={DIALOGUES / 'train.jsonl'}",
        f"--data.eval_data={DIALOGUES / 'eval.jsonl'}",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert status == 0 and "3 recordings, 0.00 h: 0 with errors, 0 with warnings" in said
    assert "tokens were not" not in said, "the run's tokenizer is in its folder"


def test_planted_faults_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(tmp_path, "good")
    swapped = [
        [w, t, "SPEAKER_USER" if s == "SPEAKER_MAIN" else "SPEAKER_MAIN"] for w, t, s in WORDS
    ]
    add(tmp_path, "swapped", words=swapped)
    silent = speech()
    silent[:, 0] = 0
    add(tmp_path, "silent", silent)
    add(tmp_path, "equal", np.repeat(speech()[:, :1], 2, axis=1))
    add(tmp_path, "integers", speech() * 32768, subtype="FLOAT")
    add(tmp_path, "length", duration_sec=3.0)
    add(tmp_path, "late", words=[*WORDS, ["bye", [5.0, 5.2], "SPEAKER_MAIN"]])
    add(tmp_path, "mono", speech()[:, 0])
    add(tmp_path, "bare")
    (tmp_path / "bare.json").unlink()
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write("not json\n" + (tmp_path / "data.jsonl").read_text().splitlines()[0] + "\n")
    status, codes = found(tmp_path)
    assert status == 1
    assert codes["good"] == set()
    assert codes["swapped"] == {"swapped-channels"}
    assert codes["silent"] == {"silent-channel"}
    assert codes["equal"] == {"channels-equal"}
    assert codes["integers"] == {"integer-units"}
    assert codes["length"] == {"wrong-duration"}
    assert "words-after-the-end" in codes["late"] and "not-stereo" in codes["mono"]
    assert codes["bare"] == {"transcript-missing"}
    assert codes["data"] == {"malformed-line"} and codes["together"] == {"listed-twice"}
    said = capsys.readouterr().out
    assert "11 recordings" in said and "silent-channel" in said


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
    first = found(tmp_path)
    assert sorted(inspected) == ["a", "b", "c"]
    assert found(tmp_path) == first and len(inspected) == 3, "what was found before is kept"
    (tmp_path / "b.json").write_text(json.dumps({"alignments": []}))
    found(tmp_path)
    assert inspected[3:] == ["b"]
    found(tmp_path, "--fast")
    assert sorted(inspected[4:]) == ["a", "b", "c"], "another inspection"


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
    words = [sys.executable, "-m", "finetune", "data", "check", str(tmp_path / "data.jsonl")]
    kept = tmp_path / ".data.jsonl.checked"
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (kept.exists() and kept.read_bytes().count(b"\n") > 5):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and b"stopped by SIGINT" in errors, errors
    assert b"Traceback" not in errors
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
        (["{tmp}/data.jsonl", "--batch_size=2"], "--batch_size is no option"),
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
