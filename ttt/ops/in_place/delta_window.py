"""The dual form of `write: delta` in one window, forwards and backwards.

`in_place.delta` has the rule, the names and the formulas; this is its arithmetic, as precise as it
must be.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ttt.ops.in_place import chunks, terms

FACTOR_SIZE = 64
"""Rows of a matrix that one program factors: at 64, in its registers."""


class Kept(NamedTuple):
    """Tensors that a window's products are made with; n complete chunks."""

    products: Tensor
    """[N, F, F], z_t · z_s of the window's frames with the decay between them, in the accumulating
    type; only s in t's block of rows or before."""
    inverses: Tensor
    """[N, n, C, C], H⁻¹, zero in rows and columns of pairs that are not written."""
    again: Tensor
    """[N, n, lag, C], k_u · K_{i−1} for the first pairs u of chunk i."""
    strengths: Tensor
    """[N, n], λ."""
    counts: Tensor
    """[N, n], the pairs that λ is a mean over, at least 1."""


def value(parts: Tensor, size: int, *, swap: bool = False) -> Tensor:
    """[N, n C, d], what `terms.of_values` made [N, n, C', m, d] of, in the accumulating type."""
    parts = parts[:, :, :size]
    high = parts[..., 0, :].to(terms.accumulating_dtype(parts.dtype))
    return (high if parts.shape[3] == 1 else high + parts[..., 2 if swap else 1, :]).flatten(1, 2)


def _times(left: Tensor, right: Tensor, out: Tensor, keep: float = 1.0) -> None:
    """OUT = keep · OUT + A B of [N, I, k, C', m] and [N, k, C', m, J]."""
    terms.product(left.flatten(2), right.flatten(1, 3), out=out, keep=keep)


def prepare(
    z: Tensor, written: Tensor | None, beta: Tensor, window: chunks.Window, cut: chunks.Cut
) -> Kept:
    """Args: z [N, F, h], the window's frames; written [N, L]."""
    products = _products(z, window, cut)
    batch, size = len(z), cut.chunk_size
    count = window.length // size
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
    _decay(products, window, cut)
    return Kept(products, inverses, again, strengths, counts)


def prepare_again(
    z: Tensor, solved: tuple[Tensor, ...], window: chunks.Window, cut: chunks.Cut
) -> Kept:
    """Return what `prepare` does, of all that it has made but the products."""
    products = _products(z, window, cut)
    _decay(products, window, cut)
    return Kept(products, *solved)


def _products(z: Tensor, window: chunks.Window, cut: chunks.Cut) -> Tensor:
    """z_t · z_s of `Kept.products`, without decay."""
    batch, length, lead = len(z), window.length, window.lead
    frames, count, size = lead + length, length // cut.chunk_size, cut.chunk_size
    wide = terms.accumulating_dtype(z.dtype)
    products = chunks.aligned(z, batch, frames, frames, dtype=wide)
    if lead:
        terms.product(z[:, :lead], z[:, :lead].mT, out=products[:, :lead, :lead])
    for a, _, b in cut.blocks(length):
        # An open chunk writes nothing, so nobody needs its columns.
        rows, end = slice(lead + a, lead + b), lead + min(b, count * size)
        if end > lead:
            terms.product(z[:, rows], z[:, :end].mT, out=products[:, rows, :end])
    return products


def _decay(products: Tensor, window: chunks.Window, cut: chunks.Cut) -> None:
    """Weigh the products by the decay between their frames' chunks."""
    if cut.decay == 1:
        return
    lead, offset = window.lead, cut.offset(window)
    for a, e, b in cut.blocks(window.length):
        first = max(0, -offset)
        if first < e:
            part = products[:, lead + a : lead + b, first + offset : e + offset]
            part *= chunks.weights_by_age(a, b, first, e, cut, products)


