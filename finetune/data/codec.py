"""Audio and words become codes by Mimi and the text tokenizer, which are frozen."""

import hashlib
import inspect
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import moshi
import sentencepiece
import torch
from moshi.models.compression import MimiModel
from moshi.modules.rope import RotaryEmbedding, apply_rope
from torch.nn import functional as F

from finetune.data.audio import inspect_audio
from finetune.data.codes import ReadCodes
from finetune.data.layouts import StereoFile
from finetune.data.problems import FileProblem
from finetune.data.recording import SegmentRef
from finetune.data.segments import Segment, SegmentReader
from finetune.data.text import FRAME_RATE_HZ, TextEncoder, count_frames
from finetune.errors import UserError
from ttt import block_streaming
from ttt.layers.execution import eager_on_cpu

_PIECE_FRAMES = 1250
"""Longer segments are encoded in pieces of this length. Mimi's first layers hold 64 floats a
sample, several times over: some 5 GB for a piece of both channels."""

_eager_on_cpu: AbstractContextManager[None] | None = None


class _LoneFile(StereoFile):
    """A file that no list names."""

    leave_out = ""


class Codec:
    """A stock Mimi and a sentencepiece tokenizer, with the model's special tokens.

    Both channels of a segment are encoded from Mimi's initial state, as if the conversation began
    there. A segment's codes do not depend, not even by rounding, on what is encoded before or
    after it. Several threads may share a codec.
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
        word_start: Literal["auto", "always", "never"] = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        """Freezes `mimi`.

        Args:
            device: where Mimi computes; it moves there when it is first needed. None: where it is.
            moshi_codebooks: codebooks of the left channel, the model's `dep_q`.
            user_codebooks: codebooks of the right channel, the model's `n_q - dep_q`.
            word_start: see `data.word_start`.
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
        # As it is of tensors that are there: a GPU with its number.
        self.device = torch.empty(0, device=device or next(mimi.parameters()).device).device
        self.text = TextEncoder(tokenizer, text_padding_id, end_of_text_padding_id, word_start)
        self.moshi_codebooks = moshi_codebooks
        self.user_codebooks = user_codebooks
        self.zero_token_id = zero_token_id
        self.lock = threading.Lock()
        """Held while Mimi computes; other processes must not be forked meanwhile."""
        self._stream: torch.cuda.Stream | None = None
        self._run_eagerly()

    @property
    def sample_rate_hz(self) -> int:
        return self.mimi.sample_rate

    @property
    def num_streams(self) -> int:
        """1 text, then Moshi's codebooks, then the user's."""
        return 1 + self.moshi_codebooks + self.user_codebooks

    @property
    def reads(self) -> ReadCodes:
        """Return what the model reads of codes that were made before."""
        return ReadCodes(self.mimi.num_codebooks, self.mimi.cardinality)

    @property
    def tokenizer(self) -> sentencepiece.SentencePieceProcessor:
        return self.text.tokenizer

    @property
    def text_padding_id(self) -> int:
        return self.text.text_padding_id

    @property
    def end_of_text_padding_id(self) -> int:
        return self.text.end_of_text_padding_id

    def tokenize(self, word: str) -> list[int]:
        """The tokens of one word, by itself, without begin-of-sentence."""
        return self.text.tokenize(word)

    def reader(self, num_frames: int) -> SegmentReader:
        """A reader of segments of `num_frames` frames whose tokens and rate suit this codec."""
        return SegmentReader(
            self.text,
            num_frames=num_frames,
            sample_rate_hz=self.sample_rate_hz,
            reads=self.reads,
        )

    def read_recording(self, path: Path) -> Segment:
        """A whole stereo recording as one segment; without a transcript its text is padding.

        Raises:
            UserError: the recording or its transcript cannot be read.
        """
        try:
            duration_sec = inspect_audio(path).duration_sec
            recording = _LoneFile(path, str(path), str(path), duration_sec)
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
        """Audio of codes `[B, num_codebooks, T]`: float32 `[B, 1, num_samples]`.

        Long ones are decoded in pieces that follow one another: Mimi's attention has a mask over
        all pairs of frames of a call. The samples are those of one call, to rounding.
        """
        with self.lock:
            mimi = self._mimi_on_device()
            if codes.shape[-1] <= _PIECE_FRAMES:
                audio: torch.Tensor = mimi.decode(codes.to(self.device))
                return audio
            steps_per_frame = round(mimi.encoder_frame_rate / mimi.frame_rate)
            with block_streaming(mimi, len(codes), _PIECE_FRAMES * steps_per_frame):
                pieces = [
                    mimi.decode(piece.to(self.device)).cpu()
                    for piece in codes.split(_PIECE_FRAMES, dim=-1)
                ]
        return torch.cat(pieces, dim=-1).to(self.device)

    def encode(self, segments: Sequence[Segment]) -> torch.Tensor:
        """Codes of segments of one length: int64 `[B, num_streams, num_frames]` on `device`.

        Frames past a recording's end are `zero_token_id` in every stream.
        """
        codes = [self.streams(segment, self.encode_audio(segment)) for segment in segments]
        return torch.stack(codes).to(self.device)

    def streams(self, segment: Segment, audio_codes: torch.Tensor) -> torch.Tensor:
        """Text and both channels of a segment: int64 `[num_streams, num_frames]` on the CPU.

        Args:
            audio_codes: `[2, num_codebooks, num_valid_frames]`, what `encode_audio` gives.
        """
        codes = torch.full((self.num_streams, segment.num_frames), self.zero_token_id)
        codes[:, : segment.num_valid_frames] = self.join(segment.text_tokens, *audio_codes)
        return codes

    def join(self, text: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Put text and both channels together: int64 `[num_streams, T]`.

        Args:
            text: `[T]`.
            left, right: codes `[num_codebooks, T]` of Moshi and of the user.
        """
        return torch.cat([text[None], left[: self.moshi_codebooks], right[: self.user_codebooks]])

    @torch.no_grad()
    def encode_audio(self, segment: Segment) -> torch.Tensor:
        """Codes of both channels: int64 `[2, num_codebooks, num_valid_frames]` on the CPU."""
        num_samples = segment.num_frames * self.mimi.frame_size
        # Zeros on the right are harmless: Mimi is causal, and their frames are cut off below.
        audio = F.pad(segment.audio, (0, num_samples - segment.audio.shape[1]))
        with self.lock, self._own_stream():
            codes = self._encode_rows(audio.to(self.device))
            return codes[..., : segment.num_valid_frames].cpu()

    @torch.no_grad()
    def encode_blocks(
        self, blocks: Iterable[torch.Tensor], max_frames: int
    ) -> Iterator[torch.Tensor]:
        """Codes `[rows, num_codebooks, n]` of blocks of audio `[rows, n · frame_size]` that follow
        one another: those of the whole in one call, to rounding.

        Nobody else computes with Mimi until the last block was taken: it remembers the ones before.

        Args:
            max_frames: the longest block.
        """
        with self.lock:
            yield from self._encode_blocks(blocks, max_frames)

    def _encode_blocks(
        self, blocks: Iterable[torch.Tensor], max_frames: int
    ) -> Iterator[torch.Tensor]:
        mimi = self._mimi_on_device()
        steps_per_frame = round(mimi.encoder_frame_rate / mimi.frame_rate)
        with ExitStack() as stack:
            for index, block in enumerate(blocks):
                if index == 0:
                    room = max_frames * steps_per_frame
                    stack.enter_context(block_streaming(mimi, len(block), room))
                yield mimi.encode(block.unsqueeze(1).to(self.device))

    def _encode_rows(self, audio: torch.Tensor) -> torch.Tensor:
        """`[rows, num_samples]` to codes `[rows, num_codebooks, T]`, in pieces if it is long."""
        mimi = self._mimi_on_device()
        piece_samples = _PIECE_FRAMES * mimi.frame_size
        if audio.shape[1] <= piece_samples:
            return mimi.encode(audio.unsqueeze(1))
        pieces = self._encode_blocks(audio.split(piece_samples, dim=1), _PIECE_FRAMES)
        return torch.cat(list(pieces), dim=-1)

    def _own_stream(self) -> AbstractContextManager[Any]:
        """On a GPU a stream for encoding, so that it and a training step do not wait for each
        other."""
        if self.device.type != "cuda":
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return torch.cuda.stream(self._stream)

    def _mimi_on_device(self) -> MimiModel:
        if next(self.mimi.parameters()).device != self.device:
            self.mimi.to(self.device)
            torch.cuda.synchronize(self.device)  # whichever stream uses it next
        return self.mimi

    def _run_eagerly(self) -> None:
        """Keep Mimi from compiling parts of itself: it may compute in the background, and
        PyTorch cannot compile in one thread and run compiled functions in another.

        On a CPU this is for good, and for all of `moshi`: its switch is one for all threads, and
        Mimi itself sets and restores it as it encodes.
        """
        global _eager_on_cpu
        for module in self.mimi.modules():
            if isinstance(module, RotaryEmbedding):
                module.forward = partial(_rotate, module)
        if self.device.type != "cuda" and _eager_on_cpu is None:
            _eager_on_cpu = eager_on_cpu(self.device)
            _eager_on_cpu.__enter__()

    @cached_property
    def fingerprint(self) -> bytes:
        """Return what codes depend on besides audio: Mimi's weights, shape and version, and the way
        it is used."""
        digest = hashlib.blake2b(digest_size=16)
        used = (moshi.__version__, self.mimi.num_codebooks, _PIECE_FRAMES)
        digest.update(repr(used).encode())
        for name, module in self.mimi.named_modules():
            shape = {
                key: value
                for key, value in sorted(vars(module).items())
                if isinstance(value, bool | int | float | str | tuple) and key[0] != "_"
            }
            digest.update(repr((name, type(module).__name__, shape)).encode())
        for name, weight in self.mimi.state_dict().items():
            digest.update(repr((name, weight.dtype)).encode())
            content = weight.cpu().contiguous().flatten().view(torch.uint8).numpy()
            digest.update(memoryview(content))
        return digest.digest()


def _rotate(
    rope: RotaryEmbedding,
    q: torch.Tensor,
    k: torch.Tensor,
    offset: torch.Tensor,
    time_before_heads: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    eager = inspect.unwrap(apply_rope)
    return eager(q, k, offset, rope.max_period, rope.interleave, time_before_heads)
