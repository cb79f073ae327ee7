"""With `write: sum`, the output projection of a gated MLP learns while it reads.

A chunk i writes `Δ_i = Σ v_u k_uᵀ` over its pairs (optionally bounded in norm), and a frame reads
the sum over strictly earlier chunks of its own document, `η Σ_{j<i} γ^(i−1−j) Δ_j z_t`. No weight
is ever built for it: with pairs, keys K and M as in `in_place.chunks`,

    O = η (M ⊙ Z Kᵀ) V                                            (the dual form)
    dZ = η D K,  dK = η Dᵀ Z,  dV = η (M ⊙ Z Kᵀ)ᵀ dO              with D = M ⊙ dO Vᵀ
    ‖Δ_i‖² = Σ (K_i K_iᵀ) ⊙ (V_i V_iᵀ)

inside super-chunks, and one state carried between them: exact, and linear in T.

Source: In-Place Test-Time Training (ICLR 2026), algorithm 1; docs/mathematics.md.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ttt.ops.autocast import without_autocast
from ttt.ops.compiler_marks import uncompiled
from ttt.ops.in_place import chunks, terms
from ttt.ops.in_place.checks import (
    check_chunk_size,
    check_lookahead,
    check_norm,
    check_sequence,
)


@uncompiled
@without_autocast
def in_place_ttt(
    z: Tensor,
    v: Tensor,
    *,
    lr: float,
    chunk_size: int,
    max_delta_norm: float | None = None,
    documents: Tensor | None = None,
    decay: float = 1.0,
    lag: int = 0,
) -> Tensor:
    """Return what the fast weights add to the output of the projection that they change.

    Inputs of two types are taken in the type that both fit in; `torch.autocast` changes nothing.

    Args:
        z: [B, T, h], the projection's inputs: keys when written, queries when read.
        v: [B, T, d], the targets that are complete at each frame.
        lr: inner learning rate η, without unit.
        chunk_size: frames per chunk, counted from the start of each document.
        max_delta_norm: upper bound on ‖Δ_i‖_F, before η; None: no bound.
        documents: [B, T] integers; a new document begins wherever the number changes, and nothing
            passes from one to the next. None: every row is one document.
        decay: γ, how much of the state outlives each later chunk, 0 to 1.
        lag: v_u is the target of frame u − lag, whose z is its key; 0 to chunk_size − 1. The first
            `lag` frames of a document complete nothing.

    Returns:
        [B, T, d], in the type that the inputs fit in. Zero within the first chunk of each document.

    Raises:
        ValueError: an argument out of range or shape.
    """
    check_norm(max_delta_norm)
    check_sequence(z, v, chunk_size=chunk_size, decay=decay, lag=lag, documents=documents)
    z, v = terms.promoted(z, v)
    if documents is not None and documents.numel() > 0:
        lengths = chunks.split_documents(documents)
        parts = [
            in_place_ttt(
                z_part.unsqueeze(0),
                v_part.unsqueeze(0),
                lr=lr,
                chunk_size=chunk_size,
                max_delta_norm=max_delta_norm,
                decay=decay,
                lag=lag,
            )
            for z_part, v_part in zip(
                z.flatten(0, 1).split(lengths), v.flatten(0, 1).split(lengths), strict=True
            )
        ]
        return torch.cat(parts, dim=1).view(v.shape)
    cut = chunks.cut(z.shape[1], chunk_size, v.shape[2], z.shape[2], decay, lag, batch=len(z))
    if max_delta_norm is not None:
        v = _bounded(z, v, chunk_size, max_delta_norm, lag)
    return _Sum.apply(z.contiguous(), v.contiguous(), lr, cut)


def causal_conv(x: Tensor, weight: Tensor, *, documents: Tensor | None = None) -> Tensor:
    """Return the depthwise convolution of each frame with those before it in its document.

    Args:
        x: [B, T, d].
        weight: [d, K], oldest frame first: frame t is made of frames t − (K − 1) to t; those before
            the document count as zero.
        documents: see `in_place_ttt`.

    Returns:
        [B, T, d].
    """
    num_frames, kernel_size = x.shape[1], weight.shape[-1]
    total = x * weight[:, -1]
    for k in range(max(0, kernel_size - num_frames), kernel_size - 1):
        shift = kernel_size - 1 - k
        term = x[:, : num_frames - shift] * weight[:, k]
        if documents is not None:
            same = documents[:, shift:] == documents[:, : num_frames - shift]
            # Numbers of documents may come again: all frames between must be of it too.
            for middle in range(1, shift):
                same = same & (documents[:, shift:] == documents[:, middle : middle - shift])
            term = torch.where(same.unsqueeze(-1), term, 0.0)
        total = total + F.pad(term, (0, 0, shift, 0))
    return total


def chunk_conv(
    x: Tensor,
    weight: Tensor,
    *,
    chunk_size: int,
    lookahead: int,
    documents: Tensor | None = None,
) -> Tensor:
    """Return the depthwise convolution over time that sees nothing outside a frame's own chunk.

    Frame t is made of frames `t - (K - 1 - lookahead)` to `t + lookahead`; those of another chunk
    count as zero.

    Args:
        x: [B, T, d].
        weight: [d, K], oldest frame first.
        chunk_size: frames per chunk, counted from the start of each document.
        lookahead: how many of the K frames lie ahead of t, 0 to K - 1.
        documents: see `in_place_ttt`.

    Returns:
        [B, T, d].

    Raises:
        ValueError: a `chunk_size` or a `lookahead` out of range.
    """
    num_frames, kernel_size = x.shape[1], weight.shape[-1]
    check_chunk_size(chunk_size)
    check_lookahead(lookahead, kernel_size)
    numbers = chunks.number_chunks(num_frames, chunk_size, documents, device=x.device)
    total = torch.zeros_like(x)
    for k in range(kernel_size):
        # Tap k reads x[t + shift].
        shift = k - (kernel_size - 1 - lookahead)
        if abs(shift) >= num_frames:
            continue
        here = slice(max(0, -shift), num_frames - max(0, shift))
        there = slice(max(0, shift), num_frames + min(0, shift))
        same_chunk = (numbers[:, here] == numbers[:, there]).unsqueeze(-1)
        term = torch.where(same_chunk, x[:, there] * weight[:, k], 0.0)
        total = total + F.pad(term, (0, 0, max(0, -shift), max(0, shift)))
    return total


@without_autocast
def chunk_delta(z: Tensor, v: Tensor, *, max_delta_norm: float | None = None) -> Tensor:
    """Return Δ of one chunk, as streaming writes it.

    Args:
        z: [B, C, h].
        v: [B, C, d].
        max_delta_norm: see `in_place_ttt`.

    Returns:
        [B, d, h], at least in float32.

    Raises:
        ValueError: a `max_delta_norm` out of range.
    """
    check_norm(max_delta_norm)
    delta = terms.product(v.transpose(1, 2), z)
    if max_delta_norm is not None:
        norm = torch.linalg.vector_norm(delta, dim=(1, 2), keepdim=True)
        delta = delta * (max_delta_norm / norm.clamp(min=max_delta_norm))
    return delta


@without_autocast
def delta_norm_square(z: Tensor, v: Tensor, chunk_size: int, lag: int = 0) -> Tensor:
    """Return ‖Δ_i‖²_F of the complete chunks, [B, T // C], at least in float32; no Δ is built.

    Args:
        z: [B, T, h].
        v: [B, T, d].
        chunk_size, lag: see `in_place_ttt`.
    """
    squares = []
    for end in range(chunk_size, z.shape[1] + 1, chunk_size):
        first = max(lag, end - chunk_size)
        keys = chunks.gram(z[:, first - lag : end - lag])
        squares.append((keys * chunks.gram(v[:, first:end])).sum((1, 2)))
    # Rounding can leave a sum of squares a little below zero.
    return torch.stack(squares, dim=1).clamp(min=0)


def _bounded(z: Tensor, v: Tensor, chunk_size: int, max_delta_norm: float, lag: int) -> Tensor:
    """The targets, scaled down in the complete chunks whose Δ is too long."""
    num_frames = v.shape[1]
    if num_frames < chunk_size:
        return v
    square = delta_norm_square(z, v, chunk_size, lag)
    too_long = square > max_delta_norm**2
    # The inner `where` keeps the square root away from 0, where its gradient is infinite.
    scale = max_delta_norm * torch.rsqrt(torch.where(too_long, square, 1.0))
    scale = torch.where(too_long, scale, 1.0).repeat_interleave(chunk_size, dim=1)
    scale = F.pad(scale, (0, num_frames - scale.shape[1]), value=1.0)
    return v * scale.unsqueeze(2).to(v.dtype)


def _scores(x: Tensor, y: Tensor, window: chunks.Window, cut: chunks.Cut) -> Tensor:
    """M[t, u] x_t · y_u, [N, L, L] in the type of x: rows are the window's own frames, columns its
    pairs. Columns that no chunk of a block of rows reads are left unwritten beyond the block, and
    zero within it.

    Args:
        x: [N, L, ·], of the frames that read.
        y: [N, F, ·]: column u is y[offset + u], and zero where there is no such frame.
    """
    length, offset = window.length, y.shape[1] - window.length - cut.lag
    first = max(0, -offset)
    out = chunks.aligned(x, len(x), length, length, dtype=x.dtype)
    for a, e, b in cut.blocks(length):
        out[:, a:b, e:b] = 0
        out[:, a:b, : min(first, e)] = 0
        if first >= e:
            continue
        part = out[:, a:b, first:e]
        keys = y[:, first + offset : e + offset].transpose(1, 2)
        if first:
            # Not into `out`, whose columns from `first` on do not start at multiples of 16 bytes.
            part.copy_(torch.bmm(x[:, a:b], keys))
        else:
            torch.bmm(x[:, a:b], keys, out=part)
        # Without decay only the block on the diagonal needs weights.
        start = max(first, 0 if cut.decay != 1 else a)
        if start < e:
            weights = chunks.weights_by_age(a, b, start, e, cut, x)
            part = out[:, a:b, start:e]
            # Not 0 · x: a frame that is not finite must not reach earlier ones.
            part.mul_(weights).masked_fill_(weights == 0, 0.0)
    return out


def _read_earlier(weights: Tensor, v: Tensor, out: Tensor, lr: float, cut: chunks.Cut) -> None:
    """OUT = η (weights V), inside super-chunks."""
    for a, e, b in cut.blocks(v.shape[1]):
        if e == 0:
            out[:, a:b] = 0
            continue
        if a > 0:
            out[:, a:b].baddbmm_(weights[:, a:b, :a], v[:, :a], beta=0, alpha=lr)
        if e > a:
            # Chunks that end in this block: a frame that is not finite reaches later ones alone,
            # and 0 · NaN would reach all.
            here = v[:, a:e]
            is_bad = ~here.isfinite().all(-1, keepdim=True)
            clean = torch.where(is_bad, 0.0, here)
            out[:, a:b].baddbmm_(weights[:, a:b, a:e], clean, beta=a > 0, alpha=lr)
            chunk = torch.arange(b - a, device=v.device) // cut.chunk_size
            is_later = (chunk[:, None] > chunk[: e - a]).to(v.dtype)
            is_reached = is_later @ is_bad.to(v.dtype) > 0
            out[:, a:b].masked_fill_(is_reached, float("nan"))


def _read_later(weights: Tensor, d_out: Tensor, d_v: Tensor, lr: float, cut: chunks.Cut) -> None:
    """dV = η (weightsᵀ dO), inside super-chunks."""
    length = d_v.shape[1]
    for a, _, b in cut.blocks(length):
        first = b if cut.block == cut.chunk_size else a
        if first >= length:
            d_v[:, a:b] = 0
        else:
            later = weights[:, first:, a:b].transpose(1, 2)
            d_v[:, a:b].baddbmm_(later, d_out[:, first:], beta=0, alpha=lr)


class _Sum(torch.autograd.Function):
    """Keeps z, v and the scores for the backward pass: at 2048 frames, these take a
    fifth of z's memory at h = 11264 and spare its most expensive product. The state is made again.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, v: Tensor, lr: float, cut: chunks.Cut) -> Tensor:
        out = torch.empty_like(v)
        kept = []
        for group in cut.windows(len(z)):
            state = chunks.State(cut)
            for window in group:
                keys, own_out = window.frames(z), window.own(out)
                queries, own_v = window.own(z), window.own(v)
                kept.append(_scores(queries, keys, window, cut))
                _read_earlier(kept[-1], own_v, own_out, lr, cut)
                if len(group) > 1:
                    state.read(queries[0], own_out[0], lr)
                    _write(state, own_v, keys, window, cut)
        ctx.save_for_backward(z, v, *kept)
        ctx.lr, ctx.cut = lr, cut
        return out

    @staticmethod
    @once_differentiable  # it writes into memory of its own, which no gradient can pass
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, v, *kept = ctx.saved_tensors
        lr, cut = ctx.lr, ctx.cut
        d_out = grads[0].contiguous()
        d_z, d_v = torch.zeros_like(z), torch.empty_like(v)
        weights = iter(kept)
        for group in cut.windows(len(z)):
            for window in group:
                own_d_out, own_v = window.own(d_out), window.own(v)
                _read_later(next(weights), own_d_out, window.own(d_v), lr, cut)
                # As the keys are, v is read at the offset of a lag of 0.
                d_scores = _scores(own_d_out, own_v, window, replace(cut, lag=0))
                d_scores = chunks.gradient_of_products(d_scores, window, cut)
                chunks.weighted_frames(
                    [d_scores], window.frames(z), window.frames(d_z), alpha=lr, beta=1.0
                )
            if len(group) > 1:
                _backward_of_state(group, z, v, d_out, d_z, d_v, lr, cut)
        return d_z, d_v, None, None


def _write(
    state: chunks.State, v: Tensor, keys: Tensor, window: chunks.Window, cut: chunks.Cut
) -> None:
    """The pairs of a window of one row into the state, unless it is the last."""
    if window.stop < cut.num_frames:
        offset = cut.offset(window)
        first = max(0, -offset)
        state.add(v[0], keys[0, first + offset : window.length + offset], first=first)


def _backward_of_state(
    group: Sequence[chunks.Window],
    z: Tensor,
    v: Tensor,
    d_out: Tensor,
    d_z: Tensor,
    d_v: Tensor,
    lr: float,
    cut: chunks.Cut,
) -> None:
    """Adds what passes between the windows of a row to d_z and d_v."""
    state = chunks.State(cut)
    for window in group:
        state.read_transposed(window.own(d_out)[0], window.own(d_z)[0], lr)
        _write(state, window.own(v), window.frames(z), window, cut)
    del state
    later = chunks.State(cut, reverse=True)
    for window in reversed(group):
        offset = cut.offset(window)
        first = max(0, -offset)
        keys = slice(first + offset, window.length + offset)
        # By rows of pairs: also those without a key have places in their chunk.
        later.read(F.pad(window.frames(z)[0, keys], (0, 0, first, 0)), window.own(d_v)[0], lr)
        later.read_transposed(window.own(v)[0], window.frames(d_z)[0, keys], lr, first=first)
        if window.start > 0:
            later.add(window.own(d_out)[0], window.own(z)[0])
