"""A layout of data defined here alone: everything that reads recordings reads it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from data_tools import WORDS, tiny_codec, write_jsonl
from training_tools import logged, train, trainer

from finetune.config import load_config
from finetune.data import (
    SOURCES,
    Entry,
    Reading,
    Recording,
    Source,
    Word,
    check_recordings,
)
from finetune.encode import encode_data
from finetune.errors import UserError
from finetune.evaluation.codes import encode_to_file

RATE_HZ = 24000
DURATIONS_SEC: dict[float, float] = {220.0: 2.0, 330.0: 2.5, 440.0: 0.72}


@dataclass(frozen=True)
class Sines(Recording):
    """A tone for Moshi, its octave for the user, and a word every half second."""

    frequency_hz: float = 0.0

    @property
    def location(self) -> str:
        return f"{self.path}/{self.frequency_hz:g}"

    @property
    def files(self) -> Any:
        return ()

    def audio_version(self) -> tuple[str, float]:
        return "sines", self.frequency_hz

    def read_words(self) -> list[Any]:
        starts = np.arange(0.1, self.duration_sec - 0.3, 0.5).tolist()
        return [
            Word(WORDS[i % len(WORDS)], start, start + 0.25, "SPEAKER_MAIN")
            for i, start in enumerate(starts)
        ]

    def read_audio(self, start_sample: int, num_samples: int, sample_rate_hz: int) -> torch.Tensor:
        end = min(start_sample + num_samples, round(self.duration_sec * sample_rate_hz))
        time_sec = torch.arange(start_sample, end, dtype=torch.float64) / sample_rate_hz
        tones = [torch.sin(2 * torch.pi * self.frequency_hz * n * time_sec) for n in (1, 2)]
        return 0.3 * torch.stack(tones).float()


class SinesSource(Source):
    """`name.sines` stands for a few tones; nothing is on disk."""

    @classmethod
    def reads(cls, path: Path) -> bool:
        return path.suffix == ".sines"

    def entries(self) -> list[Any]:
        return [
            Entry(f"{self.path}:{i}", Sines(self.path, f"{f:g}", f"{self.path}:{i}", sec, f))
            for i, (f, sec) in enumerate(DURATIONS_SEC.items())
        ]


@pytest.fixture
def sines(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("finetune.data.layouts.SOURCES", [SinesSource, *SOURCES])
    return "all.sines"


def on_disk(folder: Path) -> Path:
    """The same as files, in the layout of moshi-finetune."""
    folder.mkdir()
    lines: list[Any] = []
    for entry in SinesSource(folder, "data", Reading()).entries():
        tones = entry.recording
        samples = tones.read_audio(0, 10 * RATE_HZ, RATE_HZ).T.numpy()
        path = folder / f"{tones.path_as_written}.wav"
        soundfile.write(path, samples, RATE_HZ, subtype="FLOAT")
        words = [[w.text, [w.start_sec, w.end_sec], w.speaker] for w in tones.read_words()]
        path.with_suffix(".json").write_text(json.dumps({"alignments": words}))
        lines.append({"path": path.name, "duration": tones.duration_sec})
    return write_jsonl(folder / "all.jsonl", lines)


def test_training_on_it_stopped_and_resumed_is_training_on_the_same_files(
    config: Path, tmp_path: Path, sines: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "do_eval": True,
        "eval_freq": 4,
        "ckpt_freq": 2,
        "data.num_workers": 1,
    }
    files = str(on_disk(tmp_path / "files"))
    train(config, tmp_path / "same", options | {"data.train_data": files, "data.eval_data": files})

    options |= {"data.train_data": sines, "data.eval_data": sines}
    first = trainer(config, tmp_path / "toy", options)
    monkeypatch.setattr(first, "interrupted", lambda: first.step == 2)
    first.train()
    assert train(config, tmp_path / "toy", options | {"resume": True}).step == 4
    for kind in ("train", "eval"):
        assert logged(tmp_path / "toy", kind=kind) == logged(tmp_path / "same", kind=kind)


def test_encoding_ahead_and_evaluation_read_it(
    config: Path, tmp_path: Path, sines: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"data.train_data": sines, "data.cache_dir": tmp_path / "cache"}
    for number in (4, 0):
        encode_data(load_config(config, options))
        assert f"encoded {number} segments" in capsys.readouterr().out
    train(config, tmp_path / "run", options)
    assert set(logged(tmp_path / "run", "encoded_segments")) == {0}

    recordings, problems = check_recordings(sines, key="--data")
    assert [r.duration_sec for r in recordings] == [*DURATIONS_SEC.values()] and not problems
    codes = encode_to_file(tiny_codec(), recordings[1], tmp_path / "codes")
    assert codes.num_frames == 32 and codes.read(0, 32).shape == (17, 32)


def test_its_faults_are_found_as_those_of_files(
    config: Path, tmp_path: Path, sines: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sines, "read_audio", lambda *_: torch.zeros(2, 100))
    with pytest.raises(UserError, match=r"all\.sines:0: both channels are silent(.|\n)*sines:2"):
        # What was found of them before lies in the other tests' cache.
        train(config, tmp_path / "run", {"data.train_data": sines, "data.cache_dir": None})
