"""From audio and words to codes: Mimi and the text tokenizer, frozen."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import torch
from moshi.models.compression import MimiModel
from moshi.utils.compile import no_compile
from torch.nn import functional as F

from finetune.errors import UserError

from .audio import inspect_audio
from .problems import FileProblem
from .segments import Segment, SegmentReader, tokenize
from .sources import Recording, SegmentRef
from .text import FRAME_RATE_HZ, count_frames

# Mimi's first layers hold 64 floats a sample, several times over: some 5 GB for this much audio.
_MAX_ENCODE_SEC = 200


class Codec:
    """A stock Mimi and a sentencepiece tokenizer, with the model's special tokens.

    Both channels of a segment are encoded from Mimi's initial state, as if the conversation began
    there.
    """

    def __init__(
        self,
        mimi: MimiModel,
        tokenizer: sentencepiece.SentencePieceProcessor,
        *,
        moshi_codebooks: int,
        user_codebooks: int,
        text_padding_id: int = 3,
        end_of_text_padding_id: int = 0,
        zero_token_id: int = -1,
    ) -> None:
        """Freezes `mimi` and leaves it where it is.

        Args:
            moshi_codebooks: codebooks of the left channel, the model's `dep_q`.
            user_codebooks: codebooks of the right channel, the model's `n_q - dep_q`.
            zero_token_id: what stands after the end of a recording, in every stream.

        Raises:
            ValueError: Mimi does not run at 12.5 frames a second or has too few codebooks.
        """
        if mimi.frame_rate != FRAME_RATE_HZ:
            raise ValueError(f"Mimi must run at {FRAME_RATE_HZ} frames/s, not {mimi.frame_rate}")
        if mimi.num_codebooks < max(moshi_codebooks, user_codebooks):
            raise ValueError(
                f"the model reads {moshi_codebooks} + {user_codebooks} codebooks, but Mimi is set "
                f"to {mimi.num_codebooks}"
            )
        self.mimi = mimi.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.moshi_codebooks = moshi_codebooks
        self.user_codebooks = user_codebooks
        self.text_padding_id = text_padding_id
        self.end_of_text_padding_id = end_of_text_padding_id
        self.zero_token_id = zero_token_id

    @property
    def device(self) -> torch.device:
        return next(self.mimi.parameters()).device

    @property
    def sample_rate_hz(self) -> int:
        return self.mimi.sample_rate

    @property
    def num_streams(self) -> int:
        """1 text, then Moshi's codebooks, then the user's."""
        return 1 + self.moshi_codebooks + self.user_codebooks

    def tokenize(self, word: str) -> list[int]:
        """The tokens of one word, by itself, without begin-of-sentence."""
        return tokenize(self.tokenizer, word)

    def reader(self, num_frames: int) -> SegmentReader:
        """A reader of segments of `num_frames` frames whose tokens and rate suit this codec."""
        return SegmentReader(
            self.tokenizer,
            num_frames=num_frames,
            sample_rate_hz=self.sample_rate_hz,
            text_padding_id=self.text_padding_id,
            end_of_text_padding_id=self.end_of_text_padding_id,
        )

    def read_recording(self, path: Path) -> Segment:
        """A whole stereo recording as one segment; without a transcript its text is padding.

        Raises:
            UserError: the recording or its transcript cannot be read.
        """
        try:
            duration_sec = inspect_audio(path).duration_sec
            recording = Recording(path, str(path), str(path), duration_sec)
            reader = self.reader(count_frames(duration_sec))
            if recording.transcript_path.exists():
                return reader.read(SegmentRef(recording, 0))
            return reader.read_audio_only(SegmentRef(recording, 0))
        except FileProblem as problem:
            raise UserError(f"{path}: {problem}") from None

    def detokenize(self, tokens: torch.Tensor) -> str:
        """The words of a text stream `[T]`."""
        special = {self.text_padding_id, self.end_of_text_padding_id}
        pieces = range(self.tokenizer.vocab_size())
        words = [t for t in tokens.tolist() if t in pieces and t not in special]
        # Word by word tokens begin with a space of their own.
        text: str = self.tokenizer.decode(words)
        return text

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Audio of codes `[B, num_codebooks, T]`: float32 `[B, 1, num_samples]`."""
        with self._eager_on_cpu():
            return self.mimi.decode(codes.to(self.device))

    @torch.no_grad()
    def encode(self, segments: Sequence[Segment]) -> torch.Tensor:
        """Codes of segments of one length: int64 `[B, num_streams, num_frames]` on Mimi's device.

        Frames past a recording's end are `zero_token_id` in every stream.
        """
        num_frames = segments[0].num_frames
        num_samples = num_frames * self.mimi.frame_size
        # Zeros on the right are harmless: Mimi is causal, and their frames are masked below.
        audio = torch.stack(
            [
                F.pad(segment.audio, (0, num_samples - segment.audio.shape[1]))
                for segment in segments
            ]
        )
        left, right = self._encode_audio(audio).unbind(1)

        codes = torch.full(
            (len(segments), self.num_streams, num_frames), self.zero_token_id, device=self.device
        )
        for row, segment in enumerate(segments):
            valid = segment.num_valid_frames
            first_user = 1 + self.moshi_codebooks
            codes[row, 0, :valid] = segment.text_tokens.to(self.device)
            codes[row, 1:first_user, :valid] = left[row, : self.moshi_codebooks, :valid]
            codes[row, first_user:, :valid] = right[row, : self.user_codebooks, :valid]
        return codes

    def _encode_audio(self, audio: torch.Tensor) -> torch.Tensor:
        """`[B, 2, num_samples]` to codes `[B, 2, num_codebooks, T]`, in parts that fit."""
        rows = audio.flatten(0, 1).unsqueeze(1)
        on_cuda = self.device.type == "cuda"
        # A CPU gains nothing from larger batches; one segment at a time, a segment's codes do not
        # depend, not even by rounding, on what it was encoded together with.
        max_rows = 2
        if on_cuda:
            max_rows = max(1, int(_MAX_ENCODE_SEC * self.sample_rate_hz) // rows.shape[-1])
        with self._eager_on_cpu():
            codes = [self.mimi.encode(part.to(self.device)) for part in rows.split(max_rows)]
        return torch.cat(codes).unflatten(0, (-1, 2))

    def _eager_on_cpu(self) -> contextlib.AbstractContextManager[None]:
        # Parts of Mimi compile themselves, which on a CPU costs more than it gives and needs a
        # C++ compiler.
        return contextlib.nullcontext() if self.device.type == "cuda" else no_compile()
