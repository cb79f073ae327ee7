"""moshi-finetune's layout: a `.jsonl` of stereo files, with a transcript beside each."""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from finetune.data.audio import read_audio
from finetune.data.inspection import Inspection, inspect_recording
from finetune.data.layouts.base import Entry, Source
from finetune.data.reading import Reading
from finetune.data.recording import Recording
from finetune.data.text import TextEncoder
from finetune.data.transcripts import Word, read_text, read_transcript
from finetune.errors import UserError
from finetune.safety import is_recording_name, parse_json, path_problem, shown

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StereoFile(Recording):
    """A stereo file; the words are in a `.json` of the same name."""

    reading: Reading = field(default_factory=Reading)

    @property
    def transcript_path(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path, self.transcript_path)

    def audio_version(self) -> tuple[object, ...] | None:
        path = os.path.abspath(self.path)
        try:
            status = os.stat(path)
        except OSError:
            return None
        return path, (status.st_size, status.st_mtime_ns), *self.reading.changes

    def inspect(self, *, thorough: bool = False, text: TextEncoder | None = None) -> Inspection:
        return inspect_recording(
            self.path,
            self.transcript_path,
            duration_sec=self.duration_sec,
            thorough=thorough,
            text=text,
            main_channel=self.reading.main_channel,
        )

    def read_words(self) -> list[Word]:
        return read_transcript(self.transcript_path)

    def read_audio(self, start_sample: int, num_samples: int, sample_rate_hz: int) -> torch.Tensor:
        audio = read_audio(self.path, start_sample, num_samples, sample_rate_hz)
        return self.reading.apply(audio, start_sample, sample_rate_hz, self.path_as_written)


class JsonlSource(Source):
    """A `.jsonl` with a line `{"path": "a.wav", "duration": 12.3}` for each recording, or a folder
    of such files, at any depth."""

    @classmethod
    def reads(cls, path: Path) -> bool:
        return True

    def entries(self) -> list[Entry]:
        return [entry for file in self._files() for entry in _entries_of(file, self.reading)]

    def _files(self) -> list[Path]:
        path = self.path
        if not path.is_dir():
            if not path.is_file():
                raise UserError(
                    f"{self.key}: {path} does not exist. Give a .jsonl file or a folder of them, "
                    "optionally with a weight: path:0.5"
                )
            return [path]
        found = sorted(path.rglob("*.jsonl"))
        # What macOS and editors leave in a folder is no data: ._a.jsonl, .ipynb_checkpoints/.
        files = [f for f in found if not any(p[0] == "." for p in f.relative_to(path).parts)]
        if len(files) < len(found):
            logger.info("%s: %d hidden files are passed over", path, len(found) - len(files))
        if not files:
            hidden = " that is not hidden" if found else ""
            raise UserError(f"{self.key}: the folder {path} holds no .jsonl file{hidden}.")
        return files


def _entries_of(jsonl: Path, reading: Reading) -> list[Entry]:
    try:
        texts = read_text(jsonl).split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{jsonl} cannot be read as text in UTF-8: {error}") from None
    numbered = [(number, text) for number, text in enumerate(texts, 1) if text.strip()]
    if not numbered:
        raise UserError(
            f'{jsonl} is empty: it needs one line {{"path": "a.wav", "duration": 12.3}} for each '
            "recording."
        )
    return [_entry(jsonl, number, text, reading) for number, text in numbered]


def _entry(jsonl: Path, number: int, text: str, reading: Reading) -> Entry:
    origin = f"{jsonl}:{number}"
    try:
        fields = parse_json(text)
        written, promised_sec = fields["path"], fields["duration"]
        well_formed = isinstance(written, str) and type(promised_sec) in (int, float)
    except (ValueError, KeyError, TypeError):
        well_formed = False
    if not well_formed:
        problem = 'malformed line: expected {"path": "a.wav", "duration": 12.3} (seconds)'
        return Entry(origin, None, problem)
    if (wrong := path_problem(written)) is not None:
        return Entry(origin, None, f"the path {wrong}")
    if not is_recording_name(written):
        problem = (
            f"the path {shown(written)} leads out of the folder of {jsonl.name}: put that file "
            f"above the recordings, or give absolute paths"
        )
        return Entry(origin, None, problem)
    path = jsonl.parent / written
    return Entry(origin, StereoFile(path, written, origin, promised_sec, reading))
