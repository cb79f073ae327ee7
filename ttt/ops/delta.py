"""In-Place TTT, `write: delta`: a chunk writes what the memory does not know yet.

    E_i     = (K_i K_iᵀ + λ_i I)⁻¹ (V_i − K_i S_iᵀ)        λ_i = mean_u ‖k_u‖² / β
    S_{i+1} = γ S_i + E_iᵀ K_i,    o_t = S_{chunk(t)} z_t

Regularised least squares on the residual: what a chunk has in common with those before it is not
written again, so the state stays bounded however long the stream. Only complete chunks write. The
mean is over the pairs that are written and whose keys are not zero; without any, nothing is.

Reading is as for `sum`, with E in place of V (`ttt.ops.chunks`), so no state is kept per chunk
either. With H_i = K_i K_iᵀ + λ_i I, whose inverses depend on no state and are all made at once, and
O, R and P what frames read, what keys read, and what errors receive from later chunks,

    forward, first chunk to last:     R_i = K_i S_iᵀ,   E_i = H_i⁻¹ (V_i − R_i)
    backward, last chunk to first:    P_i = Σ_{j>i} γ^… (K_i Z_jᵀ) Y_j,   X_i = H_i⁻¹ P_i
    dV = X,  dH_i = −X_i E_iᵀ,  dZ as for `sum` with Y in place of dO, and by dH_i.

A key's own frame has mostly read just R already. The exception are the last `lag` frames of a chunk,
whose pairs the next chunk writes: they are read again with what their own chunk has written,

    R_u = γ O_t + (k_u · K_{i−1}) E_{i−1},   t = u − lag in chunk i − 1, u in chunk i.

So Y_t = dO_t − X_u for most frames, dO_t − γ X_u for these, and dO_t where the pair is not written.

With 16-bit inputs the products of z are exact, and what is made of them is precise: H⁻¹ enlarges
what is rounded, and one bfloat16 each for Z Kᵀ and E put outputs wrong by as much as their size.
Inverses and what they are multiplied with are in float32; Z Kᵀ and E are sums of two terms
(`ttt.ops.terms`); and as keys that are nearly one (silence) have errors E that are large and cancel
each other, a frame reads a chunk's sum of E apart,

    Σ_u w_u E_u = w̄ Σ_u E_u + Σ_u (w_u − w̄) E_u,   w̄ = mean_u w_u,   w = z_t Kᵀ,

so that rounding counts by how much keys differ. Likewise what errors receive from a chunk's Y.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt.ops import chunks, terms


@torch.compiler.disable
def in_place_delta(
    z: Tensor,
    v: Tensor,
    *,
    beta: Tensor | float,
    chunk_size: int,
    decay: float = 1.0,
    documents: Tensor | None = None,
    lag: int = 0,
    written: Tensor | None = None,
) -> Tensor:
    """Return what the fast weights add to the output of the projection that they change.

    The inverses are made in float32 whatever the inputs, in float64 for float64: accurate while β
    stays below some 1e3 (docs/numerics.md).

    Args:
        z: [B, T, h], the projection's inputs: keys when written, queries when read.
        v: [B, T, d], the targets that are complete at each frame.
        beta: β > 0, a number or a tensor of one element: how nearly a chunk's targets are met.
        chunk_size: frames per chunk, counted from the start of each document.
        decay: γ, how much of the state outlives each later chunk, 0 to 1.
        documents: [B, T] integers; a new document begins wherever the number changes, and nothing
            passes from one to the next. None: every row is one document.
        lag: v_u is the target of frame u − lag, whose z is its key; 0 to chunk_size − 1. The first
            `lag` frames of a document complete nothing.
        written: [B, T], false where the pair that is complete at a frame is not written. None: all
            are.

    Returns:
        [B, T, d]. Zero within the first chunk of each document.
    """
    if documents is not None:
        lengths = chunks.split_documents(documents)
        flat = [z.flatten(0, 1).split(lengths), v.flatten(0, 1).split(lengths)]
        if written is not None:
            flat.append(written.flatten().split(lengths))
        parts = [
            in_place_delta(
                *(x.unsqueeze(0) for x in part[:2]),
                beta=beta,
                chunk_size=chunk_size,
                decay=decay,
                lag=lag,
                written=part[2].unsqueeze(0) if written is not None else None,
            )
            for part in zip(*flat, strict=True)
        ]
        return torch.cat(parts, dim=1).view(v.shape)
    beta = torch.as_tensor(beta, dtype=terms.accumulating_dtype(z.dtype), device=z.device)
    cut = chunks.cut(z.shape[1], chunk_size, v.shape[2], z.shape[2], decay, lag)
    return _Delta.apply(z.contiguous(), v.contiguous(), beta.reshape(()), written, cut)


def chunk_errors(keys: Tensor, residual: Tensor, beta: Tensor | float) -> Tensor:
    """Return E of one chunk, as streaming writes it.

    Args:
        keys: [B, C, h], zero where nothing is to be written.
        residual: [B, C, d], V − K Sᵀ.
        beta: see `in_place_delta`.

    Returns:
        [B, C, d], at least in float32.
    """
    inverse, _, _ = _inverse(chunks.gram(keys), beta)
    return inverse @ residual.to(inverse.dtype)


def _inverse(gram: Tensor, beta: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
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


_PADDING = chunks.ROW_MULTIPLE
"""Frames for a chunk's sum, up to a multiple that products are fast for."""


