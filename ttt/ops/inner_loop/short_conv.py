"""A short causal convolution over time, channel by channel, that ties a frame to those before it.

    y_t = Σ_j weight[:, K − 1 − j] ⊙ x_{t−j},   j = 0 … K − 1

Before a document's first frame lies that frame again, as often as needed: with zeros there, a key
that is made of earlier frames alone would be zero, and the inner layer norm of TTT-Linear divides
by the size of what a key gives.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def short_conv(
    x: Tensor, weight: Tensor, *, before: Tensor | None = None, documents: Tensor | None = None
) -> Tensor:
    """Convolve over the frames up to each frame.

    Args:
        x: [B, T, d].
        weight: [d, K]; the last column weighs the frame itself.
        before: [B, K − 1, d], the frames before the first, if this goes on from earlier ones.
        documents: [B, T] integers; a new document begins wherever the number changes, and nothing
            passes from one to the next. None: every row is one document.

    Returns:
        [B, T, d] in the dtype of x; summed at least in float32.
    """
    if x.shape[1] == 0:
        return x
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = weight.to(dtype)
    terms = (
        frames.to(dtype) * taps
        for frames, taps in zip(
            _earlier(x, weight.shape[1], before, documents), weight.unbind(1), strict=True
        )
    )
    # From the oldest on, one after the other: in calls of any length the same sum.
    out = next(terms)
    for term in terms:
        out = out + term
    return out.to(x.dtype)


def _earlier(
    x: Tensor, size: int, before: Tensor | None, documents: Tensor | None
) -> tuple[Tensor, ...]:
    """x as it was `size − 1`, …, 1, 0 frames ago, each [B, T, d]."""
    num_frames = x.shape[1]
    if documents is not None:
        assert before is None
        frames = torch.arange(num_frames, device=x.device)
        begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
        first = torch.where(begins, frames, 0).cummax(1).values
        places = [torch.maximum(frames - ago, first) for ago in reversed(range(size))]
        return tuple(x.gather(1, place[:, :, None].expand_as(x)) for place in places)
    if before is None:
        before = x[:, :1].expand(-1, size - 1, -1)
    # Shifts and sums, which fuse where they are compiled.
    padded = torch.cat([before, x], dim=1)
    return tuple(padded[:, start : start + num_frames] for start in range(size))
