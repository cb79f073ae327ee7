"""Codes kept on disk (`data.cache_dir`).

Codes are kept by what they depend on: the samples that Mimi hears, and Mimi. Which samples a
segment has is noted when they are read, by path, size and time of change of the file; while these
stay the same, the recording is not read again.
"""

import torch

from finetune.data.codec import Codec
from finetune.data.recording import SegmentRef
from finetune.data.segments import AudioIdentity, identify_part
from finetune.data.store import Blob, Store, make_key


class CodeCache:
    """Codes of segments of one length by one codec."""

    def __init__(self, store: Store, codec: Codec, num_frames: int) -> None:
        self._store = store
        self._sample_rate_hz = codec.sample_rate_hz
        self._num_frames = num_frames
        self._encoding = codec.fingerprint

    def find(self, ref: SegmentRef) -> Blob | None:
        """The codes of a segment whose recording has not changed since they were made.

        Looks at the recording's size and time of change alone.
        """
        file_key = identify_part(ref, self._num_frames, self._sample_rate_hz)
        samples = None if file_key is None else self._store.get(file_key)
        return None if samples is None else self._store.find(self._key(samples))

    def find_samples(self, audio: AudioIdentity) -> Blob | None:
        """The codes of samples that were just read, whatever file they were made from."""
        if audio.file is not None:
            self._store.put(audio.file, audio.samples)
        return self._store.find(self._key(audio.samples))

    def keep(self, audio: AudioIdentity, codes: torch.Tensor) -> None:
        """Keep codes `[2, num_codebooks, num_valid_frames]` of these samples."""
        self._store.append(self._key(audio.samples), codes.numpy().astype("<u2").tobytes())

    def report_damage(self, blob: Blob, problem: str) -> None:
        """Forget codes that could not be read."""
        self._store.report_damage(blob, problem)

    def refresh(self) -> None:
        """See what other processes have encoded; looks at the folder twice a minute at most."""
        self._store.refresh()

    def flush(self) -> None:
        """Let other processes see everything that this one has encoded."""
        self._store.flush()

    def _key(self, samples: bytes) -> bytes:
        return make_key("codes", samples, self._encoding, self._num_frames)
