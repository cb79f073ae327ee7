"""Recordings of any length become codes, in bounded memory.

Audio is read part by part, Mimi encodes it in streaming mode, and the codes go to a file: some
3 MB for an hour. They are those of the whole recording encoded at once, as in training, whatever
the block (see `Codec.encode_blocks`). Stock streaming, as in live use, sees slightly less than
Mimi's attention window and so gives slightly different codes once a recording exceeds it.
"""

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.data import Codec, Recording, SegmentRef
from finetune.kept import writing

logger = logging.getLogger(__name__)

BLOCK_FRAMES = 125
"""Of audio that Mimi encodes at once: 10 s."""


class CodesFile:
    """The codes of one recording in a file: int32, frame by frame."""

    def __init__(self, path: Path, num_streams: int) -> None:
        self.path = path
        self.num_streams = num_streams
        self.num_frames = path.stat().st_size // (4 * num_streams)

    def read(self, start_frame: int, stop_frame: int) -> Tensor:
        """Int64 [num_streams, stop_frame − start_frame]."""
        with self.path.open("rb") as file:
            file.seek(4 * self.num_streams * start_frame)
            numbers = np.fromfile(file, np.int32, self.num_streams * (stop_frame - start_frame))
        return torch.from_numpy(numbers).view(-1, self.num_streams).T.long()


def encode_to_file(
    codec: Codec,
    recording: Recording,
    target: Path,
    *,
    max_frames: int | None = None,
    on_block: Callable[[int], None] = lambda num_frames: None,
) -> CodesFile:
    """The codes of a recording, or of its first `max_frames`, and of its main speaker's words.

    Args:
        on_block: told how many frames more are done.

    Raises:
        FileProblem: the recording cannot be read.
        UserError: the codes cannot be written.
    """
    recording = recording.checked()
    # To a sample, whatever rounding the length in seconds has seen.
    num_samples = math.ceil(recording.duration_sec * codec.sample_rate_hz - 1e-3)
    num_frames = -(-num_samples // codec.mimi.frame_size)
    num_frames = min(num_frames, max_frames or num_frames)
    if recording.has_codes:
        segment = codec.reader(num_frames).read(SegmentRef(recording, 0))
        assert segment.audio_codes is not None
        everything = codec.streams(segment, segment.audio_codes)
        with writing(target):
            target.write_bytes(everything.T.int().numpy().tobytes())
        on_block(num_frames)
        return CodesFile(target, codec.num_streams)
    tokens = torch.tensor(codec.text.stream(recording.read_words(), 0, num_frames))
    start = 0
    with writing(target), target.open("wb") as file:
        for sides in codec.encode_blocks(_audio_blocks(codec, recording, num_frames), BLOCK_FRAMES):
            stop = min(start + sides.shape[2], num_frames)
            left, right = sides[:, :, : stop - start].cpu()
            everything = codec.join(tokens[start:stop], left, right)
            file.write(everything.T.int().numpy().tobytes())
            on_block(stop - start)
            start = stop
    return CodesFile(target, codec.num_streams)


def _audio_blocks(codec: Codec, recording: Recording, num_frames: int) -> Iterator[Tensor]:
    """Float32 [channels, 10 s at Mimi's rate] that cover the recording; the last is padded."""
    block_samples = BLOCK_FRAMES * codec.mimi.frame_size
    for start in range(0, num_frames * codec.mimi.frame_size, block_samples):
        audio = recording.read_audio(start, block_samples, codec.sample_rate_hz)
        yield F.pad(audio, (0, block_samples - audio.shape[1]))


class Silence:
    """The codes that Mimi gives to silence, from its initial state on; encoded as far as needed."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._codes = torch.zeros(codec.mimi.num_codebooks, 0, dtype=torch.int64)

    def codes(self, num_frames: int) -> Tensor:
        """Int64 [num_codebooks, num_frames]."""
        if num_frames > self._codes.shape[1]:
            block = torch.zeros(1, BLOCK_FRAMES * self._codec.mimi.frame_size)
            blocks = (block for _ in range(-(-num_frames // BLOCK_FRAMES)))
            self._codes = torch.cat(
                [c[0] for c in self._codec.encode_blocks(blocks, BLOCK_FRAMES)], dim=1
            ).cpu()
        return self._codes[:, :num_frames]
