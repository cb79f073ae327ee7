"""Codes instead of audio: `.npz` files whose arrays are dialogues."""

import zipfile
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from finetune.config import require_sources
from finetune.data.audio_files import version_of
from finetune.data.codes import Codes
from finetune.data.layouts.base import Entry, Source
from finetune.data.npz import read_array, read_headers
from finetune.data.problems import FileProblem
from finetune.data.recording import Recording
from finetune.data.text import FRAME_RATE_HZ
from finetune.data.transcripts import Word, read_transcript

_FORM = (
    "expected whole numbers [streams, frames]: 17 rows for a model of 8 + 8 codebooks (text, then "
    "Moshi's, then the user's), or 16 without text"
)

_MAX_STREAMS = 1 + 2 * 32
"""Text, and all of Mimi's codebooks on both sides; more are frames in the place of streams."""


@dataclass(frozen=True)
class CodesRecording(Recording):
    """A dialogue that was encoded before: with its text stream, or with words.

    Args:
        name: its own, in the file that holds it.
        is_turned: the user's codes stand before Moshi's.
    """

    name: str
    has_text: bool
    is_turned: bool

    has_codes = True

    @property
    def location(self) -> str:
        return self.title

    @property
    def title(self) -> str:
        return f"{self.path}/{self.name}"

    def audio_version(self) -> tuple[object, ...] | None:
        version = version_of(self.path)
        return None if version is None else (*version, self.name, self.is_turned)

    @abstractmethod
    def load_array(self, start_frame: int, num_frames: int) -> np.ndarray:
        """Read whole numbers `[streams, at most num_frames]`.

        Raises:
            FileProblem: they cannot be read.
        """

    def read_codes(self, start_frame: int, num_frames: int) -> Codes:
        array = self.load_array(start_frame, num_frames)
        part = torch.from_numpy(array.astype(np.int64))
        if (part < 0).any():
            raise FileProblem(
                f"codes {self.title} hold numbers below 0", "cut padding off, and write it again"
            )
        text = part[0] if self.has_text else None
        sides = part[int(self.has_text) :].reshape(2, -1, part.shape[1])
        return Codes(sides.flip(0) if self.is_turned else sides, text)


def shape_problem(shape: tuple[int, ...], dtype: object, *, is_whole: bool) -> str | None:
    """Return why an array cannot be the codes of a dialogue; None: it can."""
    if len(shape) == 2 and 2 <= shape[0] <= _MAX_STREAMS and shape[1] and is_whole:
        return None
    return f"codes have shape {list(shape)} of {dtype}: {_FORM}"


@dataclass(frozen=True)
class CodesArray(CodesRecording):
    """An array of an `.npz`; the words are in a `.json` of the array's name."""

    @property
    def transcript_path(self) -> Path:
        return self.path.with_name(f"{self.name}.json")

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,) if self.has_text else (self.path, self.transcript_path)

    @property
    def own_transcripts(self) -> tuple[tuple[Path, Path], ...]:
        return () if self.has_text else ((Path(self.title), self.transcript_path),)

    def read_words(self) -> list[Word]:
        return [] if self.has_text else read_transcript(self.transcript_path)

    def load_array(self, start_frame: int, num_frames: int) -> np.ndarray:
        try:
            array = read_array(self.path, self.name)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise FileProblem(
                f"codes {self.title} cannot be read ({error})", "copy or make them again"
            ) from None
        return array[:, start_frame : start_frame + num_frames]


class CodesSource(Source):
    """An `.npz` with an array `[streams, frames]` for each dialogue, or a folder of such files."""

    @classmethod
    def reads(cls, path: Path) -> bool:
        if path.is_dir():
            return any(path.rglob("*.npz")) and not any(path.rglob("*.jsonl"))
        return path.suffix == ".npz"

    def entries(self) -> list[Entry]:
        require_sources([self.path], self.key)
        files = sorted(self.path.rglob("*.npz")) if self.path.is_dir() else [self.path]
        return [entry for file in files for entry in self._of_file(file)]

    def _of_file(self, path: Path) -> list[Entry]:
        try:
            headers = read_headers(path)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            problem = f"{path} cannot be read as .npz ({error}): copy or make it again"
            return [Entry(str(path), None, problem)]
        if not headers:
            return [Entry(str(path), None, f"{path} holds no arrays: {_FORM}")]
        return [
            self._entry(path, name, header.shape, header.dtype) for name, header in headers.items()
        ]

    def _entry(self, path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Entry:
        origin = f"{path}/{name}"
        is_whole = np.issubdtype(dtype, np.integer)
        if (problem := shape_problem(shape, dtype, is_whole=is_whole)) is not None:
            return Entry(origin, None, problem)
        has_text = shape[0] % 2 == 1
        is_turned = self.reading.main_channel == "right"
        duration_sec = shape[1] / FRAME_RATE_HZ
        written = f"{path.name}/{name}"
        recording = CodesArray(path, written, origin, duration_sec, name, has_text, is_turned)
        return Entry(origin, recording)
