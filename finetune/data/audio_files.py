"""Audio files: on disk, or inside another file, as in a row of a table."""

import io
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import BinaryIO


class Embedded:
    """An audio file that lies inside another file.

    Args:
        name: what messages call it; no two are called the same.
        container: the file that it lies in.
        read: returns all its bytes.
    """

    def __init__(self, name: str, container: Path, read: Callable[[], bytes]) -> None:
        self.name = name
        self.container = container
        self._read = read

    def __str__(self) -> str:
        return self.name

    @cached_property
    def content(self) -> bytes:
        return self._read()


AudioFile = Path | Embedded


def opened(file: AudioFile) -> BinaryIO:
    """Open an audio file to read its bytes."""
    return file.open("rb") if isinstance(file, Path) else io.BytesIO(file.content)


def for_decoder(file: AudioFile) -> str | BinaryIO:
    """Return what soundfile and PyAV open: a name, or an open file where there is none."""
    return str(file) if isinstance(file, Path) else opened(file)


def num_bytes(file: AudioFile) -> int:
    """Return the size of an audio file."""
    return file.stat().st_size if isinstance(file, Path) else len(file.content)


def version_of(file: AudioFile) -> tuple[object, ...] | None:
    """Return what changes whenever a file does: by name, size and time of change, no file is read;
    None: it is not there."""
    on_disk = file if isinstance(file, Path) else file.container
    if (state := state_of(file)) is None:
        return None
    version: tuple[object, ...] = (os.path.abspath(on_disk), state)
    return version if isinstance(file, Path) else (*version, str(file))


def state_of(file: AudioFile) -> tuple[int, int] | None:
    """Return size and time of change of what a file lies in; None: it is not there."""
    try:
        status = os.stat(file if isinstance(file, Path) else file.container)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
