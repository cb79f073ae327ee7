"""Reading one segment: what the background workers do."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from torch.utils.data import Dataset

from .audio import read_audio
from .problems import FileProblem
from .sources import SegmentRef
from .store import Blob, DamagedBlob, make_key
from .text import FRAME_RATE_HZ, Word, read_transcript, text_stream, tokenize_segment


class AudioIdentity(NamedTuple):
    """What the audio of a segment is known by. All are 16 bytes."""

    file: bytes | None
    """Of the part of the file, see `identify_file`."""
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
    """What a worker does for one segment."""

    ref: SegmentRef | None
    """None: nothing, its codes are in memory."""
    codes: Blob | None = None
    """Where its audio codes are kept."""


def identify_file(ref: SegmentRef, num_frames: int, sample_rate_hz: int) -> bytes | None:
    """A key for the part of a file that a segment is; another one if the file has changed.

    By the file's path, size and time of change. None: it cannot be found.
    """
    path = os.path.abspath(ref.recording.path)
    try:
        status = os.stat(path)
    except OSError:
        return None
    changed = (status.st_size, status.st_mtime_ns)
    return make_key("segment", path, changed, ref.start_frame, num_frames, sample_rate_hz)


def tokenize(tokenizer: sentencepiece.SentencePieceProcessor, word: str) -> list[int]:
    """The tokens of one word, by itself, without begin-of-sentence."""
    tokens: list[int] = tokenizer.encode(word.strip(), add_bos=False, add_eos=False)
    return tokens


class SegmentReader(Dataset):
    """Reads segments by their reference; holds no model, so that a worker can have a copy."""

    def __init__(
        self,
        tokenizer: sentencepiece.SentencePieceProcessor,
        *,
        num_frames: int,
        sample_rate_hz: int,
        text_padding_id: int,
        end_of_text_padding_id: int,
        num_codebooks: int,
    ) -> None:
        """`num_codebooks`: of each channel, in codes that were kept."""
        self.tokenizer = tokenizer
        self.num_frames = num_frames
        self.sample_rate_hz = sample_rate_hz
        self.text_padding_id = text_padding_id
        self.end_of_text_padding_id = end_of_text_padding_id

        self.num_codebooks = num_codebooks
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
        transcript = read_transcript(ref.recording.transcript_path)
        if codes is None:
            return self._from_audio(ref, transcript)
        try:
            return self._from_codes(ref, transcript, codes)
        except DamagedBlob as damage:
            segment = self._from_audio(ref, transcript)
            segment.damage = str(damage)
            return segment

    def read_audio_only(self, ref: SegmentRef) -> Segment:
        """As `read`, of a recording without a transcript: the text is padding."""
        return self._from_audio(ref, [])

    def decode_kept(self, kept: bytes) -> torch.Tensor:
        """Return what `CodeCache` keeps, as `Segment.audio_codes`."""
        codes = np.frombuffer(kept, dtype="<u2").astype(np.int64)
        return torch.from_numpy(codes).view(2, self.num_codebooks, -1)

    def _from_audio(self, ref: SegmentRef, transcript: list[Word]) -> Segment:
        frame_samples = round(self.sample_rate_hz / FRAME_RATE_HZ)
        # Before it is read: a change in between must not pass unnoticed later.
        file = identify_file(ref, self.num_frames, self.sample_rate_hz) if self.identify else None
        audio = read_audio(
            ref.recording.path,
            ref.start_frame * frame_samples,
            self.num_frames * frame_samples,
            self.sample_rate_hz,
        ).contiguous()
        segment = self._segment(ref, transcript, -(-audio.shape[1] // frame_samples))
        segment.audio = audio
        if self.identify:
            digest = hashlib.blake2b(audio.numpy().data, digest_size=16).digest()
            segment.identity = AudioIdentity(file, digest)
        return segment

    def _from_codes(self, ref: SegmentRef, transcript: list[Word], kept: Blob) -> Segment:
        codes = self.decode_kept(kept.read())
        segment = self._segment(ref, transcript, codes.shape[-1])
        segment.audio_codes = codes
        return segment

    def _segment(self, ref: SegmentRef, transcript: list[Word], num_valid_frames: int) -> Segment:
        words = tokenize_segment(
            transcript,
            ref.start_frame,
            num_valid_frames,
            lambda word: tokenize(self.tokenizer, word),
        )
        text_tokens = text_stream(
            words,
            num_valid_frames,
            text_padding_id=self.text_padding_id,
            end_of_text_padding_id=self.end_of_text_padding_id,
        )
        return Segment(
            audio=torch.zeros(2, 0),
            text_tokens=torch.tensor(text_tokens, dtype=torch.int64),
            num_frames=self.num_frames,
            path=ref.recording.path,
            start_sec=ref.start_frame / FRAME_RATE_HZ,
        )
