"""What one process at a time may change is locked: a run folder, the file of a conversation."""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from finetune.errors import UserError
from finetune.kept.folders import make_folder
from finetune.safety import parse_json

logger = logging.getLogger(__name__)

_TEXT_BYTES = 300
BEAT_SEC = 10.0
"""Between two signs of life in the file."""

WATCH_SEC = 25.0
"""How long the file of a process on another host must not change for it to count as dead."""


class FileLock:
    """Held by one process, as long as it lives.

    The operating system holds it (a POSIX record lock) and lets go of it when the process ends,
    also by `kill -9`; child processes do not inherit it. Network file systems pass such locks on to
    their server (NFS, and Lustre mounted with `flock`), or keep them to one host, or have none. So
    the file also says who holds it, and changes every 10 seconds.

    Args:
        path: the file that is locked, which is there for nothing else.
        held: what the lock is for, for messages: an option and what it names.
        remedy: what to do where another process holds it.
        is_removed: the file goes when it is released.
    """

    def __init__(
        self,
        path: Path,
        held: str,
        remedy: str,
        *,
        enabled: bool = True,
        is_removed: bool = False,
    ) -> None:
        self._enabled = enabled
        self._path, self._held, self._remedy = path, held, remedy
        self._is_removed = is_removed
        self._file: BinaryIO | None = None
        self._released = threading.Event()
        self._beating: threading.Thread | None = None
        self._beats = 0

    def take(self) -> None:
        """Take the lock, if this is not done; the folder exists.

        Raises:
            UserError: another process holds it.
            OSError: the file cannot be written; if it is on a full disk, the lock is held.
        """
        if self._file is not None or not self._enabled:
            return
        while not self._take():
            pass  # whoever had it has removed the file meanwhile
        self._released.clear()
        self._beat()
        self._beating = threading.Thread(target=self._keep_beating, name="lock", daemon=True)
        self._beating.start()

    @property
    def is_held(self) -> bool:
        return self._file is not None

    def _take(self) -> bool:
        """Return whether the lock taken is that of the file which is there now."""
        # The text of a process that lives must stay, so no mode of `open` will do.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        # No buffer: what could not be written would be tried again when the file is closed.
        file = os.fdopen(os.open(self._path, flags, 0o666), "r+b", buffering=0)
        try:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._refusal(_read(file)) from None
            except OSError:
                pass  # a file system without locks: what the file says must do
            holder = _read(file)
            if holder.get("host") not in (None, socket.gethostname()) and self._changes(file):
                raise self._refusal(holder)
            if not (
                self._path.exists()
                and os.path.samestat(os.fstat(file.fileno()), os.stat(self._path))
            ):
                file.close()
                return False
        except BaseException:
            file.close()
            raise
        self._file = file
        return True

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def release(self) -> None:
        if self._file is None:
            return
        self._released.set()
        # A signal may have come before it was started.
        if self._beating is not None and self._beating.is_alive():
            self._beating.join()  # its last beat must not come after the lock is let go
        self._beating = None
        # On a full disk the file keeps what it says; that it does not change any more is enough.
        with suppress(OSError):
            self._path.unlink() if self._is_removed else self._write({})
        self._file.close()
        self._file = None

    def _changes(self, file: BinaryIO) -> bool:
        """Return whether somebody still writes into the file."""
        before, started_at = _read(file), time.monotonic()
        logger.info(
            "%s was in use on host %s: looking for %d s whether it still is",
            self._path,
            before.get("host"),
            WATCH_SEC,
        )
        while time.monotonic() < started_at + WATCH_SEC:
            time.sleep(1.0)
            if _read(file) != before:
                return True
        return False

    def _keep_beating(self) -> None:
        failed = False
        while not self._released.wait(BEAT_SEC):
            try:
                self._beat()
            except OSError as error:
                # It may work again, when there is room: to end would leave nothing locked.
                if not failed:
                    logger.warning(
                        "cannot write to %s (%s): a process on another host may take this one for "
                        "dead, and what it locks, until that is possible again",
                        self._path,
                        error.strerror or error,
                    )
                failed = True
            else:
                failed = False

    def _beat(self) -> None:
        # A count, not the time of day: a clock may stand still or jump.
        self._beats += 1
        self._write({"host": socket.gethostname(), "pid": os.getpid(), "beat": self._beats})

    def _write(self, holder: dict[str, Any]) -> None:
        # Only through this file: closing another one of the same name would drop the lock.
        assert self._file is not None
        # In one piece, of one length: whoever reads meanwhile finds the old or the new.
        text = json.dumps(holder).ljust(_TEXT_BYTES).encode()
        if os.pwrite(self._file.fileno(), text, 0) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _refusal(self, holder: dict[str, Any]) -> UserError:
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        return UserError(f"{self._held} is in use by {who}. {self._remedy}")


@contextmanager
def held_folder(folder: Path, key: str) -> Iterator[None]:
    """Hold a folder that one process at a time may fill; it is made if there is none.

    Args:
        key: the option that names it, for messages.

    Raises:
        UserError: another process fills it, or it cannot be written to.
    """
    remedy = "Wait until that has ended, or name another folder."
    lock = FileLock(folder / ".lock", f"{key}: {folder}", remedy, is_removed=True)
    with lock:
        try:
            make_folder(folder)
            lock.take()
        except OSError as error:
            raise UserError(
                f"{key}: cannot write to {folder}: {error.strerror or error}."
            ) from error
        yield


def _read(file: BinaryIO) -> dict[str, Any]:
    try:
        holder = parse_json(os.pread(file.fileno(), _TEXT_BYTES, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}
