"""`.npz` files, read by threads side by side.

`numpy.load` has Python's own parser read an array's header, and in Python 3.11 threads that parse
at one time may end in "AST constructor recursion depth mismatch" (CPython issue 106905). Triton
parses too, on the main thread, while another reads the next batch.
"""

import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

_SUFFIX = ".npy"
_TYPE = re.compile(r"'descr': '([<>|=]?[a-zA-Z]\d*)'")
_ORDER = re.compile(r"'fortran_order': (True|False)")
_SHAPE = re.compile(r"'shape': \(((?:\d+, ?)*\d*)\)")


class Header(NamedTuple):
    """An array is described by the header before its values."""

    shape: tuple[int, ...]
    dtype: np.dtype
    is_fortran_order: bool


def read_headers(path: Path) -> dict[str, Header]:
    """Return the header of each array, by name.

    Raises:
        OSError, ValueError, zipfile.BadZipFile: the file cannot be read, or is no `.npz`.
    """
    found = {}
    with _opened(path) as archive:
        for member in archive.namelist():
            if member.endswith(_SUFFIX):
                with archive.open(member) as file:
                    found[member.removesuffix(_SUFFIX)] = _read_header(file)
    return found


def read_array(path: Path, name: str) -> np.ndarray:
    """Return an array of the file.

    Raises:
        KeyError: there is none of this name.
        OSError, ValueError, zipfile.BadZipFile: the file cannot be read, or is no `.npz`.
    """
    with _opened(path) as archive, archive.open(name + _SUFFIX) as file:
        header = _read_header(file)
        values = np.frombuffer(file.read(), header.dtype)
        return values.reshape(header.shape, order="F" if header.is_fortran_order else "C")


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive, in which every fault is one of those that are promised: `zipfile` lets
    through what comes from under it."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zlib.error, EOFError) as error:
        raise ValueError(f"it is damaged: {error or 'it was cut off'}") from None
    except RuntimeError as error:
        # So `zipfile` answers archives that are locked, or packed in a way that it does not know.
        raise ValueError(f"it is damaged, or was not written by numpy: {error}") from None


def _read_header(file: IO[bytes]) -> Header:
    """Read to where an array's values begin (NEP 1 of numpy describes the format)."""
    major, _ = np.lib.format.read_magic(file)
    num_bytes = int.from_bytes(file.read(2 if major == 1 else 4), "little")
    text = file.read(num_bytes).decode("latin1")
    matches = [pattern.search(text) for pattern in (_ORDER, _SHAPE)]
    if not all(matches):
        raise ValueError(f"{text.strip()!r} is not the header of an array")
    order, shape = (match[1] for match in matches if match)
    sizes = tuple(int(size) for size in shape.split(",") if size.strip())
    dtype = _TYPE.search(text)
    try:
        # Without one, each value has several parts: it is a number of no type.
        return Header(sizes, np.dtype(dtype[1] if dtype else "V"), order == "True")
    except TypeError as error:
        raise ValueError(f"{text.strip()!r} is not the header of an array: {error}") from None
