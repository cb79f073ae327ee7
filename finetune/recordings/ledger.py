"""Results that are kept in a file as they come, so that work can be stopped and go on."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune.data import Recording
from finetune.kept import make_folder

logger = logging.getLogger(__name__)


class Ledger:
    """A file with a line for each result, written when the result is there.

    Lines of several processes may mix; a line that was cut off is nothing. What cannot be written
    is not kept, with a warning.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None
        self._results = dict(self._read())

    def __enter__(self) -> "Ledger":
        try:
            make_folder(self.path.parent)
            self._file = self.path.open("a", encoding="utf-8")
            self._file.write("\n")  # behind a line that was cut off
        except OSError as error:
            self._give_up(error)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()

    def get(self, key: str) -> Any:
        """Return a result, or None."""
        return self._results.get(key)

    def put(self, key: str, result: Any) -> None:
        """Keep a result: what JSON can hold."""
        self._results[key] = result
        if self._file is None:
            return
        try:
            self._file.write(json.dumps([key, result]) + "\n")
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._file = None
        logger.warning(
            "%s cannot be written (%s): what is found is not kept for another time; name a file "
            "that can be with --cache",
            self.path,
            error.strerror,
        )

    def _read(self) -> Iterator[tuple[str, Any]]:
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            return
        for line in lines:
            with suppress(ValueError, TypeError, RecursionError):
                key, result = json.loads(line)
                if isinstance(key, str):
                    yield key, result


def file_key(recording: Recording, *circumstances: object) -> str | None:
    """Return a key that changes with any file of a recording, by path, size and time of change, and
    with how its audio is read.

    Args:
        circumstances: what else a result depends on.

    Returns:
        None if a file is not there: nothing about it is to be kept.
    """
    audio = recording.audio_version()
    try:
        status = [os.stat(path) for path in recording.files]
    except OSError:
        return None
    if audio is None:
        return None
    files = [(each.st_size, each.st_mtime_ns) for each in status]
    known_by = audio, files, (*circumstances, *recording.words_version)
    digest = hashlib.blake2b(repr(known_by).encode(), digest_size=12)
    return digest.hexdigest()
