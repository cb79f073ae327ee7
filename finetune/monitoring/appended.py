"""A file that grows line by line, and waits where the disk is full."""

import errno
import logging
from pathlib import Path

logger = logging.getLogger(__name__)

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def is_full(error: OSError) -> bool:
    """Return whether an error says that the disk is full, or what a user may take of it."""
    return error.errno in _FULL


class AppendedLines:
    """Lines that are in the file after every `append`, if there is room for them.

    Where there is none, as while a checkpoint is written, they are kept and written with a later
    one: a run of hours does not end for a line. `close` raises `OSError` if there still is no room.

    Args:
        path: the file; made if there is none.
        is_new: whether what is in it goes.
    """

    def __init__(self, path: Path, *, is_new: bool) -> None:
        self.path = path
        # Unbuffered, so that what has been written is known.
        self._file = path.open("wb" if is_new else "ab", buffering=0)
        self._waiting = b""

    def append(self, line: str) -> None:
        """
        Raises:
            OSError: it cannot be written, for another reason than a full disk.
        """
        was_waiting = self.is_waiting
        self._waiting += line.encode(errors="backslashreplace") + b"\n"
        try:
            self._write()
        except OSError as error:
            if not is_full(error):
                raise
            if not was_waiting:
                logger.warning(
                    "%s: %s. Its lines are kept until there is room, and training goes on.",
                    self.path,
                    error.strerror,
                )
        else:
            if was_waiting:
                logger.info("%s: there is room again, and no line is missing", self.path)

    @property
    def is_waiting(self) -> bool:
        """Return whether lines are kept for which there was no room."""
        return bool(self._waiting)

    def close(self) -> None:
        try:
            self._write()
        finally:
            self._file.close()

    def _write(self) -> None:
        while self._waiting:
            # It may take a part of them, up to the last free byte.
            self._waiting = self._waiting[self._file.write(self._waiting) :]
