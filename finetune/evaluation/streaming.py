"""Windowed scoring: recordings of any length through a model in streaming mode, block by block.

The attention caches and the TTT state are carried from block to block, so the result is that of one
long forward pass, which would not fit. Rows of a batch start together; a row that has ended is fed
zero tokens, which nothing of it is counted for, so every row is scored as it is alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import ttt
from finetune.step import LossWeights, target_weights
from ttt import TTTLMModel


class Codes(Protocol):
    """The codes of one recording, of which parts can be read."""

    @property
    def num_frames(self) -> int: ...

    def read(self, start_frame: int, stop_frame: int) -> Tensor:
        """Int64 [1 + n_q, stop_frame − start_frame]; the range lies within the recording."""
        ...


@dataclass
class ScoredBlock:
    """Targets of a block of steps; text first, then Moshi's codebooks: [B, 1 + dep_q, n].

    frames: [1 + dep_q, n], the targets' positions in the recording: delayed codebooks lag behind.
    is_target: where there is one; what the others hold means nothing.
    nll: CE in nats, float32. weight: as in the training loss. is_word: text that is no padding.
    """

    frames: Tensor
    is_target: Tensor
    nll: Tensor
    weight: Tensor
    is_word: Tensor


class Scorer:
    """A streaming pass over a batch of recordings.

    Args:
        model: in eval mode, in `block_streaming` mode with at least `block_frames` steps a block.
        rows: one recording for each row of the batch.
        weights: of the loss.
        block_frames: frames that are computed at once; bounds the memory, changes no result.
    """

    def __init__(
        self,
        model: TTTLMModel,
        rows: Sequence[Codes],
        *,
        weights: LossWeights,
        block_frames: int,
    ) -> None:
        self.model = model
        self.rows = rows
        self.weights = weights
        self.block_frames = block_frames
        self.num_scored = 1 + model.dep_q
        self.max_delay = max(model.delays)
        self.lengths = torch.tensor([row.num_frames for row in rows], device=model.device)

    @torch.no_grad()
    def learn(self, stop_frames: Sequence[int]) -> None:
        """Read the first frames of each row, for what they leave in the state; score nothing."""
        stops = torch.tensor(stop_frames, device=self.model.device)
        for start, stop in cut(max(stop_frames), self.block_frames, stop_frames):
            self.model.set_exec_mask(start < stops)
            self.model.forward_text(self._delayed(start - 1, stop - 1))
        # The mask is part of the state: left as it is, it would pause the rows that ended first.
        self.model.set_exec_mask(torch.ones_like(stops, dtype=torch.bool))

    @torch.no_grad()
    def score(self, *, reset_every_frames: int | None = None) -> Iterator[ScoredBlock]:
        """Score all rows to their ends.

        Args:
            reset_every_frames: TTT forgets what it has learned before every frame that is a
                multiple of it; attention does not.
        """
        num_frames = int(self.lengths.max())
        resets = range(0, num_frames, reset_every_frames) if reset_every_frames else range(0)
        for start, stop in cut(num_frames, self.block_frames, resets):
            if start in resets:
                ttt.reset(self.model)
            yield self._score_block(start, stop)

    def _score_block(self, start: int, stop: int) -> ScoredBlock:
        model = self.model
        sequence = self._delayed(start - 1, stop)
        out, text_logits = model.forward_text(sequence[:, :, :-1])
        # The depformer reads its targets, as in training.
        targets = sequence[:, :, 1:]
        audio_logits = model.forward_depformer_training(targets, out)

        targets = targets[:, : self.num_scored]
        steps = torch.arange(start, stop, device=model.device)
        frames = steps - torch.tensor(model.delays[: self.num_scored], device=model.device)[:, None]
        is_target = (
            (frames >= 0) & (steps < self.lengths[:, None, None]) & (targets != model.zero_token_id)
        )
        targets = torch.where(is_target, targets, model.zero_token_id)
        nll = torch.cat(
            [_nll(text_logits, targets[:, :1]), _nll(audio_logits, targets[:, 1:])], dim=1
        )
        text = targets[:, :1]
        is_padding = (text == model.text_padding_token_id) | (text == model.end_of_text_padding_id)
        return ScoredBlock(
            frames, is_target, nll, self._weights(targets), is_target[:, :1] & ~is_padding
        )

    def _weights(self, targets: Tensor) -> Tensor:
        """Return what the training loss gives to these targets, of which those without are zero
        tokens."""
        # It gives nothing to the last frames of a sequence, which delayed streams never read. Here
        # the sequence goes on.
        padded = F.pad(targets, (0, self.max_delay), value=self.model.zero_token_id)
        weights = torch.cat(target_weights(self.model, padded, self.weights), dim=1)
        return weights[:, :, : targets.shape[2]]

    def _delayed(self, start: int, stop: int) -> Tensor:
        """The delayed codes of the steps start … stop − 1, [B, 1 + n_q, stop − start]; step −1 is
        the model's initial token, as is every stream before its first code."""
        model = self.model
        initial = model._get_initial_token().expand(len(self.rows), -1, stop - start)
        steps = torch.arange(start, stop, device=model.device)
        delays = torch.tensor(model.delays, device=model.device)[:, None]
        # What the block needs of a row: zero tokens where it has ended.
        first = max(start - self.max_delay, 0)
        codes = torch.full(
            (len(self.rows), model.num_codebooks, max(stop - first, 1)),
            model.zero_token_id,
            device=model.device,
        )
        for row, source in enumerate(self.rows):
            if (last := min(stop, source.num_frames)) > first:
                codes[row, :, : last - first] = source.read(first, last).to(model.device)
        index = (steps - delays - first).clamp(min=0).expand(len(self.rows), -1, -1)
        return torch.where(steps < delays, initial, codes.gather(2, index))


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """CE of [B, K, n, card] against [B, K, n], of which negative ones count for nothing."""
    flat = F.cross_entropy(
        logits.flatten(0, 2).float(), targets.clamp(min=0).flatten(), reduction="none"
    )
    return flat.view_as(targets)


def cut(num_frames: int, block_frames: int, cuts: Iterable[int] = ()) -> list[tuple[int, int]]:
    """Consecutive ranges that cover `num_frames`: of at most `block_frames`, none across a cut."""
    inner = {c for c in cuts if 0 < c < num_frames}
    return list(pairwise(sorted({*range(0, num_frames, block_frames), *inner, num_frames})))
