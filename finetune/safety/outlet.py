"""Text leaves the program by standard output and error, whatever they are connected to.

They may be closed, a pipe that nobody reads any more, a terminal that is gone, or one that knows
ASCII alone. None of this may end a run, or let what C code prints land in a file of the run.
"""

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from finetune.safety.secrets import redact


class Outlet(io.TextIOBase):
    """A text stream that hides secrets and, when nobody listens any more, falls silent."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_lost = False
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        if not self._is_lost:
            try:
                self._stream.write(redact(text))
            except (OSError, ValueError):  # ValueError: it is closed
                self._lose()
        return len(text)

    def flush(self) -> None:
        if not self._is_lost:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._lose()

    def isatty(self) -> bool:
        return not self._is_lost and not self._stream.closed and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> Any:  # type: ignore[override]
        return self._stream.encoding

    @property
    def errors(self) -> Any:  # type: ignore[override]
        return self._stream.errors

    @property
    def buffer(self) -> Any:
        return self._stream.buffer

    def _lose(self) -> None:
        self._is_lost = True
        try:
            # What is still in the buffer would fail once more when Python ends.
            descriptor = self._stream.fileno()
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, descriptor)
            os.close(nothing)
        except (OSError, ValueError):
            pass  # it is no file of the system


def fill_standard_descriptors() -> None:
    """Have descriptors 0, 1 and 2 lead somewhere: where they are closed, the next file that is
    opened takes their place, and gets whatever C code prints."""
    for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            nothing = os.open(os.devnull, flags)
            if nothing != descriptor:
                os.dup2(nothing, descriptor)
                os.close(nothing)
            os.set_inheritable(descriptor, True)
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, closefd=False)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


class _WithLevel(logging.Formatter):
    """The format of commands that keep no log: `warning: …`, as `setup_logging` has it."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {super().format(record)}"


@contextmanager
def outlets() -> Iterator[None]:
    """Standard output and error as `Outlet`, for the length of a command."""
    fill_standard_descriptors()
    # It warns of folders that are not its own, and that it is busy: nothing that a user can mend.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_WithLevel())
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Outlet(sys.stdout), Outlet(sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
