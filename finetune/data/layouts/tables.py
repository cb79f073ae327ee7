"""Tables of Arrow and Parquet: opened, and the words in a column of them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.problems import FileProblem
from finetune.data.transcripts import Transcript, transcript_of
from finetune.errors import UserError
from finetune.safety import parse_json

if TYPE_CHECKING:
    import pyarrow

WORDS = "alignments"
NAME = "id"
_TEXT_KEYS = ("word", "text")
_KEYS = ("start", "end", "speaker")
_FORM = (
    "write a column of text with the JSON of a transcript, or of lists of "
    "{word, start, end, speaker}"
)


def require_package(package: str, path: Path, extra: str) -> None:
    """
    Raises:
        UserError: a package is not installed that the data at `path` need.
    """
    if find_spec(package) is None:
        raise UserError(
            f"{path} needs {package}, which is not installed. Install it with: "
            f"pip install 'moshi-ttt[{extra}]'"
        )


@contextmanager
def damage_of(what: str, remedy: str) -> Iterator[None]:
    """Turn all that pyarrow may say of a damaged table, and of text in it, into a `FileProblem`.

    Args:
        what: a clause, as "a.parquet cannot be read", to which the reason is added.
    """
    import pyarrow

    try:
        yield
    except (OSError, ValueError, LookupError, pyarrow.ArrowException) as error:
        raise FileProblem(f"{what} ({error})", remedy) from None


def names_of(table: "pyarrow.Table") -> list[str]:
    """Return what the rows of a table are called: by their column `id`, or by their numbers."""
    if NAME in table.column_names:
        return [str(name) for name in table.column(NAME).to_pylist()]
    return [str(row) for row in range(table.num_rows)]


def transcript_in(cell: Any, name: str) -> Transcript:
    """Return the words that a cell of the column `alignments` holds.

    Args:
        cell: as `as_py` gives it: JSON, a list of mappings, or a mapping of lists, which is how
            `datasets` kept these once.
        name: what messages call it.

    Raises:
        FileProblem: it is none of these.
    """
    if isinstance(cell, str):
        try:
            content = parse_json(cell)
        except ValueError as error:
            raise _malformed(name, f"is not valid JSON ({error})") from None
        return transcript_of({WORDS: content} if isinstance(content, list) else content, name)
    if isinstance(cell, dict):
        columns = list(cell.values())
        if not all(isinstance(column, list) for column in columns):
            raise _malformed(name, "is no list of words")
        cell = [dict(zip(cell, row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(cell, list):
        raise _malformed(name, "is empty" if cell is None else "is no list of words")
    return transcript_of({WORDS: [_alignment(entry, name) for entry in cell]}, name)


def _alignment(entry: Any, name: str) -> Any:
    """Return a word as a transcript has it; what is no mapping is left to who reads that."""
    if not isinstance(entry, dict):
        return entry
    text = next((entry[key] for key in _TEXT_KEYS if entry.get(key) is not None), None)
    missing = [key for key in _KEYS if entry.get(key) is None]
    if text is None or missing:
        keys = ["word", *missing] if text is None else missing
        raise _malformed(name, f"holds {json.dumps(entry)[:60]}, without {', '.join(keys)}")
    return [text, [entry["start"], entry["end"]], entry["speaker"]]


def _malformed(name: str, what: str) -> FileProblem:
    return FileProblem(f"{name} {what}", _FORM, code="transcript-malformed")