def places(i: int, window: chunks.Window, cut: chunks.Cut) -> tuple[slice, int]:
    """Return where the keys of chunk i are among a window's frames, and how many of its first pairs
    have none."""
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
    kept: Kept,
    v: Tensor,
    out: Tensor,
    e: Tensor,
    window: chunks.Window,
    cut: chunks.Cut,
    edge: Tensor | None,
) -> None:
    """Write one window, chunk by chunk: add to OUT what its chunks read of each other, and make E.

    Without an `edge` nothing has been read of earlier windows, and OUT need not hold anything.

    Args:
        v: [N, L, d].
        out: [N, L, d] in the accumulating type; holds what is read of earlier windows.
        e: [N, n, C', m, d], as from `terms.of_values`.
        edge: [N, lag, d], what the first pairs' keys read of earlier windows; None: nothing.
    """
    lag, size, length = cut.lag, cut.chunk_size, v.shape[1]
    lead, offset = window.lead, cut.offset(window)
    first_read, errors, keep = edge, None, 0.0 if edge is None else 1.0
    for i, first, last in _steps(length, cut):
        start, stop = i * size, min((i + 1) * size, length)
        if i == first:
            a, b = first * size, min(last * size, length)
            end = max(0, (last - 1) * size + offset)
            if end > 0:
                scores = terms.of_weights(
                    kept.products[:, lead + a : lead + b, :end], size, v.dtype, shift=-offset
                )
            if i > 0:
                _times(scores[:, :, :i], e[:, :i], out[:, a:b], keep)
            elif edge is None:
                out[:, :size] = 0
        if i > first:
            rows = slice(start - a, stop - a)
            _times(
                scores[:, rows, first:i],
                e[:, first:i],
                out[:, start:stop],
                keep if first == 0 else 1.0,
            )
        if stop - start < size:
            continue
        if lag and errors is not None:
            before = out[:, start - lag : start]
            first_read = torch.baddbmm(before, kept.again[:, i], errors, beta=cut.decay)
        residual = _residual(v[:, start:stop], out[:, start:stop], first_read, lag)
        errors = torch.bmm(kept.inverses[:, i], residual)
        terms.of_values(errors, size, e[:, i])


