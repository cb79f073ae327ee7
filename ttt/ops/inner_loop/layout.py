"""Frames are laid out in mini-batches that documents begin anew."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt.ops.in_place.chunks import number_chunks


class Layout(NamedTuple):
    """A layout puts frames into whole mini-batches, N of K frames a row."""

    num_mini_batches: int
    slots: Tensor | None
    """[B, T], the place of each frame; None: they follow one another."""
    starts: Tensor | None
    """[B, N], whether a mini-batch is a document's first; None: no other than the row's."""
    complete: Tensor
    """[1 or B, N], 1.0 where a mini-batch is complete, else 0.0."""

    def spread(self, x: Tensor, size: int) -> Tensor:
        """[B, H, T, ...] to [B, H, N, K, ...]; zero where there is no frame."""
        num_places = self.num_mini_batches * size
        if self.slots is None:
            missing = num_places - x.shape[2]
            x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, missing)) if missing else x
        else:
            index = _as_index(self.slots, x)
            x = x.new_zeros(*x.shape[:2], num_places, *x.shape[3:]).scatter(2, index, x)
        return x.unflatten(2, (self.num_mini_batches, size))

    def gather(self, x: Tensor, num_frames: int) -> Tensor:
        """[B, H, N, K, f] back to [B, H, T, f]."""
        x = x.flatten(2, 3)
        if self.slots is None:
            return x[:, :, :num_frames]
        return x.gather(2, _as_index(self.slots, x))


def _as_index(slots: Tensor, x: Tensor) -> Tensor:
    """`slots` [B, T] as an index of dimension 2 of x [B, H, N, ...]."""
    trailing = x.shape[3:]
    index = slots.view(slots.shape[0], 1, slots.shape[1], *(1 for _ in trailing))
    return index.expand(-1, x.shape[1], -1, *trailing)


def lay_out(num_frames: int, size: int, documents: Tensor | None, like: Tensor) -> Layout:
    """Return the layout of rows of `num_frames` frames, in mini-batches of `size` frames.

    Args:
        documents: [B, T], see `ttt.ops.ttt_linear`. With them the device is asked how many
            mini-batches there are.
        like: a tensor of the device and type that `complete` is to have.
    """
    if documents is None:
        complete = like.new_ones(1, -(-num_frames // size))
        if num_frames % size:
            complete[:, -1] = 0.0
        return Layout(complete.shape[1], None, None, complete)
    numbers = number_chunks(num_frames, size, documents, device=like.device)
    frames = torch.arange(num_frames, device=like.device)
    opens = F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)
    positions = frames - torch.where(opens, frames, 0).cummax(1).values
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    num_mini_batches = int(numbers.max()) + 1
    zeros = like.new_zeros(documents.shape[0], num_mini_batches)
    return Layout(
        num_mini_batches,
        slots=numbers * size + positions,
        starts=zeros.scatter_add(1, numbers, begins.to(zeros)) > 0,
        complete=(zeros.scatter_add(1, numbers, torch.ones_like(numbers).to(zeros)) == size).to(
            zeros
        ),
    )
