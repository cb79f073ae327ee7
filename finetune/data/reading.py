"""The configuration says how audio is read: on which side Moshi is, what silence is."""

import zlib
from dataclasses import dataclass
from typing import Literal

import torch

from finetune.config import DataArgs
from finetune.data.audio import MIMI_RATE_HZ


@dataclass(frozen=True)
class Reading:
    """The options of `data` that change what is heard of a recording.

    Args:
        main_channel: where Moshi is.
        room_tone_dbfs: level of the noise in place of digital silence; None: silence stays.
        swap_channels: whether each recording comes from its other side as well.
    """

    main_channel: Literal["left", "right"] = "left"
    room_tone_dbfs: float | None = None
    swap_channels: bool = False

    @classmethod
    def of(cls, args: DataArgs, *, training: bool) -> "Reading":
        """Return how data are read that train, or that are evaluated: never from both sides."""
        return cls(args.main_channel, args.room_tone, args.swap_channels and training)

    @property
    def changes(self) -> tuple[object, ...]:
        """Return what distinguishes audio read so from the file's own; nothing by default."""
        changes: tuple[object, ...] = ()
        if self.main_channel != "left":
            changes += ("main channel", self.main_channel)
        if self.room_tone_dbfs is not None:
            changes += ("room tone", self.room_tone_dbfs)
        return changes

    def apply(
        self, audio: torch.Tensor, start_sample: int, sample_rate_hz: int, name: str
    ) -> torch.Tensor:
        """Change part of a recording `[2, n]`, Moshi first, as it is in the file.

        Args:
            name: the recording's; each has a noise of its own, always the same.
        """
        if self.room_tone_dbfs is not None:
            level = 10 ** (self.room_tone_dbfs / 20)
            noise = _noise(name, start_sample, audio.shape[1], sample_rate_hz)
            audio = torch.where(audio == 0, level * noise, audio)
        return audio


def _noise(name: str, start: int, num: int, block: int = MIMI_RATE_HZ) -> torch.Tensor:
    """White noise of variance 1, `[2, num]`: a function of the place in the recording alone."""
    if not num:
        return torch.zeros(2, 0)
    seed = zlib.crc32(name.encode(errors="surrogateescape")) << 24
    first, last = start // block, (start + num - 1) // block
    blocks = [
        torch.randn(2, block, generator=torch.Generator().manual_seed(seed + index))
        for index in range(first, last + 1)
    ]
    offset = start - first * block
    return torch.cat(blocks, dim=1)[:, offset : offset + num]
