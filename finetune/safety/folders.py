"""Recordings in a folder, at any depth."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

AUDIO_SUFFIXES = frozenset(
    {".wav", ".wave", ".flac", ".ogg", ".oga", ".aif", ".aiff", ".aifc"}
    | {".mp3", ".m4a", ".aac", ".opus", ".webm", ".mp4", ".wma"}
)


def find_files(folder: Path, suffixes: Iterable[str]) -> tuple[list[Path], list[Path]]:
    """Return the files of a folder at any depth with one of these endings, in order, and those that
    were passed over because they are hidden.

    A name that begins with a dot hides a file, or all that is in a folder. macOS leaves files
    `._NAME` beside the true ones.
    """
    suffixes = {suffix.lower() for suffix in suffixes}
    found: list[Path] = []
    hidden: list[Path] = []
    for path in all_files(folder):
        if path.suffix.lower() in suffixes:
            (hidden if path.name.startswith(".") else found).append(path)
    return sorted(found), hidden


def kind_of(path: Path) -> str:
    """Return what a file is by its name, `recording`, `list of recordings` or `configuration`;
    nothing for all others, for folders, and where nothing is."""
    if not path.is_file():
        return ""
    if path.suffix.lower() in AUDIO_SUFFIXES:
        return "recording"
    if path.name.lower().endswith((".jsonl", ".jsonl.gz")):
        return "list of recordings"
    return "configuration" if path.suffix.lower() in (".yaml", ".yml") else ""


def all_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder at any depth, also in folders that links lead to, but not in
    hidden ones. A link to a folder that it lies in leads round for ever, and is not followed."""
    for place, folders, names in os.walk(folder, followlinks=True):
        above = [Path(place), *Path(place).parents]
        around = {each.resolve() for each in above if each.is_relative_to(folder)}
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and not (os.path.islink(Path(place, name)) and Path(place, name).resolve() in around)
        )
        yield from (Path(place, name) for name in sorted(names))
