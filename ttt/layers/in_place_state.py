"""A stream keeps a state of each layer of `ttt.layers.in_place`."""

from dataclasses import dataclass

from torch import Tensor

from ttt.layers.base import TTTState


@dataclass
class InPlaceState(TTTState):
    """State of one layer: what it has learned in each row's stream, and the frames not yet
    written."""

    change: Tensor
    """[B, d, h], S: what the fast weights add to the projection W0. In float32 (float64 in a
    float64 model), apart from W0: a small change added to a bfloat16 W0 would lose half of
    itself."""
    pending_z: Tensor
    """[B, lag + C, h], the keys of the chunk before's last `lag` frames, which wait for their
    targets, and of the open chunk: activations, or those divided by their squared norms; zero where
    nothing is to be written."""
    pending_source: Tensor
    """[B, tail + C, d], what the targets of the open chunk are made of: its own frames, and the
    `tail` of those before that the conv reaches back to."""
    pending_read: Tensor | None
    """[B, lag + C, d], S z of the same frames as `pending_z`, with the S that the open chunk reads:
    `write: delta` compares its targets with it."""
    num_pending: Tensor
    """[B], frames in the open chunk, 0 to C - 1."""

    def fast_weights(self) -> tuple[Tensor, ...]:
        return (self.change,)