class _Kept(NamedTuple):
    """What a window's products are made with; n complete chunks."""

    scores: Tensor
    """[N, L, n, C', m], M ⊙ Z Kᵀ as `_left` gives it; only what earlier chunks wrote is filled in."""
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


def _value(parts: Tensor, size: int, *, swap: bool = False) -> Tensor:
    """[N, n C, d], what `_right` made [N, n, C', m, d] of, in the accumulating type."""
    parts = parts[:, :, :size]
    high = parts[..., 0, :].to(terms.accumulating_dtype(parts.dtype))
    return (high if parts.shape[3] == 1 else high + parts[..., 2 if swap else 1, :]).flatten(1, 2)


def _times(left: Tensor, right: Tensor, out: Tensor) -> None:
    """OUT += A B of [N, I, k, C', m] and [N, k, C', m, J]."""
    terms.product(left.flatten(2), right.flatten(1, 3), out=out, keep=1.0)


def _prepare(
    z: Tensor, written: Tensor | None, beta: Tensor, window: chunks.Window, cut: chunks.Cut
) -> _Kept:
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
        keys, skip = _places(i, window, cut)
        grams[:, i, skip:, skip:] = products[:, keys, keys]
        if i + 1 < count and cut.lag:
            again[:, i + 1, :, skip:] = products[:, keys.stop : keys.stop + cut.lag, keys]
    if written is not None:
        is_written = written[:, : count * size].view(batch, count, size)
        grams *= is_written[..., None] & is_written[..., None, :]
    inverses, strengths, counts = _inverse(grams, beta)
    has_key = grams.diagonal(dim1=-2, dim2=-1) > 0
    inverses = torch.where(has_key[..., None] & has_key[..., None, :], inverses, 0.0)
    return _Kept(scores, inverses, again, strengths, counts)


def _places(i: int, window: chunks.Window, cut: chunks.Cut) -> tuple[slice, int]:
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


