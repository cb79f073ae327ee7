"""The layouts in which data may lie on disk."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune.data.layouts.base import Entry, Source
from finetune.data.layouts.codes import CodesSource
from finetune.data.layouts.jsonl import JsonlSource, MonoPair, StereoFile
from finetune.data.layouts.lhotse_cuts import LhotseSource
from finetune.data.layouts.parquet import ParquetSource
from finetune.data.layouts.saved_dataset import SavedDatasetSource
from finetune.data.reading import Reading
from finetune.data.recording import Recording
from finetune.data.transcripts import shared_transcripts

__all__ = [
    "SOURCES",
    "CodesSource",
    "Entry",
    "JsonlSource",
    "LhotseSource",
    "MonoPair",
    "ParquetSource",
    "SavedDatasetSource",
    "Source",
    "StereoFile",
    "list_entries",
]

SOURCES: list[type[Source]] = [
    SavedDatasetSource,
    CodesSource,
    ParquetSource,
    LhotseSource,
    JsonlSource,
]
"""All there are. The first that reads a path has it; the last reads whatever is left."""


def list_entries(path: Path, key: str, reading: Reading | None = None) -> list[Entry]:
    """Return what is at a path, by the source that reads it, without opening a recording. Those
    that would have the words of another are entries with a problem.

    Args:
        key: the configuration's key that names the path, for messages.
        reading: None: as files are.

    Raises:
        UserError: see `Source.entries`.
    """
    kind = next((kind for kind in SOURCES if kind.reads(path)), SOURCES[-1])
    return [*_with_own_words(kind(path, key, reading or Reading()).entries())]


def _with_own_words(entries: Sequence[Entry]) -> Iterator[Entry]:
    recordings = [entry.recording for entry in entries if entry.recording is not None]
    transcripts = (each for recording in recordings for each in recording.own_transcripts)
    problems = shared_transcripts(transcripts, Recording.leave_out)
    for entry in entries:
        if problems and entry.recording is not None:
            files = (file for file, _ in entry.recording.own_transcripts)
            if problem := next((problems[file] for file in files if file in problems), ""):
                entry = Entry(entry.origin, None, problem)
        yield entry
