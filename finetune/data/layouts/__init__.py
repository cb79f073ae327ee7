"""The layouts in which data may lie on disk."""

from pathlib import Path

from finetune.data.layouts.base import Entry, Source
from finetune.data.layouts.codes import CodesSource
from finetune.data.layouts.jsonl import JsonlSource, MonoPair, StereoFile
from finetune.data.layouts.lhotse_cuts import LhotseSource
from finetune.data.layouts.parquet import ParquetSource
from finetune.data.layouts.saved_dataset import SavedDatasetSource
from finetune.data.reading import Reading

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
    "open_source",
]

SOURCES: list[type[Source]] = [
    SavedDatasetSource,
    CodesSource,
    ParquetSource,
    LhotseSource,
    JsonlSource,
]
"""All there are. The first that reads a path has it; the last reads whatever is left."""


def open_source(path: Path, key: str, reading: Reading | None = None) -> Source:
    """Return the source that reads a path.

    Args:
        key: the configuration's key that names the path, for messages.
        reading: None: as files are.
    """
    kind = next((kind for kind in SOURCES if kind.reads(path)), SOURCES[-1])
    return kind(path, key, reading or Reading())