def write_backward(
    kept: Kept,
    d_out: Tensor,
    x: Tensor,
    d_v: Tensor,
    window: chunks.Window,
    cut: chunks.Cut,
    *,
    is_empty: bool,
) -> tuple[Tensor, Tensor]:
    """The adjoint of `write`, last chunk first.

    Args:
        d_out: [N, L, d].
        x: [N, n C, d] in the accumulating type, what E receives from later windows; becomes X.
        d_v: [N, L, d], the gradient to V, which is X where a chunk is complete and 0 elsewhere.
        is_empty: nothing has been received of later windows, and X need not hold anything.

    Returns:
        Y and X, [N, ⌈L / C⌉, C', m, d] and [N, n, C', m, d], as from `terms.of_values` with
        swapped terms; Y is 0 for frames past the end.
    """
    lag, size, dtype = cut.lag, cut.chunk_size, d_out.dtype
    batch, length, width = d_out.shape
    num_chunks = -(-length // size)
    y, left_of_x = (
        d_out.new_empty(batch, n, *terms.shape(size, dtype), width)
        for n in (num_chunks, length // size)
    )
    d_v[:, x.shape[1] :] = 0
    for i, first, last in reversed(list(_steps(length, cut))):
        start, stop = i * size, (i + 1) * size
        less = None
        if stop <= length:
            own_x = x[:, start:stop]
            if stop == x.shape[1] or i + 1 == last:
                block = slice(first * size, stop)
                if last < num_chunks:
                    later = _transposed(kept, block, last, num_chunks, window, dtype, cut)
                    _times(later, y[:, last:], x[:, block], 0.0 if is_empty else 1.0)
                elif is_empty:
                    x[:, block] = 0
            if i + 1 < last:
                later = _transposed(kept, slice(start, stop), i + 1, last, window, dtype, cut)
                _times(later, y[:, i + 1 : last], own_x, 1.0)
            # The last chunk has none after it.
            again = kept.again[:, i + 1 : i + 2].flatten(1, 2)
            following = x[:, stop : stop + again.shape[1]]
            received = _received(own_x, again, following)
            torch.bmm(kept.inverses[:, i], received, out=own_x)
            terms.of_values(own_x, size, left_of_x[:, i], swap=True, rounded=d_v[:, start:stop])
            less = x[:, start + lag : stop + lag]
            if cut.decay != 1:
                less = torch.cat([less[:, : size - lag], cut.decay * following], 1)
        terms.of_values(d_out[:, start:stop], size, y[:, i], less=less, swap=True)
    return y, left_of_x


ROWS, COLUMNS = 16, 256
"""What one program of the kernels below takes."""


def _residual(v: Tensor, read: Tensor, first: Tensor | None, lag: int) -> Tensor:
    """V less what its keys read, [N, C, d] in the accumulating type.

    Args:
        v: [N, C, d] of a chunk.
        read: [N, C, d] in the accumulating type, what the chunk's frames read, which are keys `lag`
            frames later.
        first: [N, lag, d], what the keys of the first pairs read; None: nothing.
    """
    batch, size, width = v.shape
    out = torch.empty(v.shape, dtype=read.dtype, device=v.device)
    if v.dtype == read.dtype or not terms.has_kernels(v):
        torch.sub(v[:, lag:], read[:, : size - lag], out=out[:, lag:])
        out[:, :lag] = v[:, :lag] if first is None else v[:, :lag] - first
        return out
    from ttt.ops.in_place import delta_kernels as kernels

    num_first, first = (0, read) if first is None else (lag, first)
    with torch.cuda.device_of(v):
        kernels.residual_kernel[(-(-size // ROWS), -(-width // COLUMNS), batch)](
            v,
            read,
            first,
            out,
            size,
            width,
            lag,
            num_first,
            *v.stride()[:2],
            *read.stride()[:2],
            *first.stride()[:2],
            ROWS=ROWS,
            COLUMNS=COLUMNS,
        )
    return out


def _received(x: Tensor, again: Tensor, following: Tensor) -> Tensor:
    """X of a chunk, [N, C, d], less what the next one's first pairs hand back, `again`ᵀ
    `following` of [N, lag, C] and [N, lag, d]."""
    if x.dtype != torch.float32 or not terms.has_kernels(x):
        return torch.baddbmm(x, again.mT, following, alpha=-1)
    from ttt.ops.in_place import delta_kernels as kernels

    batch, size, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        kernels.received_kernel[(-(-size // ROWS), -(-width // COLUMNS), batch)](
            x,
            again,
            following,
            out,
            size,
            width,
            again.shape[1],
            *x.stride()[:2],
            *again.stride()[:2],
            *following.stride()[:2],
            ROWS=ROWS,
            COLUMNS=COLUMNS,
        )
    return out


def _transposed(
    kept: Kept,
    pairs: slice,
    first: int,
    last: int,
    window: chunks.Window,
    dtype: torch.dtype,
    cut: chunks.Cut,
) -> Tensor:
    """[N, P, last − first, C', m]: for each of the pairs the weights of the frames that read it in
    the chunks from `first` to before `last`."""
    size, offset = cut.chunk_size, cut.offset(window)
    rows = slice(window.lead + first * size, window.lead + min(last * size, window.length))
    keys = slice(max(0, pairs.start + offset), max(0, pairs.stop + offset))
    # The first pairs of all may have no key, and then no weights.
    skip = pairs.stop - pairs.start - (keys.stop - keys.start)
    return terms.of_weights(kept.products[:, rows, keys].mT, size, dtype, skip=skip, swap=True)


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
    if has_factor_kernel(matrix):
        half = torch.zeros_like(matrix)
        _invert_factor(matrix.flatten(0, -3), half.flatten(0, -3))
    else:
        # Unlike `cholesky`, this does not ask the device whether it went well: it does, by λ.
        factor = torch.linalg.cholesky_ex(matrix).L
        half = torch.linalg.solve_triangular(factor, eye, upper=False)
    inverse = half.transpose(-2, -1) @ half
    inverse = torch.where(is_silent, 0.0, inverse / torch.where(is_silent, 1.0, scale))
    return inverse, strength, count


def has_factor_kernel(matrix: Tensor) -> bool:
    """Return whether factors are made by a Triton kernel, which gives no gradients."""
    is_plain = matrix.dtype == torch.float32 and not matrix.requires_grad
    return matrix.is_cuda and is_plain and matrix.numel() > 0


def _invert_factor(matrix: Tensor, out: Tensor) -> None:
    """OUT = L⁻¹ of L Lᵀ = matrix, [M, C, C]; zeros before. What is left of the matrix is lost."""
    from ttt.ops.in_place import terms_kernels as kernels

    batch, size = matrix.shape[:2]
    if size <= FACTOR_SIZE:
        with torch.cuda.device_of(matrix):
            kernels.factor_kernel[(batch,)](
                matrix,
                out,
                size,
                *matrix.stride()[:2],
                *out.stride()[:2],
                BLOCK=max(16, 1 << (size - 1).bit_length()),
                num_warps=8,
            )
        return
    half = -(-size // (2 * FACTOR_SIZE)) * FACTOR_SIZE
    _invert_factor(matrix[:, :half, :half], out[:, :half, :half])
    # L = [[A, 0], [B, D]]: B from the lower rows, D from what is left of them.
    a, d = out[:, :half, :half], out[:, half:, half:]
    b = matrix[:, half:, :half] @ a.mT
    rest = matrix[:, half:, half:].baddbmm_(b, b.mT, alpha=-1)
    _invert_factor(rest, d)
    corner = out[:, half:, :half]
    torch.baddbmm(corner, d, b @ a, alpha=-1, beta=0, out=corner)
