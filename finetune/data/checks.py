"""The inspection of recordings, remembered for those that have not changed since."""

import os
import struct

from .inspection import VERSION, Inspection
from .recording import Recording
from .store import Store, make_key
from .text import TextEncoder

_FOUND = struct.Struct("<dII")  # duration, rate, channels


class Checks:
    """Inspects recordings; those without a finding are not opened again until they change."""

    def __init__(self, store: Store | None, text: TextEncoder | None = None) -> None:
        self._store = store
        self._text = text
        self._fingerprint = text.fingerprint if store is not None and text is not None else None

    def inspect(self, recording: Recording) -> Inspection:
        """As `Recording.inspect`, the fast part."""
        key = self._key(recording)
        known = self._store.get(key) if self._store is not None and key is not None else None
        if known is not None:
            return Inspection(recording.path, *_FOUND.unpack(known))
        inspection = recording.inspect(text=self._text)
        if self._store is not None and key is not None and not inspection.findings:
            found = inspection.duration_sec, inspection.sample_rate_hz, inspection.num_channels
            self._store.put(key, _FOUND.pack(*found))
        return inspection

    def flush(self) -> None:
        """Let other processes see what was found."""
        if self._store is not None:
            self._store.flush()

    def _key(self, recording: Recording) -> bytes | None:
        audio = recording.audio_version()
        if audio is None:
            return None
        try:
            status = [os.stat(path) for path in recording.files]
        except OSError:
            return None
        files = [(each.st_size, each.st_mtime_ns) for each in status]
        promised = recording.duration_sec
        return make_key("inspected", VERSION, audio, files, promised, self._fingerprint)
