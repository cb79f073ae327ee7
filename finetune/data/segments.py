"""Reading one segment: what the background workers do."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from finetune.data.codes import ReadCodes
from finetune.data.problems import FileProblem
from finetune.data.recording import SegmentRef
from finetune.data.store import Blob, DamagedBlob, make_key
from finetune.data.text import FRAME_RATE_HZ, TextEncoder
from finetune.data.transcripts import Word


class AudioIdentity(NamedTuple):
    """Keys that the audio of a segment is known by. All are 16 bytes."""

    file: bytes | None
    """Of the part of the file, see `identify_part`."""
    samples: bytes
    """Of the samples themselves."""


@dataclass
class Segment:
    """Part of a recording, ready to be encoded."""

    audio: torch.Tensor
    """Float32 `[2, num_samples]` at Mimi's rate: left Moshi, right user. Empty if there are
    `audio_codes`."""
    text_tokens: torch.Tensor
    """Int64 `[num_valid_frames]`."""
    num_frames: int
    """Full length of a segment; the frames from `num_valid_frames` on are padding."""
    path: Path
    start_sec: float
    audio_codes: torch.Tensor | None = None
    """Int64 `[2, num_codebooks, num_valid_frames]`, if they were kept from an earlier time."""
    identity: AudioIdentity | None = None
    """If asked for, and the audio was read."""
    damage: str | None = None
    """Why the codes that were kept could not be used."""

    @property
    def num_valid_frames(self) -> int:
        return len(self.text_tokens)


@dataclass
class BrokenSegment:
    """A segment that could not be read, and why.

    A value, not an exception: an exception would reach the training process wrapped in the
    worker's traceback.
    """

    ref: SegmentRef
    problem: str


class Task(NamedTuple):
    """A task is what a worker does for one segment."""

    ref: SegmentRef | None
    """None: nothing, its codes are in memory."""
    codes: Blob | None = None
    """Where its audio codes are kept."""


def identify_part(ref: SegmentRef, num_frames: int, sample_rate_hz: int) -> bytes | None:
    """A key for the part of a recording that a segment is; another one if the recording has
    changed. None: it cannot be found."""
    version = ref.recording.audio_version()
    if version is None:
        return None
    return make_key("segment", *version, ref.start_frame, num_frames, sample_rate_hz)


class SegmentReader(Dataset):
    """Reads segments by their reference; holds no model, so that a worker can have a copy."""

    def __init__(
        self,
        text: TextEncoder,
        *,
        num_frames: int,
        sample_rate_hz: int,
        reads: ReadCodes,
    ) -> None:
        """
        Args:
            reads: what codes the model reads; those that were kept are of as many codebooks.
        """
        self.text = text
        self.num_frames = num_frames
        self.sample_rate_hz = sample_rate_hz
        self.reads = reads
        self.identify = False
        """Whether segments that are read get an `identity`."""

    def __getitem__(self, task: Task) -> Segment | BrokenSegment | None:
        if task.ref is None:
            return None
        try:
            return self.read(task.ref, task.codes)
        except FileProblem as problem:
            return BrokenSegment(task.ref, str(problem))

    def read(self, ref: SegmentRef, codes: Blob | None = None) -> Segment:
        """Audio and text of one segment; without the audio if its codes can be read instead.

        Raises:
            FileProblem: the recording or its transcript cannot be read.
        """
        words = ref.recording.read_words()
        if ref.recording.has_codes:
            return self._from_encoded(ref, words)
        if codes is None:
            return self._from_audio(ref, words)
        try:
            return self._from_codes(ref, words, codes)
        except DamagedBlob as damage:
            segment = self._from_audio(ref, words)
            segment.damage = str(damage)
            return segment

    def read_audio_only(self, ref: SegmentRef) -> Segment:
        """Read a recording without a transcript, as `read` does: the text is padding."""
        return self._from_audio(ref, [])

    def decode_kept(self, kept: bytes) -> torch.Tensor:
        """Return what `CodeCache` keeps, as `Segment.audio_codes`."""
        codes = np.frombuffer(kept, dtype="<u2").astype(np.int64)
        return torch.from_numpy(codes).view(2, self.reads.num_codebooks, -1)

    def _from_audio(self, ref: SegmentRef, words: list[Word]) -> Segment:
        frame_samples = round(self.sample_rate_hz / FRAME_RATE_HZ)
        # Before it is read: a change in between must not pass unnoticed later.
        file = identify_part(ref, self.num_frames, self.sample_rate_hz) if self.identify else None
        audio = ref.recording.read_audio(
            ref.start_frame * frame_samples,
            self.num_frames * frame_samples,
            self.sample_rate_hz,
        ).contiguous()
        segment = self._segment(ref, words, -(-audio.shape[1] // frame_samples))
        segment.audio = audio
        if self.identify:
            digest = hashlib.blake2b(audio.numpy().data, digest_size=16).digest()
            segment.identity = AudioIdentity(file, digest)
        return segment

    def _from_encoded(self, ref: SegmentRef, words: list[Word]) -> Segment:
        codes = ref.recording.read_codes(ref.start_frame, self.num_frames)
        self.reads.require(codes, ref.recording.title, self.text)
        audio, text = codes
        segment = self._segment(ref, words, audio.shape[2])
        segment.audio_codes = audio
        if text is not None:
            segment.text_tokens = text
        return segment

    def _from_codes(self, ref: SegmentRef, words: list[Word], kept: Blob) -> Segment:
        codes = self.decode_kept(kept.read())
        segment = self._segment(ref, words, codes.shape[-1])
        segment.audio_codes = codes
        return segment

    def _segment(self, ref: SegmentRef, words: list[Word], num_valid_frames: int) -> Segment:
        text_tokens = self.text.stream(words, ref.start_frame, num_valid_frames)
        return Segment(
            audio=torch.zeros(2, 0),
            text_tokens=torch.tensor(text_tokens, dtype=torch.int64),
            num_frames=self.num_frames,
            path=ref.recording.path,
            start_sec=ref.start_frame / FRAME_RATE_HZ,
        )
