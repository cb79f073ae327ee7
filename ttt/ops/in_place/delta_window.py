"""The dual form of `write: delta` in one window, forwards and backwards.

`in_place.delta` has the rule, the names and the formulas; this is its arithmetic, as precise as it
must be.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt.ops.in_place import chunks, terms

_PADDING = chunks.ROW_MULTIPLE
"""Frames for a chunk's sum, up to a multiple that products are fast for."""


class Kept(NamedTuple):
    """What a window's products are made with; n complete chunks."""

    scores: Tensor
    """[N, L, n, C', m], M ⊙ Z Kᵀ as `_left` has it; filled in for earlier chunks alone."""
    inverses: Tensor
    """[N, n, C, C], H⁻¹, zero in rows and columns of pairs that are not written."""
    again: Tensor
    """[N, n, lag, C], k_u · K_{i−1} for the first pairs u of chunk i."""
    strengths: Tensor
    """[N, n], λ."""
    counts: Tensor
    """[N, n], the pairs that λ is a mean over, at least 1."""


def _left(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights [..., C] of the frames of a chunk as left terms [..., C', m]: centered, and their
    mean. For wide types they are as they come, and C' = C."""
    if terms.num_terms(dtype) == 1:
        return x.unsqueeze(-1)
    mean = x.mean(-1, keepdim=True)
    ends = [mean, _rest(mean, dtype), mean]
    return terms.left(
        F.pad(torch.cat([x - mean, *ends], -1), (0, _PADDING - len(ends))), dtype, dim=-1
    )


def _right(x: Tensor, dtype: torch.dtype, *, swap: bool = False) -> Tensor:
    """Frames of a chunk [N, C, d] as right terms [N, C', m, d]: themselves, and their sum.

    Args:
        swap: the order of a left factor's terms, for weights that have a right one's.
    """
    if terms.num_terms(dtype) == 1:
        return x.unsqueeze(2)
    total = x.sum(1, keepdim=True)
    ends = [total, total, _rest(total, dtype)]
    padded = F.pad(torch.cat([x, *ends], 1), (0, 0, 0, _PADDING - len(ends)))
    return (terms.left if swap else terms.right)(padded, dtype, dim=2)


def _rest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What two terms leave of means and sums, for which they are not enough: x ≈ x₁ + x₂ + rest,
    and (x₁ + x₂) (y₁ + y₂) + rest (y₁ + y₂) + (x₁ + x₂) rest are three products of two terms."""
    high, low = terms.split(x, dtype)
    return x - high - low


def value(parts: Tensor, size: int, *, swap: bool = False) -> Tensor:
    """[N, n C, d], what `_right` made [N, n, C', m, d] of, in the accumulating type."""
    parts = parts[:, :, :size]
    high = parts[..., 0, :].to(terms.accumulating_dtype(parts.dtype))
    return (high if parts.shape[3] == 1 else high + parts[..., 2 if swap else 1, :]).flatten(1, 2)


def _times(left: Tensor, right: Tensor, out: Tensor) -> None:
    """OUT += A B of [N, I, k, C', m] and [N, k, C', m, J]."""
    terms.product(left.flatten(2), right.flatten(1, 3), out=out, keep=1.0)


def prepare(
    z: Tensor, written: Tensor | None, beta: Tensor, window: chunks.Window, cut: chunks.Cut
) -> Kept:
    """Args: z [N, F, h], the window's frames; written [N, L]."""
    batch, length, size = len(z), window.length, cut.chunk_size
    count, lead, offset = length // size, window.lead, cut.offset(window)
    dtype, wide = z.dtype, terms.accumulating_dtype(z.dtype)
    padded = size + _PADDING * (terms.num_terms(dtype) > 1)
    scores = z.new_empty(batch, length, count, padded, terms.num_terms(dtype))
    frames = lead + length
    products = chunks.aligned(z, batch, frames, frames, dtype=wide)
    if lead:
        terms.product(z[:, :lead], z[:, :lead].mT, out=products[:, :lead, :lead])
    for a, e, b in cut.blocks(length):
        rows = slice(lead + a, lead + b)
        terms.product(z[:, rows], z[:, : lead + b].mT, out=products[:, rows, : lead + b])
        if e == 0:
            continue
        # Pairs without a key have the weight 0.
        first = min(max(0, -offset), e)
        weights = products.new_zeros(batch, b - a, e)
        weights[:, :, first:] = products[:, rows, first + offset : e + offset]
        if cut.decay != 1:
            weights *= chunks.weights_by_age(a, b, 0, e, cut, z)
        scores[:, a:b, : e // size] = _left(weights.view(batch, b - a, e // size, size), dtype)
    grams = products.new_zeros(batch, count, size, size)
    again = products.new_zeros(batch, count, cut.lag, size)
    for i in range(count):
        keys, skip = places(i, window, cut)
        grams[:, i, skip:, skip:] = products[:, keys, keys]
        if i + 1 < count and cut.lag:
            again[:, i + 1, :, skip:] = products[:, keys.stop : keys.stop + cut.lag, keys]
    if written is not None:
        is_written = written[:, : count * size].view(batch, count, size)
        grams *= is_written[..., None] & is_written[..., None, :]
    inverses, strengths, counts = inverse(grams, beta)
    has_key = grams.diagonal(dim1=-2, dim2=-1) > 0
    inverses = torch.where(has_key[..., None] & has_key[..., None, :], inverses, 0.0)
    return Kept(scores, inverses, again, strengths, counts)


def places(i: int, window: chunks.Window, cut: chunks.Cut) -> tuple[slice, int]:
    """Where the keys of chunk i are among a window's frames, and how many of its first pairs have
    none."""
    start = i * cut.chunk_size + cut.offset(window)
    skip = max(0, -start)
    return slice(start + skip, start + cut.chunk_size), skip


def _steps(length: int, cut: chunks.Cut) -> Iterator[tuple[int, int, int]]:
    """The chunks of a window, each as (its number, its block's first and last + 1)."""
    for a, _, b in cut.blocks(length):
        first, last = a // cut.chunk_size, -(-b // cut.chunk_size)
        for i in range(first, last):
            yield i, first, last


def write(
    kept: Kept, v: Tensor, out: Tensor, e: Tensor, cut: chunks.Cut, edge: Tensor | None
) -> None:
    """One window, chunk by chunk: adds to OUT what its chunks read of each other, makes E.

    Args:
        v: [N, L, d].
        out: [N, L, d] in the accumulating type; holds what is read of earlier windows.
        e: [N, n, C', m, d], as from `_right`.
        edge: [N, lag, d], what the first pairs' keys read of earlier windows; None: nothing.
    """
    lag, size, length = cut.lag, cut.chunk_size, v.shape[1]
    errors = None
    for i, first, last in _steps(length, cut):
        start, stop = i * size, min((i + 1) * size, length)
        if i == first and i > 0:
            rows = slice(start, min(last * size, length))
            _times(kept.scores[:, rows, :i], e[:, :i], out[:, rows])
        if i > first:
            _times(kept.scores[:, start:stop, first:i], e[:, first:i], out[:, start:stop])
        if stop - start < size:
            continue
        residual = v[:, start:stop].to(out.dtype, copy=True)
        residual[:, lag:] -= out[:, start : stop - lag]
        if lag and errors is not None:
            residual[:, :lag] -= cut.decay * out[:, start - lag : start]
            residual[:, :lag] -= torch.bmm(kept.again[:, i], errors)
        elif edge is not None:
            residual[:, :lag] -= edge
        errors = torch.bmm(kept.inverses[:, i], residual)
        e[:, i] = _right(errors, v.dtype)


def write_backward(kept: Kept, d_out: Tensor, x: Tensor, cut: chunks.Cut) -> Tensor:
    """The adjoint of `write`, last chunk first.

    Args:
        d_out: [N, L, d].
        x: [N, n C, d] in the accumulating type, what E receives from later windows; becomes X.

    Returns:
        Y, [N, ⌈L / C⌉, C', m, d], as from `_right` with swapped terms; 0 for frames past the end.
    """
    lag, size, dtype = cut.lag, cut.chunk_size, d_out.dtype
    batch, length, width = d_out.shape
    num_chunks = -(-length // size)
    y = d_out.new_empty(batch, num_chunks, *kept.scores.shape[3:], width)
    weights = _transposed(kept.scores, num_chunks, cut) if x.shape[1] else kept.scores
    for i, _, last in reversed(list(_steps(length, cut))):
        start, stop = i * size, (i + 1) * size
        own_y = F.pad(d_out[:, start:stop].to(x.dtype), (0, 0, 0, max(0, stop - length)))
        if stop <= length:
            own_x = x[:, start:stop]
            if i + 1 == last < y.shape[1]:
                block = slice(i // (cut.block // size) * cut.block, stop)
                _times(weights[:, block, last:], y[:, last:], x[:, block])
            if i + 1 < last:
                _times(weights[:, start:stop, i + 1 : last], y[:, i + 1 : last], own_x)
            following = x[:, stop : stop + lag] if stop + size <= length else x[:, :0]
            if following.shape[1]:
                own_x -= torch.bmm(kept.again[:, i + 1].mT, following)
                own_y[:, size - lag :] -= cut.decay * following
            own_x.copy_(torch.bmm(kept.inverses[:, i], own_x))
            own_y[:, : size - lag] -= own_x[:, lag:]
        y[:, i] = _right(own_y, dtype, swap=True)
    return y


def _transposed(scores: Tensor, num_chunks: int, cut: chunks.Cut) -> Tensor:
    """[N, n C, num_chunks, C', m], of [N, L, n, C', m]: for each pair the weights of the frames."""
    size = cut.chunk_size
    batch, length, count, _, num_terms = scores.shape
    values = scores[:, :, :, :size, 0]
    if num_terms > 1:
        wide = terms.accumulating_dtype(scores.dtype)
        high, low = scores[..., 0].to(wide), scores[..., 2]
        # Centered weights, their mean, and what two terms have left of it: see `_left`.
        ends = (high + low)[..., size : size + 2].sum(-1, keepdim=True)
        values = (high + low)[..., :size] + ends
    values = values.reshape(batch, length, count * size)
    values = F.pad(values, (0, 0, 0, num_chunks * size - length))
    found = _left(values.mT.unflatten(2, (num_chunks, size)), scores.dtype)
    return found if num_terms == 1 else found[..., [0, 2, 1]]


def inverse(gram: Tensor, beta: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """H⁻¹ = (K Kᵀ + λ I)⁻¹ [..., C, C], zero where λ is; λ [...]; and the number of keys that are
    not zero, at least 1 [...]. Only K Kᵀ's lower triangle is read."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    squares = gram.diagonal(dim1=-2, dim2=-1)
    count = (squares > 0).sum(-1).clamp(min=1).to(gram.dtype)
    strength = squares.sum(-1) / count / beta
    scale = strength[..., None, None]
    # In units of λ, where all eigenvalues lie between 1 and 1 + C β, however small the keys.
    is_silent = scale == 0
    matrix = gram / torch.where(is_silent, 1.0, scale) + eye
    # Unlike `cholesky`, this does not ask the device whether it went well: it does, by λ.
    factor = torch.linalg.cholesky_ex(matrix).L
    half = torch.linalg.solve_triangular(factor, eye, upper=False)
    inverse = half.transpose(-2, -1) @ half
    inverse = torch.where(is_silent, 0.0, inverse / torch.where(is_silent, 1.0, scale))
    return inverse, strength, count
