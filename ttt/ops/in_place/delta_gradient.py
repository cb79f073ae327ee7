"""The gradient of `write: delta` to the frames of one window, by way of their products.

D are the gradients of the products z_t · z_s, by what frames read and by the matrices H, so that
dZ = (D + Dᵀ) Z. In 16 bits D + Dᵀ is a sum of two terms: gradients to keys that are nearly one
cancel each other.
"""

import torch
from torch import Tensor

from ttt.ops.in_place import chunks, delta_window, terms

TILE = 32
"""Rows and columns that one program makes."""


def of_products(
    kept: delta_window.Kept,
    x: Tensor,
    y: Tensor,
    e: Tensor,
    beta: Tensor,
    window: chunks.Window,
    cut: chunks.Cut,
) -> tuple[list[Tensor], Tensor]:
    """Return the terms of D + Dᵀ, the smallest first, each [N, F, F] in the frames' type, and dλ
    [N, n].

    Args:
        x, e: [N, n, C', m, d], X as left terms and E as right ones.
        y: [N, ⌈L / C⌉, C', m, d], Y as left terms.
    """
    left_of_x = x[:, :, : cut.chunk_size]
    if kept.strengths.shape[1] > 0 and y.dtype != beta.dtype and terms.has_kernels(y):
        return _by_kernel(kept, left_of_x, y, e, beta, window, cut)
    total, d_strengths = _plain(kept, left_of_x, y, e, beta, window, cut)
    if total.dtype == y.dtype:
        return [total], d_strengths
    return list(reversed(terms.split(total, y.dtype))), d_strengths


def _plain(
    kept: delta_window.Kept,
    left_of_x: Tensor,
    y: Tensor,
    e: Tensor,
    beta: Tensor,
    window: chunks.Window,
    cut: chunks.Cut,
) -> tuple[Tensor, Tensor]:
    """Return D + Dᵀ [N, F, F] and dλ [N, n], both in the accumulating type."""
    size = cut.chunk_size
    length, batch = window.length, len(y)
    d_scores = chunks.aligned(y, batch, length, length, dtype=beta.dtype)
    for a, end, b in cut.blocks(length):
        d_scores[:, a:b, end:b] = 0
        if end == 0:
            continue
        left, right = _factors(y, e, a, end, b, size)
        part = terms.product(left.flatten(1, 2), right.flatten(1, 2).mT)
        part = part.view(batch, *left.shape[1:3], *right.shape[1:3])[:, :, :size, :, :size]
        for i, rows in enumerate(d_scores[:, a:b, :end].split(size, dim=1)):
            rows.unflatten(2, part.shape[3:]).copy_(part[:, i, : rows.shape[1]])
        start = 0 if cut.decay != 1 else a
        if start < end:
            d_scores[:, a:b, start:end] *= chunks.weights_by_age(a, b, start, end, cut, y)
    total = chunks.gradient_of_products(d_scores, window, cut)
    count = kept.strengths.shape[1]
    if count == 0:
        return total, beta.new_zeros(batch, 0)
    d_matrices = _gradient_of_matrices(left_of_x, e, size).neg_()
    diagonals = d_matrices.diagonal(dim1=2, dim2=3)
    d_strengths = diagonals.sum(2)
    diagonals += _by_strength(d_strengths, kept, beta)
    d_matrices = d_matrices + d_matrices.mT
    for i in range(count):
        keys, skip = delta_window.places(i, window, cut)
        if i > 0 and cut.lag:
            read = _gradient_of_waiting(i, left_of_x, e, cut)
            before, skipped = delta_window.places(i - 1, window, cut)
            rows = slice(before.stop, before.stop + cut.lag)
            total[:, rows, before] -= read[:, :, skipped:]
            total[:, before, rows] -= read[:, :, skipped:].mT
        total[:, keys, keys] += d_matrices[:, i, skip:, skip:]
    return total, d_strengths


