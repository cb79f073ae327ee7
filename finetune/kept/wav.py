"""WAVs that are there as a whole or not at all, however long: they are written piece by piece."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import UserError
from finetune.kept.folders import make_folder
from finetune.kept.whole import writing

if TYPE_CHECKING:
    import numpy as np


class WavWriter:
    """A WAV beside its place, which goes there when it is kept. All calls raise a `UserError` that
    says why the system did not write.

    Args:
        subtype: of soundfile: `PCM_16` or `FLOAT`.
    """

    def __init__(
        self,
        path: Path,
        sample_rate_hz: int,
        channels: int,
        *,
        subtype: str = "PCM_16",
        comment: str = "",
    ) -> None:
        # Not all who keep files have to do with sound.
        import soundfile

        self.path = path
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        with writing(path):
            make_folder(path.parent)
            self._disk = _Disk(self._partial)
        try:
            self._file = soundfile.SoundFile(
                self._disk, "w", sample_rate_hz, channels, subtype, format="WAV"
            )
            if comment:
                self._file.comment = comment
        except BaseException:
            self._disk.close()
            self._partial.unlink(missing_ok=True)
            raise

    def write(self, samples: np.ndarray) -> None:
        """Write [samples] or [samples, channels]."""
        with writing(self.path):
            try:
                self._file.write(samples)
            finally:
                self._disk.check()

    def keep(self) -> None:
        """Put the WAV in its place: it is whole."""
        with writing(self.path):
            try:
                self._close()
                self._partial.replace(self.path)
            finally:
                self._partial.unlink(missing_ok=True)

    def discard(self) -> None:
        """Leave nothing of it; after `keep` this does nothing."""
        try:
            with writing(self.path):
                self._close()
        except UserError:
            pass  # what is thrown away need not be whole
        self._partial.unlink(missing_ok=True)

    def _close(self) -> None:
        try:
            self._file.close()
        finally:
            self._disk.close()
            self._disk.check()


def write_wav(
    path: Path,
    samples: np.ndarray,
    sample_rate_hz: int,
    *,
    subtype: str = "PCM_16",
    comment: str = "",
) -> None:
    """Write a WAV of [samples] or [samples, channels].

    Raises:
        UserError: it cannot be written.
    """
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    file = WavWriter(path, sample_rate_hz, channels, subtype=subtype, comment=comment)
    try:
        file.write(samples)
        file.keep()
    finally:
        file.discard()


class _Disk:
    """A file as soundfile writes it, which knows why writing failed: soundfile does not."""

    def __init__(self, path: Path) -> None:
        # Without a buffer, whose rest would be written again when the file is closed.
        self._file = path.open("w+b", buffering=0)
        self._error: OSError | None = None
        self.seek, self.tell = self._file.seek, self._file.tell

    def write(self, data: bytes) -> int:
        left = memoryview(data)
        try:
            while left and self._error is None:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._error = error
        return len(data) - len(left)

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            self._error = self._error or error

    def check(self) -> None:
        """Raise what has gone wrong, in the place of what soundfile makes of it."""
        if self._error is not None:
            raise self._error
