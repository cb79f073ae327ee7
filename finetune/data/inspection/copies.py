"""Files that hold the same bytes under another name, found without reading all of most files."""

import hashlib
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path

_NUM_PIECES = 8
_PIECE_BYTES = 2**12
_AT_ONCE_BYTES = 2**20

_Pair = tuple[list[Path], list[Path]]


def copies(files: Iterable[Path], originals: Iterable[Path]) -> dict[Path, Path]:
    """Return those of `files` that are, byte for byte, one of `originals` under another name, each
    with that one.

    Sizes are compared first, then some pieces of files of one size, and all of what is alike in
    these. What cannot be read is like nothing, and is said when it is inspected.
    """
    places = {os.path.realpath(each): each for each in originals}
    others = [each for each in dict.fromkeys(files) if os.path.realpath(each) not in places]
    alike: list[_Pair] = [(others, list(places.values()))]
    for look in (_size, _some, _all):
        alike = [part for pair in alike for part in _parts(pair, look)]
    return {each: same[0] for others, same in alike for each in others}


def _parts(pair: _Pair, look: Callable[[Path], Hashable]) -> Iterator[_Pair]:
    """Yield the files of both sides that look alike, kind by kind."""
    files, originals = pair
    kinds: dict[Hashable, _Pair] = {}
    for file in files:
        if seen := _seen(file, look):
            kinds.setdefault(seen, ([], []))[0].append(file)
    for file in originals if kinds else []:
        if (seen := _seen(file, look)) in kinds:
            kinds[seen][1].append(file)
    yield from (kind for kind in kinds.values() if kind[1])


def _seen(file: Path, look: Callable[[Path], Hashable]) -> Hashable:
    try:
        return look(file)
    except OSError:
        return None


def _size(file: Path) -> int:
    """Return the size; empty files are no copies of each other."""
    return file.stat().st_size


def _some(file: Path) -> bytes:
    digest = hashlib.sha256()
    last = max(0, file.stat().st_size - _PIECE_BYTES)
    with file.open("rb", buffering=0) as opened:
        for number in range(_NUM_PIECES):
            opened.seek(last * number // (_NUM_PIECES - 1))
            digest.update(opened.read(_PIECE_BYTES))
    return digest.digest()


def _all(file: Path) -> bytes:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(_AT_ONCE_BYTES):
            digest.update(piece)
    return digest.digest()
