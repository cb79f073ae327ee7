"""A run folder is locked, so that one run at a time writes to it."""

import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import IO, Any

from finetune.errors import UserError
from finetune.safety import parse_json

NAME = ".lock"

_TEXT_BYTES = 300
BEAT_SEC = 10.0
"""Between two signs of life in the file."""

WATCH_SEC = 25.0
"""How long the file of a process on another host must not change for it to count as dead."""


class RunLock:
    """Held by the first process of a run, as long as it lives.

    The operating system holds it (a POSIX record lock) and lets go of it when the process ends,
    also by `kill -9`; child processes do not inherit it. Network file systems pass such locks on to
    their server (NFS, and Lustre mounted with `flock`), or keep them to one host, or have none. So
    the file also says who holds it, and changes every 10 seconds.
    """

    def __init__(self, run_dir: Path, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._path = run_dir / NAME
        self._file: IO[str] | None = None
        self._released = threading.Event()
        self._beats = 0

    def take(self) -> None:
        """Take the lock, if this is not done; the folder exists.

        Raises:
            UserError: another process works in this folder.
        """
        if self._file is not None or not self._enabled:
            return
        while not self._take():
            pass  # whoever had it has removed the file meanwhile
        self._released.clear()
        self._beat()
        threading.Thread(target=self._keep_beating, name="run lock", daemon=True).start()

    @property
    def is_held(self) -> bool:
        return self._file is not None

    def _take(self) -> bool:
        """Return whether the lock taken is that of the file which is there now."""
        # The text of a process that lives must stay, so no mode of `open` will do.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        file = os.fdopen(os.open(self._path, flags, 0o666), "r+")
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

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def release(self) -> None:
        if self._file is not None:
            self._released.set()
            self._write({})
            self._file.close()
            self._file = None

    def _changes(self, file: IO[str]) -> bool:
        """Return whether somebody still writes into the file."""
        before, started_at = _read(file), time.monotonic()
        while time.monotonic() < started_at + WATCH_SEC:
            time.sleep(1.0)
            if _read(file) != before:
                return True
        return False

    def _keep_beating(self) -> None:
        while not self._released.wait(BEAT_SEC):
            self._beat()

    def _beat(self) -> None:
        # A count, not the time of day: a clock may stand still or jump.
        self._beats += 1
        self._write({"host": socket.gethostname(), "pid": os.getpid(), "beat": self._beats})

    def _write(self, holder: dict[str, Any]) -> None:
        # Only through this file: closing another one of the same name would drop the lock.
        assert self._file is not None
        self._file.seek(0)
        # In one piece, of one length: whoever reads meanwhile finds the old or the new.
        self._file.write(json.dumps(holder).ljust(_TEXT_BYTES))
        self._file.flush()

    def _refusal(self, holder: dict[str, Any]) -> UserError:
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        return UserError(
            f"run_dir: {self._path.parent} is in use by {who}. Stop that run first, or choose "
            f"another folder."
        )


def _read(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    try:
        holder = parse_json(file.read(_TEXT_BYTES))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}
