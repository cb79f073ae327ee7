"""`moshi-ttt data index --pair`: which files it takes, and what it says of the others."""

import shutil
from pathlib import Path

import pytest
from recordings_tools import call, lines_of, mono_folder

PAIR = "{id}_left.wav,{id}_right.wav"


def test_an_ending_in_capitals_is_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mono_folder(tmp_path, ["train_000", "train_001"])
    for side in ("left", "right"):
        (folder / f"train_001_{side}.wav").rename(folder / f"train_001_{side}.WAV")
    assert call("data", "index", folder, "--pair", PAIR) == 0
    assert [(line["path"], line["user_path"]) for line in lines_of(folder / "data.jsonl")] == [
        ("train_000_left.wav", "train_000_right.wav"),
        ("train_001_left.WAV", "train_001_right.WAV"),
    ]
    assert "passed over" not in capsys.readouterr().out


def test_two_that_differ_in_capitals_alone_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mono_folder(tmp_path, ["train_000"])
    shutil.copy(folder / "train_000_left.wav", folder / "train_000_left.WAV")
    assert call("data", "index", folder, "--pair", PAIR) == 0
    assert len(lines_of(folder / "data.jsonl")) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "train_000_left.wav is called as" in said and "give one another name" in said


def test_audio_that_the_names_do_not_fit_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mono_folder(tmp_path, ["train_000", "train_001"])
    for side in ("left", "right"):
        (folder / f"train_001_{side}.wav").rename(folder / f"train_001_{side.title()}.wav")
    assert call("data", "index", folder, "--pair", PAIR, "--join") == 0
    said = "passed over 2 audio files that --pair does not name (train_001_Left.wav, for example)"
    assert said in capsys.readouterr().out
    # What was joined is in the folder now, and is no such file.
    assert call("data", "index", folder, "--pair", PAIR, "--join", "--overwrite") == 0
    assert said in capsys.readouterr().out
