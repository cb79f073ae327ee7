"""What the check of the data found, remembered for files that have not changed since."""

import os
import struct
from pathlib import Path

from .audio import AudioInfo, inspect_audio
from .store import Store, make_key
from .text import MAIN_SPEAKER, read_transcript

_LENGTH = struct.Struct("<QQ")  # samples, rate


class FileChecks:
    """What the check at the start found, for files that have not changed since."""

    def __init__(self, store: Store | None) -> None:
        self._store = store

    def audio_info(self, path: Path) -> AudioInfo:
        """As `inspect_audio`."""
        key = _file_key("recording", path)
        known = self._store.get(key) if self._store and key else None
        if known is not None:
            return AudioInfo(*_LENGTH.unpack(known))
        info = inspect_audio(path)
        if self._store and key:
            self._store.put(key, _LENGTH.pack(info.num_samples, info.sample_rate_hz))
        return info

    def lacks_main_speaker(self, path: Path) -> bool:
        """Return whether a transcript holds words, but none of Moshi; raises as
        `read_transcript`."""
        key = _file_key("transcript", path)
        known = self._store.get(key) if self._store and key else None
        if known is not None:
            return known[0] == 1
        words = read_transcript(path)
        lacks = bool(words) and all(word.speaker != MAIN_SPEAKER for word in words)
        if self._store and key:
            self._store.put(key, bytes([lacks]) * 16)
        return lacks

    def flush(self) -> None:
        if self._store:
            self._store.flush()


def _file_key(kind: str, path: Path) -> bytes | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return make_key(kind, os.path.abspath(path), status.st_size, status.st_mtime_ns)
