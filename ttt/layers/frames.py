"""Small functions of sequences of frames."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt.ops.in_place.terms import accumulating_dtype


def delayed(x: Tensor, lag: int) -> Tensor:
    """Return x of `lag` frames ago at each frame, [B, T, ·] of [B, T, ·], and zeros at first."""
    return F.pad(x, (0, 0, lag, 0))[:, : x.shape[1]] if lag else x


def only(x: Tensor, frames: Tensor | None) -> Tensor:
    """Return x [B, T, ·] at `frames` [B, T], and zero elsewhere; None: everywhere."""
    return x if frames is None else torch.where(frames.unsqueeze(-1), x, 0.0)


def relative_norm(change: Tensor, base: Tensor, frames: Tensor | None) -> Tensor:
    """Return ‖change‖ / ‖base‖ of [B, T, d] over `frames` [B, T]; None: over all."""
    return only(change, frames).float().norm() / only(base, frames).float().norm()


def normalized(source: Tensor) -> Tensor:
    """Return the frames of [B, T, d] divided by their RMS; frames of zeros stay zeros."""
    wide = source.to(accumulating_dtype(source.dtype))
    square = wide.square().mean(-1, keepdim=True)
    return (wide * torch.where(square > 0, square, 1.0).rsqrt()).to(source.dtype)


def inverse_square(z: Tensor) -> Tensor:
    """Return 1 / ‖z_t‖², [B, T, 1], at least in float32; 0 for frames of zeros."""
    square = z.to(accumulating_dtype(z.dtype)).square().sum(-1, keepdim=True)
    return torch.where(square > 0, 1 / torch.where(square > 0, square, 1.0), 0.0)


def complete(is_frame: Tensor | None, lag: int) -> Tensor | None:
    """Return whether the pair that is complete at a frame is one of frames alone, from its key's to
    its target's last, `lag` later: [B, T]; None: all are."""
    if is_frame is None:
        return None
    found = is_frame
    for shift in range(1, lag + 1):
        found = found & F.pad(is_frame, (shift, 0), value=True)[:, : is_frame.shape[1]]
    return found
