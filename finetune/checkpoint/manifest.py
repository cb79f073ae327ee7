"""The list of a checkpoint's files, with sizes and checksums: no part of it can be missing or
altered without being noticed."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from finetune.safety import read_json, stays_inside

NAME = "manifest.json"

_PIECE_BYTES = 2**20

Entries = dict[str, dict[str, Any]]
"""By path in the folder: `bytes` and `sha256`."""


def describe(folder: Path, files: Iterable[Path]) -> Entries:
    """Entries of files that have been written."""
    return {
        file.relative_to(folder).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": _checksum(file),
        }
        for file in files
    }


def write(folder: Path, entries: Entries) -> None:
    (folder / NAME).write_text(
        json.dumps(dict(sorted(entries.items())), indent=1) + "\n", encoding="utf-8"
    )


def read(folder: Path) -> Entries:
    """
    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is damaged, or another program's.
    """
    entries = read_json(folder / NAME)
    if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
        raise ValueError("what it holds is no list of files")
    if outside := [name for name in entries if not stays_inside(name)]:
        raise ValueError(f"it names {outside[0]!r}, which is not in its folder")
    return entries


def _is_entry(described: object) -> bool:
    return isinstance(described, dict) and {"bytes", "sha256"} <= described.keys()


def is_own(folder: Path) -> bool:
    """Return whether the file of this name is a list as `describe` makes it; others may have it."""
    try:
        read(folder)
    except (OSError, ValueError):
        return False
    return True


def is_whole(folder: Path) -> bool:
    """Return whether all files are there, in their sizes; their contents are not read."""
    try:
        entries = read(folder)
        return all((folder / n).stat().st_size == e["bytes"] for n, e in entries.items())
    except (OSError, ValueError):
        return False


def first_problem(
    folder: Path, *, chosen: Callable[[list[str]], Iterable[str]] = iter
) -> str | None:
    """Return what is wrong with the folder, in words that begin with the file; None: nothing.

    Args:
        chosen: returns, of the names of all files in order, those to read.
    """
    try:
        entries = read(folder)
        for name in chosen(sorted(entries)):
            file = folder / name
            if not file.is_file():
                return f"{file} is missing, so the checkpoint is damaged"
            if file.stat().st_size != entries[name]["bytes"]:
                return f"{file} is damaged (it was {entries[name]['bytes']} bytes long)"
            if _checksum(file) != entries[name]["sha256"]:
                return f"{file} is damaged (its checksum is not that in {NAME})"
    except FileNotFoundError:
        return f"{folder / NAME} is missing, so the checkpoint is damaged"
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        return f"{folder / NAME} is damaged, or cannot be read: {why}"
    return None


def _checksum(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
