"""Folders that a command makes go again where it fails before anything is in them."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_made: list[Path] = []
"""Outer ones first."""


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, where there are none.

    Raises:
        OSError: that is impossible.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    # Noted before: it may be possible for the outer ones alone.
    _made.extend(each.absolute() for each in reversed(missing))
    folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def without_empty_folders() -> Iterator[None]:
    """Remove the folders that were made in here and have nothing in them, if an error ends it.

    Who mends the mistake then finds everything as it was.
    """
    before = len(_made)
    try:
        yield
    except BaseException:
        for folder in reversed(_made[before:]):
            with suppress(OSError):  # something is in it, or it is gone
                folder.rmdir()
        raise
    finally:
        del _made[before:]
