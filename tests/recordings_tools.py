"""Plain recordings, made of the dialogues of the demonstration."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import soundfile

from finetune.__main__ import main

ROOT = Path(__file__).parents[1]
DIALOGUES = ROOT / "example/demo/dialogues"
TOKENIZER = ROOT / "example/demo/model/tokenizer.model"
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


# --- recordings to check --------------------------------------------------------------------------

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


def findings_of(data: Path, *options: Any) -> tuple[Any, dict[str, set[Any]]]:
    """Exit status of `data check`, and the codes of what it found by the name of the recording."""
    with TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        if data.suffix == ".yaml":
            options = (f"--cache={folder}/kept", *options)
        elif "--tokenizer" not in options:
            options = ("--tokenizer", TOKENIZER, *options)
        status = call("data", "check", data, "--json", out, "--workers=1", *options)
        content = json.loads(out.read_text())
    codes = {
        Path(each["path"] or each["origin"]).stem: {f["code"] for f in each["findings"]}
        for each in content["recordings"]
    }
    return status, codes | {"together": {f["code"] for f in content["together"]}}
