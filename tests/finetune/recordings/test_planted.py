"""`moshi-ttt data check` finds each fault that was planted, and nothing else."""

import gzip
import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from data_tools import tiny_tokenizer
from recordings_tools import ROOT, WORDS, add, call, findings_of, speech

MAIN, USER = "SPEAKER_MAIN", "SPEAKER_USER"


def said(*words: Any) -> list[Any]:
    """Words of Moshi and what the user says."""
    return [*([text, list(times), MAIN] for text, *times in words), WORDS[1]]


def silent(side: int) -> np.ndarray:
    samples = speech()
    samples[:, side] = 0
    return samples


def clipped() -> np.ndarray:
    samples = speech()
    samples[2000:6000, 0] = np.sign(samples[2000:6000, 0])
    return samples


def equal() -> np.ndarray:
    return np.repeat(speech()[:, :1], 2, axis=1)


def bare(folder: Path, name: str) -> None:
    add(folder, name)
    (folder / f"{name}.json").unlink()


def truncated(folder: Path, name: str) -> None:
    add(folder, name, speech(5))
    path = folder / f"{name}.wav"
    path.write_bytes(path.read_bytes()[:60_000])


def without_length(folder: Path, name: str) -> None:
    add(folder, name, speech(6))
    path = folder / f"{name}.wav"
    content = bytearray(path.read_bytes())
    content[40:44] = bytes(4)  # what a program leaves there that writes into a pipe
    path.write_bytes(content)


def missing(folder: Path, name: str) -> None:
    add(folder, name)
    (folder / f"{name}.wav").unlink()


def unused(folder: Path, name: str) -> None:
    add(folder, name, speech(7))
    content = {"alignments": WORDS, "text_conditions": {"mood": "calm"}}
    (folder / f"{name}.json").write_text(json.dumps(content))


def damaged_gzip(folder: Path, name: str) -> None:
    add(folder, name, speech(8))
    path = folder / f"{name}.json"
    path.write_bytes(gzip.compress(path.read_bytes())[:-12])


def not_numbers(folder: Path, name: str) -> None:
    samples = speech(9)
    samples[100, 0] = np.nan
    add(folder, name, samples, subtype="FLOAT")


def linked(folder: Path, name: str) -> None:
    add(folder, name, speech(10))
    path = folder / f"{name}.wav"
    (folder / "store").mkdir()
    path.symlink_to(shutil.move(path, folder / "store" / path.name))


def words(*given: Any, seed: int) -> Callable[[Path, str], None]:
    return lambda folder, name: add(folder, name, speech(seed), words=list(given))


def audio(samples: Callable[[], np.ndarray], **options: Any) -> Callable[[Path, str], None]:
    return lambda folder, name: add(folder, name, samples(), **options)


SWAPPED = [[text, times, USER if who == MAIN else MAIN] for text, times, who in WORDS]
PLANTED: dict[str, Callable[[Path, str], None]] = {
    "swapped-channels": words(*SWAPPED, seed=11),
    "silent-channel": audio(lambda: silent(0)),
    "silent-user": audio(lambda: silent(1)),
    "channels-equal": audio(equal),
    "integer-units": audio(lambda: speech(12) * 32768, subtype="FLOAT"),
    "clipping": audio(clipped),
    "too-quiet": audio(lambda: speech(32) * 1e-3),
    "wrong-duration": audio(lambda: speech(13), duration_sec=3.0),
    "too-short": audio(lambda: speech(14)[:1000], words=[]),
    "truncated": truncated,
    "no-length-in-header": without_length,
    "unreadable": not_numbers,
    "missing": missing,
    "not-stereo": audio(lambda: speech()[:, 0]),
    "hidden-file": lambda folder, name: add(folder, f".{name}", speech(15)),
    "apple-double": lambda folder, name: add(folder, f"._{name}", speech(16)),
    "linked-file": linked,
    "transcript-missing": bare,
    "transcript-malformed": damaged_gzip,
    "words-after-the-end": words(*said(("hello", 0.1, 0.4), ("bye", 5.0, 5.2)), seed=17),
    "words-without-length": words(*said(("hello", 0.1, 0.4), ("you", 0.4, 0.4)), seed=18),
    "negative-times": words(*said(("well", -0.3, -0.1), ("hello", 0.1, 0.4)), seed=19),
    "unsorted-words": words(*said(("you", 0.3, 0.4), ("hello", 0.0, 0.2)), seed=20),
    "overlapping-words": words(*said(("hello", 0.0, 0.4), ("you", 0.2, 0.4)), seed=21),
    "sentences-as-words": words(*said(("how are you now", 0.0, 0.45)), seed=22),
    "other-time-units": words(*said(("hello", 100, 400), ("you", 600, 900)), seed=23),
    "no-main-speaker": words(["hello", [0.1, 0.4], "SPEAKER_00"], WORDS[1], seed=24),
    "no-words": audio(lambda: np.tile(speech(27), (3, 1)), words=[]),
    "few-words": audio(lambda: np.tile(speech(28), (6, 1))),
    "unknown-characters": words(*said(("日本", 0.1, 0.4)), seed=25),
    "tokens-without-frame": words(
        *said(*(("goodbyethankshello", 0.01 * i, 0.01 * i + 0.005) for i in range(9))), seed=26
    ),
    "unused-keys": unused,
}
"""What writes a recording with one fault, by the code of what is to be found."""


