"""Numbers of 32 bits as sums of two of 16, for products that run on tensor cores.

A product of 16-bit factors is exact in a float32 accumulator, so what rounds is the factors alone:
one bfloat16 keeps 8 bits of mantissa, a sum of two keeps 16. Of the four products of two such sums,
the smallest is left out:

    x y ≈ x₁ y₁ + x₁ y₂ + x₂ y₁

The three come from one matrix product over a threefold inner dimension, in which the left factor
has the terms (x₁, x₁, x₂) and the right one (y₁, y₂, y₁), next to each other: so any range of the
inner dimension stays in one piece. Numbers of 32 or 64 bits are their own single term.
"""

import torch
from torch import Tensor


def accumulating_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type that sums of `dtype` are made in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def num_terms(dtype: torch.dtype) -> int:
    """Return how many terms a factor has in products of `dtype`: 3 for 16 bits, else 1."""
    return 1 if dtype == accumulating_dtype(dtype) else 3


def left(x: Tensor, dtype: torch.dtype, *, dim: int) -> Tensor:
    """Return the terms of x as a left factor, in a new dimension `dim` next to the inner one."""
    if num_terms(dtype) == 1:
        return x.unsqueeze(dim)
    high, low = split(x, dtype)
    return torch.stack([high, high, low], dim)


def right(x: Tensor, dtype: torch.dtype, *, dim: int) -> Tensor:
    """Return the terms of x as a right factor, in a new dimension `dim` next to the inner one."""
    if num_terms(dtype) == 1:
        return x.unsqueeze(dim)
    high, low = split(x, dtype)
    return torch.stack([high, low, high], dim)


def split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return two tensors of 16-bit `dtype` whose sum is x to twice their digits."""
    high = x.to(dtype)
    return high, (x - high).to(dtype)


def product(a: Tensor, b: Tensor, *, out: Tensor | None = None, keep: float = 0.0) -> Tensor:
    """Return A B of batches of matrices, in float32 (float64 for float64).

    Args:
        a: [N, I, K].
        b: [N, K, J], of the same type.
        out: [N, I, J] in the accumulating type, which then holds `keep` · OUT + A B.
    """
    dtype = accumulating_dtype(a.dtype)
    if a.dtype != dtype and not a.is_cuda:
        a, b = a.to(dtype), b.to(dtype)
    if out is None:
        return torch.bmm(a, b) if a.dtype == dtype else torch.bmm(a, b, dtype)
    if a.dtype == dtype:
        return torch.baddbmm(out, a, b, beta=keep, out=out)
    return torch.baddbmm(out, a, b, dtype, beta=keep, out=out)
