"""Reading one segment: what the background workers do."""

from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from torch.utils.data import Dataset

from .audio import read_audio
from .problems import FileProblem
from .sources import SegmentRef
from .text import FRAME_RATE_HZ, Word, read_transcript, text_stream, tokenize_segment


@dataclass
class Segment:
    """Part of a recording, ready to be encoded."""

    audio: torch.Tensor
    """Float32 `[2, num_samples]` at Mimi's rate: left Moshi, right user."""
    text_tokens: torch.Tensor
    """Int64 `[num_valid_frames]`."""
    num_frames: int
    """Full length of a segment; the frames from `num_valid_frames` on are padding."""
    path: Path
    start_sec: float

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
    ) -> None:
        self.tokenizer = tokenizer
        self.num_frames = num_frames
        self.sample_rate_hz = sample_rate_hz
        self.text_padding_id = text_padding_id
        self.end_of_text_padding_id = end_of_text_padding_id

    def __getitem__(self, ref: SegmentRef) -> Segment | BrokenSegment:
        try:
            return self.read(ref)
        except FileProblem as problem:
            return BrokenSegment(ref, str(problem))

    def read(self, ref: SegmentRef) -> Segment:
        """Audio and text of one segment.

        Raises:
            FileProblem: the recording or its transcript cannot be read.
        """
        return self._segment(ref, read_transcript(ref.recording.transcript_path))

    def read_audio_only(self, ref: SegmentRef) -> Segment:
        """As `read`, of a recording without a transcript: the text is padding."""
        return self._segment(ref, [])

    def _segment(self, ref: SegmentRef, transcript: list[Word]) -> Segment:
        frame_samples = round(self.sample_rate_hz / FRAME_RATE_HZ)
        recording, start_frame = ref
        audio = read_audio(
            recording.path,
            start_frame * frame_samples,
            self.num_frames * frame_samples,
            self.sample_rate_hz,
        )
        num_valid_frames = -(-audio.shape[1] // frame_samples)
        words = tokenize_segment(
            transcript,
            start_frame,
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
            audio=audio,
            text_tokens=torch.tensor(text_tokens, dtype=torch.int64),
            num_frames=self.num_frames,
            path=recording.path,
            start_sec=start_frame / FRAME_RATE_HZ,
        )