def test_each_planted_fault_is_found_and_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(tmp_path, "good", speech(1))
    for code, plant in PLANTED.items():
        plant(tmp_path, code)
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write("not json\n")
    # The demonstration's tokenizer knows every character, by its bytes.
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(tiny_tokenizer().serialized_model_proto())
    status, found = findings_of(tmp_path / "data.jsonl", "--tokenizer", tokenizer)
    assert status == 1
    assert found.pop("together") == set() and found.pop("good") == set()
    assert found.pop("data") == {"malformed-line"}
    named = {name.lstrip("._"): codes for name, codes in found.items()}
    assert named == {code: {code} for code in PLANTED}
    out = capsys.readouterr().out
    assert f"{len(PLANTED) + 2} recordings" in out and "silent-channel" in out


def test_what_is_wrong_with_a_list_is_found(tmp_path: Path) -> None:
    """The same line twice, the same audio under two names, names that differ in their Unicode form
    alone, and what is evaluated although it trains, also under another name."""
    train, evaluation = tmp_path / "train", tmp_path / "eval"
    for folder in (train, evaluation):
        folder.mkdir()
    for seed, name in enumerate(["a", "b", "Café"]):
        add(train, unicodedata.normalize("NFC", name), speech(seed))
    lines = train / "data.jsonl"
    options = [f"--data.train_data={lines}", f"--data.eval_data={evaluation / 'data.jsonl'}"]
    add(evaluation, "own", speech(9))
    assert _together(options) == set()

    lines.write_text(lines.read_text() + lines.read_text().splitlines()[0] + "\n")
    assert _together(options) == {"listed-twice"}
    add(train, "copy")
    samples, rate_hz = soundfile.read(train / "b.wav", dtype="int16")
    soundfile.write(train / "copy.flac", samples, rate_hz)
    lines.write_text(lines.read_text().replace("copy.wav", "copy.flac"))
    assert _together(options) == {"listed-twice", "same-audio"}
    add(train, unicodedata.normalize("NFD", "Café"), speech(8))
    assert _together(options) == {"listed-twice", "same-audio", "same-name-in-unicode"}
    add(evaluation, "renamed", speech(2))
    assert "evaluation-in-training" in _together(options)
    assert "same-audio" not in _together([*options, "--fast"]), "that needs all of the audio"


def _together(options: list[str]) -> set[Any]:
    return findings_of(ROOT / "example/demo.yaml", *options)[1]["together"]


def test_unreadable_audio_is_one_finding(tmp_path: Path) -> None:
    many = [[f"word{i}", [0.1 * i, 0.1 * i + 0.05], MAIN] for i in range(9)]
    add(tmp_path, "mono", speech()[:, 0], words=many)
    for options in ([], ["--fast"]):
        assert findings_of(tmp_path / "data.jsonl", *options)[1]["mono"] == {"not-stereo"}


def test_the_clean_demonstration_has_no_findings(capsys: pytest.CaptureFixture[str]) -> None:
    dialogues = ROOT / "example/demo/dialogues"
    status = call(
        "data", "check", ROOT / "example/demo.yaml", "--cache=/dev/null", "--workers=1",
        f"--data.train_data={dialogues / 'train.jsonl'}",
        f"--data.eval_data={dialogues / 'eval.jsonl'}",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert status == 0 and "3 recordings, 0.00 h: 0 with errors, 0 with warnings" in said
    assert "tokens were not" not in said, "the run's tokenizer is in its folder"
