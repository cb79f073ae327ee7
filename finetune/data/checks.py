"""The inspection of recordings, remembered for those that have not changed since."""

import dataclasses
import json
import os
import struct
from pathlib import Path

from finetune.data.codes import ReadCodes
from finetune.data.inspection import VERSION, Finding, Inspection
from finetune.data.recording import Recording
from finetune.data.store import DamagedBlob, Store, make_key
from finetune.data.text import TextEncoder

_CLEAN = struct.Struct("<dII")  # duration, rate, channels


class Checks:
    """Inspects recordings; those without an error are not opened again until they change."""

    def __init__(
        self,
        store: Store | None,
        text: TextEncoder | None = None,
        reads: ReadCodes | None = None,
    ) -> None:
        self._store = store
        self._text = text
        self._reads = reads
        self._fingerprint = text.fingerprint if store is not None and text is not None else None

    def inspect(self, recording: Recording) -> Inspection:
        """Inspect a recording as `Recording.inspect` does, the fast part."""
        key = self._key(recording) if self._store is not None else None
        if self._store is None or key is None:
            return recording.inspect(text=self._text, reads=self._reads)
        # Most have no finding: a value of 16 bytes says all.
        if (known := self._store.get(key)) is not None:
            return Inspection(recording.path, *_CLEAN.unpack(known))
        with_findings = make_key("findings", key)
        if (blob := self._store.find(with_findings)) is not None:
            try:
                return _unpacked(blob.read())
            except DamagedBlob as damage:
                self._store.report_damage(blob, str(damage))
        inspection = recording.inspect(text=self._text, reads=self._reads)
        if not inspection.findings:
            found = inspection.duration_sec, inspection.sample_rate_hz, inspection.num_channels
            self._store.put(key, _CLEAN.pack(*found))
        elif not inspection.errors:
            self._store.append(with_findings, _packed(inspection))
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
        others = recording.words_version
        if recording.has_codes and self._reads is not None:
            others += (self._reads.num_codebooks, self._reads.num_codes)
        return make_key("inspected", VERSION, audio, files, promised, self._fingerprint, *others)


def _packed(inspection: Inspection) -> bytes:
    return json.dumps(dataclasses.asdict(inspection), default=str).encode()


def _unpacked(content: bytes) -> Inspection:
    fields = json.loads(content)
    findings = [Finding(*each) for each in fields.pop("findings")]
    return Inspection(Path(fields.pop("path")), findings=findings, **fields)
