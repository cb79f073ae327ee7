"""Rotary position embedding: pairs of channels turned by angles that grow with the position."""

import math

import torch
from torch import Tensor

RopeTable = tuple[Tensor, Tensor]
"""cos and ±sin [..., D], at least float32, of the angles by which each channel turns; see
`rotate`."""


def rope_table(
    positions: Tensor,
    head_width: int,
    theta: float,
    *,
    interleave: bool,
    dtype: torch.dtype = torch.float32,
) -> RopeTable:
    """Return the angles of `moshi`'s RoPE: pair i turns by position · theta^(−2i / D).

    Args:
        positions: [...], of any shape that broadcasts against that of what is turned, without its
            last dimension.
        head_width: D, even.
        interleave: see `rotate`.
    """
    pairs = torch.arange(head_width // 2, device=positions.device, dtype=dtype)
    frequencies = torch.exp(pairs * (-math.log(theta) * 2 / head_width))
    angles = frequencies * positions.to(dtype)[..., None]
    cos, sin = angles.cos(), angles.sin()
    dim = -1 if interleave else -2
    return torch.stack([cos, cos], dim).flatten(-2), torch.stack([-sin, sin], dim).flatten(-2)


def rotate(x: Tensor, table: RopeTable, *, interleave: bool) -> Tensor:
    """Turn x as `moshi` does, in the table's type and rounded once: of a pair (r, i),
    (r cos − i sin, i cos + r sin). Written as a product with each channel's partner, which
    compiles to one pass over memory where pairs put together again do not.

    Args:
        x: [..., D].
        interleave: pairs are neighbors (r0, i0, r1, i1, …), or else the halves of a head.
    """
    cos, sin = table
    if interleave:
        partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        partner = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return (x.to(cos.dtype) * cos + partner.to(cos.dtype) * sin).to(x.dtype)


def rope(x: Tensor, positions: Tensor, *, theta: float) -> Tensor:
    """Return x turned on interleaved pairs of channels, by positions of each row, in at least
    float32 and rounded once.

    Args:
        x: [B, H, T, f], f even.
        positions: [1 or B, T], for TTT those inside the mini-batch.
        theta: the slowest pair turns by about 1/theta a position.

    Returns:
        [B, H, T, f].
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    table = rope_table(positions[:, None], x.shape[-1], theta, interleave=True, dtype=dtype)
    return rotate(x, table, interleave=True)
