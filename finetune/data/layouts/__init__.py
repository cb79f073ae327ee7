"""The layouts in which data may lie on disk."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
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
    "list_together",
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
    (entries,) = list_together([path], key, reading)
    return entries


def list_together(
    paths: Sequence[Path],
    key: str,
    reading: Reading | None = None,
    beside: Sequence[Recording] = (),
) -> list[list[Entry]]:
    """Return what is at each of some paths, as `list_entries` does of one; no two recordings, of
    whichever paths, have the same words.

    Args:
        beside: recordings of other data, whose words are theirs.

    Raises:
        UserError: see `Source.entries`.
    """
    listed = [_source_at(path, key, reading or Reading()).entries() for path in paths]
    found = (entry.recording for entries in listed for entry in entries)
    recordings = chain(beside, (each for each in found if each is not None))
    transcripts = (each for recording in recordings for each in recording.own_transcripts)
    problems = shared_transcripts(transcripts, Recording.leave_out)
    return [[*_with_own_words(entries, problems)] for entries in listed]


def _source_at(path: Path, key: str, reading: Reading) -> Source:
    kind = next((kind for kind in SOURCES if kind.reads(path)), SOURCES[-1])
    return kind(path, key, reading)


def _with_own_words(entries: Sequence[Entry], problems: Mapping[Path, str]) -> Iterator[Entry]:
    for entry in entries:
        if problems and entry.recording is not None:
            files = (file for file, _ in entry.recording.own_transcripts)
            if problem := next((problems[file] for file in files if file in problems), ""):
                entry = Entry(entry.origin, None, problem)
        yield entry
