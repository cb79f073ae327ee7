"""With `write: delta`, a chunk writes what the memory does not know yet.

    E_i     = (K_i K_iᵀ + λ_i I)⁻¹ (V_i − K_i S_iᵀ)        λ_i = mean_u ‖k_u‖² / β
    S_{i+1} = γ S_i + E_iᵀ K_i,    o_t = S_{chunk(t)} z_t

Regularized least squares on the residual: what a chunk has in common with those before it is not
written again, so the state stays bounded however long the stream. Only complete chunks write. K, V
and the mean are of the pairs that are written and whose keys are not zero; without any, nothing is.
A key of zeros has no gradient by what it would write: the rule jumps there, by one pair more in the
mean.

Reading is as for `sum`, with E in place of V (`in_place.chunks`), so no state is kept per chunk
either. With H_i = K_i K_iᵀ + λ_i I, whose inverses depend on no state and are all made at once, and
O, R and P what frames read, what keys read, and what errors receive from later chunks,

    forward, first chunk to last:     R_i = K_i S_iᵀ,   E_i = H_i⁻¹ (V_i − R_i)
    backward, last chunk to first:    P_i = Σ_{j>i} γ^… (K_i Z_jᵀ) Y_j,   X_i = H_i⁻¹ P_i
    dV = X,  dH_i = −X_i E_iᵀ,  dZ as for `sum` with Y in place of dO, and by dH_i.

A key's own frame has mostly read just R already. The last `lag` frames of a chunk, whose pairs the
next chunk writes, are read again with what their own chunk has written,

    R_u = γ O_t + (k_u · K_{i−1}) E_{i−1},   t = u − lag in chunk i − 1, u in chunk i.

So Y_t = dO_t − X_u for most frames, dO_t − γ X_u for these, and dO_t where the pair is not written.

With 16-bit inputs the products of z are exact, and what is made of them is precise: H⁻¹ enlarges
what is rounded, and one bfloat16 each for Z Kᵀ and E put outputs wrong by as much as their size.
Inverses and what they are multiplied with are in float32; Z Kᵀ and E are sums of two terms
(`in_place.terms`); and as keys that are nearly one (silence) have errors E that are large and
cancel each other, a frame reads a chunk's sum of E apart,

    Σ_u w_u E_u = w̄ Σ_u E_u + Σ_u (w_u − w̄) E_u,   w̄ = mean_u w_u,   w = z_t Kᵀ,

so that rounding counts by how much keys differ. Likewise what errors receive from a chunk's Y.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ttt.ops import recompute
from ttt.ops.autocast import without_autocast
from ttt.ops.compiler_marks import uncompiled
from ttt.ops.in_place import chunks, delta_gradient, delta_window, terms
from ttt.ops.in_place.checks import check_beta, check_sequence


@uncompiled
@without_autocast
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
    projection: Tensor | None = None,
) -> Tensor:
    """Return what the fast weights add to the output of the projection that they change.

    The inverses are made in float32 whatever the inputs, in float64 for float64: accurate while β
    stays below some 1e3 (docs/numerics.md). Inputs of several types are taken in the type that all
    fit in; `torch.autocast` changes nothing.

    Args:
        z: [B, T, h], the projection's inputs: keys when written, queries when read.
        v: [B, T, d], the targets that are complete at each frame; with a projection, what it makes
            them of.
        beta: β > 0, a number or a tensor of one element: how nearly a chunk's targets are met.
        chunk_size: frames per chunk, counted from the start of each document.
        decay: γ, how much of the state outlives each later chunk, 0 to 1.
        documents: [B, T] integers; a new document begins wherever the number changes, and nothing
            passes from one to the next. None: every row is one document.
        lag: v_u is the target of frame u − lag, whose z is its key; 0 to chunk_size − 1. The first
            `lag` frames of a document complete nothing.
        written: [B, T], false where the pair that is complete at a frame is not written. None: all
            are.
        projection: [d, d], the matrix P of targets P v_u; None: v are the targets. Activation
            checkpointing then makes them once.

    Returns:
        [B, T, d], in the type that the inputs fit in. Zero within the first chunk of each document.

    Raises:
        ValueError: an argument out of range or shape. Of tensors only shapes are looked at, as to
            see a value is to wait for the device: a β ≤ 0 in a tensor gives what means nothing.
    """
    check_beta(beta)
    check_sequence(
        z,
        v,
        chunk_size=chunk_size,
        decay=decay,
        lag=lag,
        documents=documents,
        written=written,
        projection=projection,
    )
    if projection is None:
        z, v = terms.promoted(z, v)
    else:
        z, v, projection = terms.promoted(z, v, projection)
    if documents is not None and documents.numel() > 0:
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
                projection=projection,
            )
            for part in zip(*flat, strict=True)
        ]
        return torch.cat(parts, dim=1).view(v.shape)
    beta = torch.as_tensor(beta, dtype=terms.accumulating_dtype(z.dtype), device=z.device)
    cut = chunks.cut(z.shape[1], chunk_size, v.shape[2], z.shape[2], decay, lag, batch=len(z))
    return _Delta.apply(z.contiguous(), v.contiguous(), beta.reshape(()), written, projection, cut)


@without_autocast
@terms.all_digits()
def chunk_errors(keys: Tensor, residual: Tensor, beta: Tensor | float) -> Tensor:
    """Return E of one chunk, as streaming writes it.

    Args:
        keys: [B, C, h], zero where nothing is to be written.
        residual: [B, C, d], V − K Sᵀ.
        beta: see `in_place_delta`.

    Returns:
        [B, C, d], at least in float32.

    Raises:
        ValueError: β out of range or shape; see `in_place_delta`.
    """
    check_beta(beta)
    inverse, _, _ = delta_window.inverse(chunks.gram(keys), beta)
    return inverse @ residual.to(inverse.dtype)


class _Delta(torch.autograd.Function):
    """Keeps z, E, the scores and the inverses for the backward pass; v is needed only for the
    projection's gradient. In a layer that is made again E and the inverses are kept from the first
    time on, a twentieth of what the layer would keep otherwise: then neither targets nor outputs
    are made twice."""

    @staticmethod
    @terms.all_digits()
    def forward(
        ctx: Any,
        z: Tensor,
        source: Tensor,
        beta: Tensor,
        written: Tensor | None,
        projection: Tensor | None,
        cut: chunks.Cut,
    ) -> Tensor:
        solved = recompute.kept()
        if solved is None:
            v = source if projection is None else F.linear(source, projection)
            out, saved = _forward(z, v, beta, written, cut)
            if recompute.may_keep():
                recompute.keep(_solved(saved))
        else:
            saved = _forward_again(z, solved, cut)
            # See `recompute.forward_passes`.
            out = source.new_full((), torch.nan).expand_as(source)
        ctx.is_projected = projection is not None
        ctx.save_for_backward(z, beta, *((source, projection) if ctx.is_projected else ()), *saved)
        ctx.cut = cut
        return out

    @staticmethod
    @once_differentiable  # it writes into memory of its own, which no gradient can pass
    @without_autocast
    @terms.all_digits()
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, beta, *saved = ctx.saved_tensors
        projected, saved = (saved[:2], saved[2:]) if ctx.is_projected else ((), saved)
        cut: chunks.Cut = ctx.cut
        d_out = grads[0].contiguous()
        d_z = torch.empty_like(z) if cut.is_whole else torch.zeros_like(z)
        d_v = torch.empty_like(d_out)
        d_beta = torch.zeros_like(beta)
        per_window = (saved[i : i + _NUM_SAVED] for i in range(0, len(saved), _NUM_SAVED))
        for group in cut.windows(len(z)):
            parts = [(window, *next(per_window)) for window in group]
            later = chunks.State(cut, reverse=True, precise=True)
            adjoints = []
            for window, *tensors, e in reversed(parts):
                kept = delta_window.Kept(*tensors)
                frames = window.frames(z)
                shape = len(e), e.shape[1] * cut.chunk_size, e.shape[4]
                x, is_empty = e.new_empty(shape, dtype=beta.dtype), later.value is None
                if not is_empty:
                    later.read(_keys(frames[0], window, cut)[: x.shape[1]], x.zero_()[0])
                y, left_of_x = delta_window.write_backward(
                    kept, window.own(d_out), x, window.own(d_v), window, cut, is_empty=is_empty
                )
                d_products, d_strengths = delta_gradient.of_products(
                    kept, left_of_x, y, e, beta, window, cut
                )
                d_beta -= (d_strengths * kept.strengths).sum() / beta
                num_read = window.lead + x.shape[1]
                delta_gradient.add_weighted(
                    d_products, frames, window.frames(d_z), num_read, replace=cut.is_whole
                )
                adjoints.append((x, y))
                if later.value is not None:
                    first = max(0, -cut.offset(window))
                    d_keys = window.frames(d_z)[0, : window.length - first]
                    later.read_transposed(
                        delta_window.value(e, cut.chunk_size)[0],
                        d_keys[: len(x[0]) - first],
                        first=first,
                    )
                if window.start > 0:
                    own_y = delta_window.value(y, cut.chunk_size, swap=True)[0, : window.length]
                    later.add(own_y, window.own(z)[0])
                    edge = -x[0, : window.lead]
                    later.add_halo(edge, frames[0, : len(edge)])
            if len(group) > 1:
                _add_gradient_of_reads(parts, adjoints[::-1], z, d_z, cut)
        d_source, d_projection = d_v, None
        if projected:
            source, projection = projected
            d_source = d_v @ projection
            if ctx.needs_input_grad[4]:
                d_projection = d_v.flatten(0, 1).mT @ source.flatten(0, 1)
        return d_z, d_source, d_beta, None, d_projection, None


def _forward(
    z: Tensor, v: Tensor, beta: Tensor, written: Tensor | None, cut: chunks.Cut
) -> tuple[Tensor, list[Tensor]]:
    """Return the output, and for each window what `Kept` has and E."""
    out = torch.empty_like(v)
    saved: list[Tensor] = []
    for group in cut.windows(len(z)):
        state = chunks.State(cut, precise=True)
        for window in group:
            frames, own_v = window.frames(z), window.own(v)
            rows = None if written is None else window.own(written)
            kept = delta_window.prepare(frames, rows, beta, window, cut)
            read, edge = torch.empty_like(own_v, dtype=beta.dtype), None
            if state.value is not None:
                read.zero_()
                state.read(window.own(z)[0], read[0])
                edge = read.new_zeros(1, window.lead, v.shape[2])
                state.read(frames[0, : window.lead], edge[0], weighted=False)
            size = cut.chunk_size
            e = v.new_empty(
                len(own_v), window.length // size, *terms.shape(size, v.dtype), v.shape[2]
            )
            delta_window.write(kept, own_v, read, e, window, cut, edge)
            window.own(out).copy_(read)
            if window.stop < cut.num_frames:
                _add_keys(state, delta_window.value(e, cut.chunk_size)[0], frames[0], window, cut)
            saved += [*kept, e]
    return out, saved


_NUM_SAVED = len(delta_window.Kept._fields) + 1
"""Tensors that are saved for a window: those of `Kept`, products first, and E."""


def _solved(saved: list[Tensor]) -> tuple[Tensor, ...]:
    """Return what `_forward` has saved, but for the products and in less memory."""
    solved: list[Tensor] = []
    for i in range(0, len(saved), _NUM_SAVED):
        _, *tensors, e = saved[i : i + _NUM_SAVED]
        solved += [*tensors, terms.compact(e)]
    return tuple(solved)


def _forward_again(z: Tensor, solved: tuple[Tensor, ...], cut: chunks.Cut) -> list[Tensor]:
    """Return what `_forward` has saved."""
    saved: list[Tensor] = []
    windows = (window for group in cut.windows(len(z)) for window in group)
    for i, window in enumerate(windows):
        start = i * (_NUM_SAVED - 1)
        *tensors, e = solved[start : start + _NUM_SAVED - 1]
        kept = delta_window.prepare_again(window.frames(z), tuple(tensors), window, cut)
        saved += [*kept, terms.expanded(e)]
    return saved


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
        own_y = delta_window.value(y, cut.chunk_size, swap=True)[0, : window.length]
        state.read_transposed(own_y, window.own(d_z)[0])
        edge = -x[0, : window.lead]
        state.read_transposed(edge, d_frames[: len(edge)], weighted=False)
        if window.stop < cut.num_frames:
            _add_keys(state, delta_window.value(e, cut.chunk_size)[0], frames, window, cut)
