"""Sums of scored targets, by stream and bin of position."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from finetune.evaluation.streaming import ScoredBlock
from finetune.evaluation.streams import STREAMS
from ttt import TTTLMModel


def first_not_finite(streams: Mapping[str, Mapping[str, Sequence[float]]]) -> int | None:
    """The first bin in which a sum of a record's streams is no number, or infinite."""
    bad = [
        bin
        for sums in streams.values()
        for bin, values in enumerate(zip(*sums.values(), strict=True))
        if not all(map(math.isfinite, values))
    ]
    return min(bad, default=None)


class BinSums:
    """Sums of the scored targets of a batch, by stream and bin of position.

    Args:
        num_frames: of the longest row.
    """

    def __init__(
        self, model: TTTLMModel, batch_size: int, num_frames: int, bin_frames: int
    ) -> None:
        self.bin_frames = bin_frames
        num_bins = -(-num_frames // bin_frames)
        self.num_codebooks = model.dep_q
        # loss, weight, nll, count; the streams, and the words after them.
        self.sums = torch.zeros(
            4, batch_size, 2 + model.dep_q, num_bins, dtype=torch.float64, device=model.device
        )

    def add(self, block: ScoredBlock) -> None:
        nll = torch.where(block.is_target, block.nll, 0.0)
        parts = torch.stack([nll * block.weight, block.weight, nll, block.is_target.float()])
        words = block.is_word.float() * torch.stack([nll, torch.ones_like(nll)])[:, :, :1]
        parts = torch.cat([parts, words.repeat(2, 1, 1, 1)], dim=2).double()
        frames = torch.cat([block.frames, block.frames[:1]])
        index = (frames.clamp(min=0) // self.bin_frames).clamp(max=self.sums.shape[3] - 1)
        self.sums.scatter_add_(3, index.expand_as(parts), parts)

    def of_row(self, row: int, num_frames: int) -> dict[str, dict[str, list[float]]]:
        """Return, by stream, lists with an entry for each bin of a row's own length."""
        num_bins = -(-num_frames // self.bin_frames)
        sums = self.sums[:, row, :, :num_bins].cpu()
        last = 1 + self.num_codebooks
        of_stream: dict[str, Tensor] = {
            "text": sums[:, 0],
            "words": sums[:, last],
            "first_codebook": sums[:, 1],
            "other_codebooks": sums[:, 2:last].sum(1),
        }
        return {stream: dict(_named(of_stream[stream])) for stream in STREAMS}


def _named(parts: Tensor) -> Iterator[tuple[str, list[float]]]:
    for name, values in zip(("loss", "weight", "nll", "count"), parts.tolist(), strict=True):
        yield name, [round(value, 6) for value in values]
