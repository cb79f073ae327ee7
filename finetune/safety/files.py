"""Files that may come from somebody else: read without running anything, and without leaving the
folder that they belong to. docs/security.md says what is trusted."""

import json
import math
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError, safe_open

MAX_TEXT_BYTES = 2**28


def stays_inside(name: str) -> bool:
    """Return whether a name in a file leads to something in the folder of that file, by its letters
    alone: links that the owner of the folder has put there are his own business."""
    parts = PurePosixPath(name).parts
    return (
        bool(parts)
        and "\0" not in name
        and ".." not in parts
        and not PurePosixPath(name).is_absolute()
        and not PureWindowsPath(name).drive
    )


def is_recording_name(name: str) -> bool:
    """Return whether a line of data may name a recording so: in the folder of the file, or, as an
    absolute path, anywhere. A recording is only ever read as audio."""
    if PurePosixPath(name).is_absolute():
        return "\0" not in name
    return stays_inside(name)


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; all that can be wrong is a ValueError: it nests too deep, or has numbers of more
    digits than Python converts, for example."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deep") from None


_NO_NUMBERS = ("NaN", "Infinity", "-Infinity")


def without_nan(value: Any, *, as_text: bool = False) -> Any:
    """Return a value fit for a JSON file, which has no NaN and no infinity: null, or their names as
    text."""
    if isinstance(value, dict):
        return {key: without_nan(each, as_text=as_text) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each, as_text=as_text) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        name = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return name if as_text else None
    return value


def with_nan(value: Any) -> Any:
    """Back from `without_nan(…, as_text=True)`."""
    if isinstance(value, dict):
        return {key: with_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [with_nan(each) for each in value]
    return float(value) if isinstance(value, str) and value in _NO_NUMBERS else value


def read_json(path: Path) -> Any:
    """
    Raises:
        OSError, ValueError: it cannot be read, is larger than any such file, or is no JSON.
    """
    return parse_json(_bytes_of(path))


def read_text(path: Path) -> str:
    """Return the text of a user's file in UTF-8 or UTF-16, with a byte order mark or without;
    gzipped or not.

    Raises:
        OSError, ValueError: it cannot be read, is larger than any such file, or is no text.
    """
    content = _bytes_of(path)
    return decode_text(_gunzip(content) if content[:2] == b"\x1f\x8b" else content)


def decode_text(content: bytes) -> str:
    """Return the text that bytes are, in UTF-8 or UTF-16, with a byte order mark or without.

    Raises:
        ValueError: they are no such text.
    """
    try:
        return content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {error.start} is neither UTF-8 nor UTF-16; save it as UTF-8"
        ) from None


def _bytes_of(path: Path) -> bytes:
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise ValueError(f"it is larger than {MAX_TEXT_BYTES / 2**20:.0f} MiB")
    return path.read_bytes()


def _gunzip(content: bytes) -> bytes:
    unpacking = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        text = unpacking.decompress(content, MAX_TEXT_BYTES)
    except zlib.error as error:
        raise ValueError(f"it is a damaged gzip file: {error}") from None
    if unpacking.unconsumed_tail:
        raise ValueError(f"it unpacks to more than {MAX_TEXT_BYTES / 2**20:.0f} MiB")
    if not unpacking.eof:
        raise ValueError("it is a gzip file that was cut off")
    return text


def safetensors_problem(path: Path) -> str | None:
    """Why a file is no safetensors file; None: it is one. Other formats of weights are pickles,
    which can run any code."""
    try:
        with safe_open(path, "pt"):
            return None
    except (OSError, SafetensorError) as error:
        return f"it is no safetensors file, and weights are read from no other: {error}"
