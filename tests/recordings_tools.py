"""Plain recordings, made of the dialogues of the demonstration."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import soundfile

from finetune.cli import main

DIALOGUES = Path(__file__).parents[1] / "example/demo/dialogues"
NAMES = ("train_000", "train_001", "eval_000")


def call(*words: Any) -> str | int | None:
    """Run `moshi-ttt ...` in this process; returns its exit status."""
    old, sys.argv = sys.argv, ["moshi-ttt", *map(str, words)]
    try:
        with pytest.raises(SystemExit) as leaving:
            main()
    finally:
        sys.argv = old
    return leaving.value.code


def true_words(name: str, speaker: str | None = None) -> list[Any]:
    """Word, start and end of a dialogue of the demonstration."""
    content = json.loads((DIALOGUES / f"{name}.json").read_text())
    return [(w, *times) for w, times, who in content["alignments"] if speaker in (None, who)]


def said(name: str, speaker: str) -> str:
    return " ".join(word for word, *_ in true_words(name, speaker))


def plain_folder(folder: Path, names: Sequence[str] = NAMES) -> Path:
    """Stereo files, each with a text for each channel."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.wav").write_bytes((DIALOGUES / f"{name}.wav").read_bytes())
        (folder / f"{name}.left.txt").write_text(said(name, "SPEAKER_MAIN"))
        (folder / f"{name}.right.txt").write_text(said(name, "SPEAKER_USER"))
    return folder


def mono_folder(folder: Path, names: Sequence[str] = NAMES) -> Path:
    """Two mono files a dialogue, each with its text."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        samples, rate = soundfile.read(DIALOGUES / f"{name}.wav", dtype="int16")
        for channel, (side, speaker) in enumerate(
            [("left", "SPEAKER_MAIN"), ("right", "SPEAKER_USER")]
        ):
            soundfile.write(folder / f"{name}_{side}.wav", samples[:, channel], rate)
            (folder / f"{name}_{side}.txt").write_text(said(name, speaker))
    return folder


def lines_of(jsonl: Path) -> list[Any]:
    return [json.loads(line) for line in Path(jsonl).read_text().splitlines()]
