"""In-Place TTT, `write: sum`: the output projection of a gated MLP learns while it reads.

A chunk i of frames writes `Δ_i = Σ v_t z_tᵀ` (optionally bounded in norm), and a frame reads the
sum over strictly earlier chunks of its own document, `η Σ_{j<i} γ^(i−1−j) Δ_j z_t`. No weight is
ever built for it: with M as in `ttt.ops.in_place.chunks`,

    O = η (M ⊙ Z Zᵀ) V                                    (the dual form)
    dZ = η (D Z + Dᵀ Z),  dV = η (M ⊙ Z Zᵀ)ᵀ dO           with D = M ⊙ dO Vᵀ
    ‖Δ_i‖² = Σ (Z_i Z_iᵀ) ⊙ (V_i V_iᵀ)

inside super-chunks, and one state carried between them: exact, and linear in T.

Source: In-Place Test-Time Training (ICLR 2026), algorithm 1; docs/mathematics.md.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt.ops.in_place import chunks


@torch.compiler.disable
def in_place_ttt(
    z: Tensor,
    v: Tensor,
    *,
    lr: float,
    chunk_size: int,
    max_delta_norm: float | None = None,
    documents: Tensor | None = None,
    decay: float = 1.0,
) -> Tensor:
    """What the fast weights add to the output of the projection that they change.

    Args:
        z: [B, T, h], the projection's inputs: keys when written, queries when read.
        v: [B, T, d], the targets.
        lr: inner learning rate η, without unit.
        chunk_size: frames per chunk, counted from the start of each document.
        max_delta_norm: upper bound on ‖Δ_i‖_F, before η; None: no bound.
        documents: [B, T] integers; a new document begins wherever the number changes, and nothing
            passes from one to the next. None: every row is one document.
        decay: γ, how much of the state outlives each later chunk, 0 to 1.

    Returns:
        [B, T, d]. Zero within the first chunk of each document.
    """
    if documents is not None:
        lengths = chunks.split_documents(documents)
        parts = [
            in_place_ttt(
                z_part.unsqueeze(0),
                v_part.unsqueeze(0),
                lr=lr,
                chunk_size=chunk_size,
                max_delta_norm=max_delta_norm,
                decay=decay,
            )
            for z_part, v_part in zip(
                z.flatten(0, 1).split(lengths), v.flatten(0, 1).split(lengths), strict=True
            )
        ]
        return torch.cat(parts, dim=1).view(v.shape)
    if max_delta_norm is not None:
        v = _bounded(z, v, chunk_size, max_delta_norm)
    cut = chunks.cut(z.shape[1], chunk_size, v.shape[2], z.shape[2], decay)
    return _Sum.apply(z.contiguous(), v.contiguous(), lr, cut)


def chunk_conv(
    x: Tensor,
    weight: Tensor,
    *,
    chunk_size: int,
    lookahead: int,
    documents: Tensor | None = None,
) -> Tensor:
    """Depthwise convolution over time that sees nothing outside a frame's own chunk.

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
    """
    num_frames, kernel_size = x.shape[1], weight.shape[-1]
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


def chunk_delta(z: Tensor, v: Tensor, *, max_delta_norm: float | None = None) -> Tensor:
    """Δ of one chunk, as streaming writes it.

    Args:
        z: [B, C, h].
        v: [B, C, d].
        max_delta_norm: see `in_place_ttt`.

    Returns:
        [B, d, h], at least in float32.
    """
    delta = chunks.product(v.transpose(1, 2), z)
    if max_delta_norm is not None:
        norm = torch.linalg.vector_norm(delta, dim=(1, 2), keepdim=True)
        delta = delta * (max_delta_norm / norm.clamp(min=max_delta_norm))
    return delta


def delta_norm_square(z: Tensor, v: Tensor, chunk_size: int) -> Tensor:
    """‖Δ_i‖²_F of the complete chunks, [B, T // C], at least in float32; no Δ is built.

    Args:
        z: [B, T, h].
        v: [B, T, d].
    """
    squares = [
        (chunks.gram(z_chunk) * chunks.gram(v_chunk)).sum((1, 2))
        for z_chunk, v_chunk in zip(z.split(chunk_size, 1), v.split(chunk_size, 1), strict=True)
        if z_chunk.shape[1] == chunk_size
    ]
    # Rounding can leave a sum of squares a little below zero.
    return torch.stack(squares, dim=1).clamp(min=0)


def _bounded(z: Tensor, v: Tensor, chunk_size: int, max_delta_norm: float) -> Tensor:
    """The targets, scaled down in the complete chunks whose Δ is too long."""
    num_frames = v.shape[1]
    if num_frames < chunk_size:
        return v
    square = delta_norm_square(z, v, chunk_size)
    too_long = square > max_delta_norm**2
    # The inner `where` keeps the square root away from 0, where its gradient is infinite.
    scale = max_delta_norm * torch.rsqrt(torch.where(too_long, square, 1.0))
    scale = torch.where(too_long, scale, 1.0).repeat_interleave(chunk_size, dim=1)
    scale = F.pad(scale, (0, num_frames - scale.shape[1]), value=1.0)
    return v * scale.unsqueeze(2).to(v.dtype)


def _read_earlier(weights: Tensor, v: Tensor, out: Tensor, lr: float, cut: chunks.Cut) -> None:
    """OUT = η (weights V), inside super-chunks."""
    for a, e, b in cut.blocks(v.shape[1]):
        if e == 0:
            out[:, a:b] = 0
        else:
            out[:, a:b].baddbmm_(weights[:, a:b, :e], v[:, :e], beta=0, alpha=lr)


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
    """Keeps z, v and the scores for the backward pass: at 2048 frames a super-chunk, these take a
    fifth of z's memory at h = 11264 and spare its most expensive product. The state is made again.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, v: Tensor, lr: float, cut: chunks.Cut) -> Tensor:
        out = torch.empty_like(v)
        kept = []
        for group in cut.groups(z, v, out):
            for z_part, v_part, out_part in group:
                kept.append(chunks.scores(z_part, z_part, cut))
                _read_earlier(kept[-1], v_part, out_part, lr, cut)
            if cut.is_whole:
                continue
            state = chunks.State(cut)
            *earlier, last = chunks.super_chunks(group)
            for z_k, v_k, out_k in earlier:
                state.read(z_k, out_k, lr)
                state.write(v_k, z_k)
            state.read(last[0], last[2], lr)
        ctx.save_for_backward(z, v, *kept)
        ctx.lr, ctx.cut = lr, cut
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, v, *kept = ctx.saved_tensors
        lr, cut = ctx.lr, ctx.cut
        d_out = grads[0].contiguous()
        d_z, d_v = torch.empty_like(z), torch.empty_like(v)
        weights = iter(kept)
        for group in cut.groups(z, v, d_out, d_z, d_v):
            for z_part, v_part, d_out_part, d_z_part, d_v_part in group:
                _read_later(next(weights), d_out_part, d_v_part, lr, cut)
                d_scores = chunks.symmetrize(chunks.scores(d_out_part, v_part, cut), cut)
                chunks.weighted_frames(d_scores, z_part, d_z_part, alpha=lr)
            if cut.is_whole:
                continue
            parts = chunks.super_chunks(group)
            chunks.add_gradient_of_reads([part[:4] for part in parts], lr, cut)
            later = chunks.State(cut, reverse=True)
            for z_k, v_k, d_out_k, d_z_k, d_v_k in parts[:0:-1]:
                later.read(z_k, d_v_k, lr)
                later.read_transposed(v_k, d_z_k, lr)
                later.write(d_out_k, z_k)
            z_k, v_k, _, d_z_k, d_v_k = parts[0]
            later.read(z_k, d_v_k, lr)
            later.read_transposed(v_k, d_z_k, lr)
        return d_z, d_v, None, None