def _write(
    kept: _Kept, v: Tensor, out: Tensor, e: Tensor, cut: chunks.Cut, edge: Tensor | None
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


def _write_backward(kept: _Kept, d_out: Tensor, x: Tensor, cut: chunks.Cut) -> Tensor:
    """The adjoint of `_write`, last chunk first.

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


class _Delta(torch.autograd.Function):
    """Keeps z, E, the scores and the inverses for the backward pass; v is not needed."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, v: Tensor, beta: Tensor, written: Tensor | None, cut: chunks.Cut
    ) -> Tensor:
        out = torch.empty_like(v)
        saved: list[Tensor] = []
        for group in cut.windows(len(z)):
            state = chunks.State(cut, precise=True)
            for window in group:
                frames, own_v = window.frames(z), window.own(v)
                rows = None if written is None else window.own(written)
                kept = _prepare(frames, rows, beta, window, cut)
                read = own_v.new_zeros(own_v.shape, dtype=beta.dtype)
                edge = None
                if state.value is not None:
                    state.read(window.own(z)[0], read[0])
                    edge = read.new_zeros(1, window.lead, v.shape[2])
                    state.read(frames[0, : window.lead], edge[0], weighted=False)
                e = v.new_empty(len(own_v), *kept.scores.shape[2:], v.shape[2])
                _write(kept, own_v, read, e, cut, edge)
                window.own(out).copy_(read)
                if window.stop < cut.num_frames:
                    _add_keys(state, _value(e, cut.chunk_size)[0], frames[0], window, cut)
                saved += [*kept, e]
        ctx.save_for_backward(z, beta, *saved)
        ctx.cut = cut
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, beta, *saved = ctx.saved_tensors
        cut: chunks.Cut = ctx.cut
        d_out = grads[0].contiguous()
        d_z = torch.empty_like(z) if cut.is_whole else torch.zeros_like(z)
        d_v = torch.zeros_like(d_out)
        d_beta = torch.zeros_like(beta)
        size = len(_Kept._fields) + 1
        per_window = (saved[i : i + size] for i in range(0, len(saved), size))
        for group in cut.windows(len(z)):
            parts = [(window, *next(per_window)) for window in group]
            later = chunks.State(cut, reverse=True, precise=True)
            adjoints = []
            for window, *tensors, e in reversed(parts):
                kept = _Kept(*tensors)
                frames = window.frames(z)
                shape = len(e), e.shape[1] * cut.chunk_size, e.shape[4]
                x = e.new_zeros(shape, dtype=beta.dtype)
                if later.value is not None:
                    later.read(_keys(frames[0], window, cut)[: x.shape[1]], x[0])
                y = _write_backward(kept, window.own(d_out), x, cut)
                window.own(d_v)[:, : x.shape[1]] = x
                d_products, d_strengths = _gradient_of_products(kept, x, y, e, beta, window, cut)
                d_beta -= (d_strengths * kept.strengths).sum() / beta
                _add_weighted(d_products, frames, window.frames(d_z), replace=cut.is_whole)
                adjoints.append((x, y))
                if later.value is not None:
                    first = max(0, -cut.offset(window))
                    d_keys = window.frames(d_z)[0, : window.length - first]
                    later.read_transposed(
                        _value(e, cut.chunk_size)[0], d_keys[: len(x[0]) - first], first=first
                    )
                if window.start > 0:
                    own_y = _value(y, cut.chunk_size, swap=True)[0, : window.length]
                    later.add(own_y, window.own(z)[0])
                    edge = -x[0, : window.lead]
                    later.add_halo(edge, frames[0, : len(edge)])
            if len(group) > 1:
                _add_gradient_of_reads(parts, adjoints[::-1], z, d_z, cut)
        return d_z, d_v, d_beta, None, None


def _keys(frames: Tensor, window: chunks.Window, cut: chunks.Cut) -> Tensor:
    """[L, h], the keys of a window's pairs, zero where there is none."""
    first = max(0, -cut.offset(window))
    return F.pad(frames[: window.length - first], (0, 0, first, 0))


def _add_keys(
    state: chunks.State, e: Tensor, frames: Tensor, window: chunks.Window, cut: chunks.Cut
) -> None:
    """The pairs of a full window into the state: e [L, d], frames [F, h]."""
    first = max(0, -cut.offset(window))
    state.add(e, frames[: window.length - first], first=first)


