"""A short causal convolution keeps the frames of a stream that its next ones look back to."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class ConvTail:
    """The last frames of each row's stream. Both tensors keep their address."""

    frames: Tensor
    """[B, kernel - 1, d], in the type of what is convolved."""
    has_begun: Tensor
    """[B], whether `frames` holds any; before its first frame a stream holds none."""

    @classmethod
    def new(cls, batch_size: int, num_frames: int, like: Tensor) -> "ConvTail":
        """Return the tail of rows that have not begun; `like` [..., d] tells width, type and
        device."""
        return cls(
            like.new_zeros(batch_size, num_frames, like.shape[-1]),
            torch.zeros(batch_size, dtype=torch.bool, device=like.device),
        )

    @torch.no_grad()
    def pass_by(self, x: Tensor, learns: Tensor) -> Tensor:
        """Take the next frames x [B, T, d] in, in the rows of `learns` [B].

        Returns:
            [B, kernel - 1, d], the frames before x: the first of x again where there are none.
        """
        before = torch.where(self.has_begun[:, None, None], self.frames, x[:, :1])
        last = torch.cat([before, x], dim=1)[:, -self.frames.shape[1] :]
        self.frames.copy_(torch.where(learns[:, None, None], last, self.frames))
        self.has_begun.logical_or_(learns)
        return before
