"""A folder that keeps small things for good, shared by any number of processes.

Every process appends to two files of its own, NAME.index and NAME.blobs, and reads everybody's.
Nothing is ever changed or renamed, so no lock is needed: it works on network file systems, where
the locks of SQLite and LMDB do not, and with a few files however many segments there are. A blob
is written before its index entry; a process that is killed in between leaves bytes that nobody
refers to. Entries and blobs have checksums; what is damaged counts as missing.
"""

import hashlib
import logging
import os
import socket
import struct
import threading
import time
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from finetune.errors import UserError
from finetune.kept import make_folder

logger = logging.getLogger(__name__)

_ENTRY = struct.Struct("<16s16sI")  # key, value, checksum of both
_PLACE = struct.Struct("<QII")  # a blob's offset, length and checksum: the value of its key
_REFRESH_SEC = 30.0
_PENDING_BYTES = 2**16
_MAX_WARNINGS = 5


class DamagedBlob(Exception):
    """A blob that is not what was written."""


class Blob(NamedTuple):
    """Place of a blob; any process can read it."""

    path: Path
    offset: int
    num_bytes: int
    checksum: int
    key: bytes

    def read(self) -> bytes:
        """
        Raises:
            DamagedBlob: the file is gone, too short, or its bytes have changed.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.num_bytes)
        except OSError as error:
            raise DamagedBlob(f"{self.path} cannot be read ({error.strerror})") from None
        if len(content) < self.num_bytes:
            raise DamagedBlob(f"{self.path} is too short")
        if _checksum(self.key, content) != self.checksum:
            raise DamagedBlob(f"{self.path} has changed at byte {self.offset}")
        return content


class Store:
    """Two kinds of things by 16-byte keys: values of 16 bytes, and blobs of any length.

    Within a process several threads may use it.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            UserError: the folder cannot be made or read.
        """
        self.folder = folder
        try:
            make_folder(folder)
            os.listdir(folder)
        except OSError as error:
            raise UserError(
                f"data.cache_dir: {folder} cannot be used ({error.strerror}). Name a folder that "
                "can be written, or set data.cache_dir to null to do without."
            ) from error
        self._lock = threading.RLock()
        self._values: dict[bytes, tuple[str, bytes]] = {}
        self._num_read_bytes: dict[str, int] = {}
        self._own: _Writer | None = None
        self.write_error: OSError | None = None
        """Why nothing can be written any more."""
        self.num_appended = 0
        """Blobs that this process has written."""
        self._num_damaged = 0
        self._refreshed_at = -_REFRESH_SEC
        self.refresh()

    @property
    def can_write(self) -> bool:
        """Return whether nothing has failed so far."""
        return self.write_error is None

    def get(self, key: bytes) -> bytes | None:
        """The value of `key`."""
        entry = self._values.get(key)
        return None if entry is None else entry[1]

    def put(self, key: bytes, value: bytes) -> None:
        """Keep a value of 16 bytes. It is on disk after the next blob, or `flush`."""
        with self._lock:
            writer = self._writer()
            self._values[key] = ("" if writer is None else writer.name, value)
            if writer is not None:
                writer.pending += _entry(key, value)
                if len(writer.pending) >= _PENDING_BYTES:
                    self.flush()

    def find(self, key: bytes) -> Blob | None:
        """Return where the blob of `key` is."""
        entry = self._values.get(key)
        if entry is None:
            return None
        name, value = entry
        offset, num_bytes, checksum = _PLACE.unpack(value)
        return Blob(self.folder / f"{name}.blobs", offset, num_bytes, checksum, key)

    def append(self, key: bytes, content: bytes) -> None:
        """Keep a blob. On a full disk, and the like, this warns once and does nothing."""
        with self._lock:
            writer = self._writer()
            if writer is None:
                return
            try:
                if writer.blobs is None:
                    writer.blobs = writer.open("blobs")
                place = _PLACE.pack(writer.num_bytes, len(content), _checksum(key, content))
                _write(writer.blobs, content)
                writer.num_bytes += len(content)
            except OSError as error:
                self._stop_writing(error)
                return
            self.put(key, place)
            self.flush()
            self.num_appended += self.can_write

    def flush(self) -> None:
        """Write all values to disk, for other processes to see."""
        with self._lock:
            if self._own is not None and self._own.pending and self.can_write:
                try:
                    _write(self._own.index, bytes(self._own.pending))
                except OSError as error:
                    self._stop_writing(error)
                self._own.pending.clear()

    def report_damage(self, blob: Blob, problem: str) -> None:
        """Forget a blob that turned out to be damaged, and warn."""
        with self._lock:
            self._values.pop(blob.key, None)
            self._num_damaged += 1
            if self._num_damaged <= _MAX_WARNINGS:
                last = " (not said again)" if self._num_damaged == _MAX_WARNINGS else ""
                logger.warning("data.cache_dir: %s; what it held is made again%s", problem, last)

    def refresh(self, *, at_once: bool = False) -> None:
        """Read what other processes have written since the last time; not more often than every
        half minute unless `at_once`."""
        with self._lock:
            if not at_once and time.monotonic() < self._refreshed_at + _REFRESH_SEC:
                return
            self._refreshed_at = time.monotonic()
            # Their names begin with the time: where a key was written twice, the later one counts.
            for path in sorted(self.folder.glob("*.index")):
                if self._own is None or path.stem != self._own.name:
                    self._read_index(path)

    def _read_index(self, path: Path) -> None:
        start = self._num_read_bytes.get(path.stem, 0)
        try:
            if path.stat().st_size < start + _ENTRY.size:
                return
            with path.open("rb") as file:
                file.seek(start)
                content = file.read()
        except OSError as error:
            logger.warning("data.cache_dir: %s cannot be read (%s)", path, error.strerror)
            return
        num_entries = num_good = num_damaged = 0
        # What is left of the last entry is being written, or was when its process was killed.
        end = len(content) - len(content) % _ENTRY.size
        for number, (key, value, checksum) in enumerate(_ENTRY.iter_unpack(content[:end]), 1):
            if zlib.crc32(key + value) == checksum:
                self._values[key] = (path.stem, value)
                num_good += 1
                # Damaged are those before a good one. On a network file system what was just
                # appended may look like zeros for a moment: what is last is read again next time.
                num_entries, num_damaged = number, number - num_good
        self._num_read_bytes[path.stem] = start + num_entries * _ENTRY.size
        if num_damaged:
            logger.warning(
                "data.cache_dir: %s is damaged; what %d of its entries held is made again",
                path,
                num_damaged,
            )

    def _writer(self) -> "_Writer | None":
        """The files of this process, made when there is something to write."""
        if self._own is None and self.can_write:
            try:
                if not self._num_read_bytes:
                    # It was empty: a run that has made it too, and has failed, may have removed it.
                    make_folder(self.folder)
                self._own = _Writer(self.folder)
            except OSError as error:
                self._stop_writing(error)
        return self._own if self.can_write else None

    def _stop_writing(self, error: OSError) -> None:
        self.write_error = error
        logger.warning(
            "data.cache_dir: %s cannot be written (%s). Going on without: what is not in it yet is "
            "made again in the next run",
            self.folder,
            error.strerror,
        )


class _Writer:
    """The two files that belong to this process; the second is made when there is a blob."""

    def __init__(self, folder: Path) -> None:
        host = "".join(c if c.isalnum() else "-" for c in socket.gethostname())
        self.name = f"{time.time_ns():020d}-{host}-{os.getpid()}"
        self._folder = folder
        self.index = self.open("index")
        self.blobs: BinaryIO | None = None
        self.num_bytes = 0
        self.pending = bytearray()

    def open(self, kind: str) -> BinaryIO:
        return (self._folder / f"{self.name}.{kind}").open("xb", buffering=0)


def make_key(*parts: object) -> bytes:
    """A 16-byte key of anything whose `repr` says all."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def _entry(key: bytes, value: bytes) -> bytes:
    return _ENTRY.pack(key, value, zlib.crc32(key + value))


def _checksum(key: bytes, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(key))


def _write(file: BinaryIO, content: bytes) -> None:
    """Write all of it, or raise OSError: an unbuffered write may stop in the middle when a disk
    runs full."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]