def _gradient_of_products(
    kept: _Kept,
    x: Tensor,
    y: Tensor,
    e: Tensor,
    beta: Tensor,
    window: chunks.Window,
    cut: chunks.Cut,
) -> tuple[Tensor, Tensor]:
    """D + Dᵀ [N, F, F] for dZ = (D + Dᵀ) Z, and dλ [N, n], both in the accumulating type."""
    size = cut.chunk_size
    length, batch = window.length, len(y)
    d_scores = chunks.aligned(y, batch, length, length, dtype=beta.dtype)
    for a, end, b in cut.blocks(length):
        d_scores[:, a:b, end:b] = 0
        if end == 0:
            continue
        left = y[:, a // size : -(-b // size)].flatten(3)
        right = e[:, : end // size].flatten(3)
        part = terms.product(left.flatten(1, 2), right.flatten(1, 2).mT)
        part = part.view(batch, left.shape[1], left.shape[2], right.shape[1], right.shape[2])
        part = part[:, :, :size, :, :size].reshape(batch, -1, end)[:, : b - a]
        start = 0 if cut.decay != 1 else a
        if start < end:
            part[:, :, start:] *= chunks.weights_by_age(a, b, start, end, cut, y)
        d_scores[:, a:b, :end] = part
    total = chunks.gradient_of_products(d_scores, window, cut)
    left_of_x = terms.left(x, y.dtype, dim=2).flatten(2)
    d_strengths = []
    for i in range(kept.strengths.shape[1]):
        start = i * size
        keys, skip = _places(i, window, cut)
        if i > 0 and cut.lag:
            read = terms.product(
                left_of_x[:, start : start + cut.lag], e[:, i - 1, :size].flatten(2).mT
            )
            before, skipped = _places(i - 1, window, cut)
            rows = slice(before.stop, before.stop + cut.lag)
            total[:, rows, before] -= read[:, :, skipped:]
            total[:, before, rows] -= read[:, :, skipped:].mT
        d_matrix = terms.product(
            left_of_x[:, start : start + size], e[:, i, :size].flatten(2).mT
        ).neg_()
        diagonal = d_matrix.diagonal(dim1=1, dim2=2)
        d_strength = diagonal.sum(1)
        is_counted = kept.inverses[:, i].diagonal(dim1=1, dim2=2) != 0
        diagonal += is_counted * (d_strength / (kept.counts[:, i] * beta)).unsqueeze(1)
        d_matrix = d_matrix[:, skip:, skip:]
        total[:, keys, keys] += d_matrix + d_matrix.mT
        d_strengths.append(d_strength)
    if not d_strengths:
        return total, x.new_zeros(len(x), 0)
    return total, torch.stack(d_strengths, dim=1)


def _add_weighted(weights: Tensor, frames: Tensor, d_frames: Tensor, *, replace: bool) -> None:
    """dZ += weights Z, or dZ = weights Z."""
    keep = 0.0 if replace else 1.0
    if weights.dtype == frames.dtype:
        chunks.weighted_frames(weights, frames, d_frames, beta=keep)
        return
    high, low = terms.split(weights, frames.dtype)
    chunks.weighted_frames(low, frames, d_frames, beta=keep)
    chunks.weighted_frames(high, frames, d_frames, beta=1.0)


def _add_gradient_of_reads(
    parts: list[tuple[Any, ...]],
    adjoints: list[tuple[Tensor, Tensor]],
    z: Tensor,
    d_z: Tensor,
    cut: chunks.Cut,
) -> None:
    """dZ += what reading earlier windows hands back, for the windows of one row: makes the state
    once more."""
    state = chunks.State(cut)
    for (window, *_, e), (x, y) in zip(parts, adjoints, strict=True):
        frames, d_frames = window.frames(z)[0], window.frames(d_z)[0]
        own_y = _value(y, cut.chunk_size, swap=True)[0, : window.length]
        state.read_transposed(own_y, window.own(d_z)[0])
        edge = -x[0, : window.lead]
        state.read_transposed(edge, d_frames[: len(edge)], weighted=False)
        if window.stop < cut.num_frames:
            _add_keys(state, _value(e, cut.chunk_size)[0], frames, window, cut)