def _factors(y: Tensor, e: Tensor, a: int, end: int, b: int, size: int) -> tuple[Tensor, Tensor]:
    """Return Y of a block of rows from a to b and E of the pairs that they read, up to `end`, each
    [N, chunks, C' or C, m d]."""
    left, right = y[:, a // size : -(-b // size)], e[:, : end // size]
    # A single chunk without what is added to it, which would take another tile of a product.
    left = left[:, :, :size] if left.shape[1] == 1 else left
    return left.flatten(3), right.flatten(3)


def _gradient_of_matrices(left_of_x: Tensor, e: Tensor, size: int) -> Tensor:
    """Return X Eᵀ of each chunk, [N, n, C, C], which is −dH."""
    left, right = left_of_x.flatten(0, 1).flatten(2), e.flatten(0, 1)[:, :size].flatten(2)
    return terms.product(left, right.mT).unflatten(0, e.shape[:2])


def _by_strength(d_strengths: Tensor, kept: delta_window.Kept, beta: Tensor) -> Tensor:
    """Return what the squares of keys receive through λ, which is a mean of them: [N, n, C]."""
    is_counted = kept.inverses.diagonal(dim1=2, dim2=3) != 0
    return is_counted * (d_strengths / (kept.counts * beta)).unsqueeze(2)


def _gradient_of_waiting(i: int, left_of_x: Tensor, e: Tensor, cut: chunks.Cut) -> Tensor:
    """Return X Eᵀ of chunk i's first pairs and chunk i − 1, [N, lag, C]."""
    left, right = left_of_x[:, i, : cut.lag], e[:, i - 1, : cut.chunk_size]
    return terms.product(left.flatten(2), right.flatten(2).mT)


def _by_kernel(
    kept: delta_window.Kept,
    left_of_x: Tensor,
    y: Tensor,
    e: Tensor,
    beta: Tensor,
    window: chunks.Window,
    cut: chunks.Cut,
) -> tuple[list[Tensor], Tensor]:
    """Return the terms and dλ, put together of their products in one pass over memory."""
    from ttt.ops.in_place import gradient_kernels as kernels

    size, lag, length = cut.chunk_size, cut.lag, window.length
    batch, count = e.shape[:2]
    padded = e.shape[2]
    products = chunks.aligned(y, batch, y.shape[1] * padded, count * padded, dtype=beta.dtype)
    for a, end, b in cut.blocks(length):
        if end == 0:
            continue
        left, right = (x.flatten(1, 2) for x in _factors(y, e, a, end, b, size))
        first = a // size * padded
        out = products[:, first : first + left.shape[1], : right.shape[1]]
        terms.product(left, right.mT, out=out)
    matrices = _gradient_of_matrices(left_of_x, e, size)
    d_strengths = -matrices.diagonal(dim1=2, dim2=3).sum(2)
    diagonals = _by_strength(d_strengths, kept, beta)
    waiting = products.new_empty(batch, count, lag, size)
    for i in range(1, count if lag else 0):
        waiting[:, i] = _gradient_of_waiting(i, left_of_x, e, cut)
    ages = torch.arange(y.shape[1], device=y.device, dtype=beta.dtype)
    frames = window.lead + length
    high, low = (chunks.aligned(y, batch, frames, frames, dtype=y.dtype) for _ in range(2))
    tiles = -(-frames // TILE)
    with torch.cuda.device_of(y):
        kernels.gradient_kernel[(tiles, tiles, batch)](
            products,
            matrices,
            diagonals.contiguous(),
            waiting,
            torch.pow(cut.decay, ages),
            high,
            low,
            frames,
            window.lead,
            cut.offset(window),
            size,
            padded,
            count,
            lag,
            *products.stride()[:2],
            *high.stride()[:2],
            TILE=TILE,
            num_warps=4,
        )
    return [low, high], d_strengths


def add_weighted(
    parts: list[Tensor], frames: Tensor, d_frames: Tensor, num_read: int, *, replace: bool
) -> None:
    """dZ += Σ parts Z, or dZ = Σ parts Z. Frames from `num_read` on, whose chunk is open, have no
    weights among each other.

    The first part is the smallest: what it adds to is then rounded once.
    """
    keep, count = 0.0 if replace else 1.0, frames.shape[1]
    # Their weights among each other are zero, so that some of these may be read; one that is not
    # finite then spoils the others of the open chunk, as it does those of complete ones.
    end = -(-num_read // chunks.ROW_MULTIPLE) * chunks.ROW_MULTIPLE
    if num_read in (0, count) or end > count:
        chunks.weighted_frames(parts, frames, d_frames, beta=keep)
        return
    chunks.weighted_frames(parts, frames, d_frames[:, :num_read], beta=keep)
    for part in parts:
        d_frames[:, num_read:].baddbmm_(part[:, num_read:, :end], frames[:, :end], beta=keep)
        keep = 1.0
