"""In-Place TTT: the output projection of a gated MLP learns while it reads.

A chunk i of frames writes `Δ_i = Σ v_t z_tᵀ` (optionally bounded in norm), and a frame reads the
sum over strictly earlier chunks of its own document, `η Σ_{j<i} Δ_j z_t`. No weight is ever built
for it: with `M[t, s] = 1` where frame s lies in an earlier chunk than frame t,

    O = η (M ⊙ Z Zᵀ) V                                    (the dual form)
    dZ = η (B Z + Bᵀ Z),  dV = η (M ⊙ Z Zᵀ)ᵀ dO           with B = M ⊙ dO Vᵀ
    ‖Δ_i‖² = Σ (Z_i Z_iᵀ) ⊙ (V_i V_iᵀ)

which is exact. Its cost and memory grow with T².

Source: In-Place Test-Time Training (ICLR 2026), algorithm 1; docs/mathematics.md.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def in_place_ttt(
    z: Tensor,
    v: Tensor,
    *,
    lr: float,
    chunk_size: int,
    max_delta_norm: float | None = None,
    documents: Tensor | None = None,
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

    Returns:
        [B, T, d]. Zero within the first chunk of each document.
    """
    chunks = number_chunks(z.shape[1], chunk_size, documents, device=z.device)
    if max_delta_norm is not None:
        square = delta_norm_square(z, v, chunks)
        too_long = square > max_delta_norm**2
        # The inner `where` keeps the square root away from 0, where its gradient is infinite.
        scale = max_delta_norm * torch.rsqrt(torch.where(too_long, square, 1.0))
        v = v * torch.where(too_long, scale, 1.0).to(v.dtype).unsqueeze(-1)
    return _Dual.apply(z, v, _earlier(chunks, documents), lr)


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
    chunks = number_chunks(num_frames, chunk_size, documents, device=x.device)
    total = torch.zeros_like(x)
    for k in range(kernel_size):
        # Tap k reads x[t + shift].
        shift = k - (kernel_size - 1 - lookahead)
        if abs(shift) >= num_frames:
            continue
        here = slice(max(0, -shift), num_frames - max(0, shift))
        there = slice(max(0, shift), num_frames + min(0, shift))
        same_chunk = (chunks[:, here] == chunks[:, there]).unsqueeze(-1)
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
        [B, d, h], in the dtype of the inputs.
    """
    delta = v.transpose(1, 2) @ z
    if max_delta_norm is not None:
        norm = torch.linalg.vector_norm(delta, dim=(1, 2), keepdim=True)
        delta = delta * (max_delta_norm / norm.clamp(min=max_delta_norm))
    return delta


def number_chunks(
    num_frames: int, chunk_size: int, documents: Tensor | None, device: torch.device
) -> Tensor:
    """The number of each frame's chunk, counted through the row: [1, T], or [B, T] with documents.

    A chunk never reaches over the end of a document.
    """
    frames = torch.arange(num_frames, device=device).unsqueeze(0)
    if documents is None:
        return frames // chunk_size
    starts = _document_starts(documents)
    return (((frames - starts) % chunk_size == 0).cumsum(1)) - 1


def delta_norm_square(z: Tensor, v: Tensor, chunks: Tensor) -> Tensor:
    """‖Δ_i‖²_F of each frame's own chunk, [B, T], at least in float32; no Δ is built.

    Args:
        z: [B, T, h].
        v: [B, T, d].
        chunks: [1 or B, T], from `number_chunks`.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    same = chunks.unsqueeze(2) == chunks.unsqueeze(1)
    gram = (z @ z.transpose(1, 2)).to(dtype) * (v @ v.transpose(1, 2)).to(dtype)
    per_frame = torch.where(same, gram, 0.0).sum(2, keepdim=True)
    # Rounding can leave a sum of squares a little below zero.
    return (same.to(dtype) @ per_frame).squeeze(2).clamp(min=0)


def _document_starts(documents: Tensor) -> Tensor:
    """[B, T]: the frame at which the document of each frame starts."""
    frames = torch.arange(documents.shape[1], device=documents.device)
    is_start = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return torch.where(is_start, frames, 0).cummax(1).values


def _earlier(chunks: Tensor, documents: Tensor | None) -> Tensor:
    """M, [1 or B, T, T]: frame s (last) lies in an earlier chunk of the same document than t.

    Such a chunk is complete, as another one follows it.
    """
    mask = chunks.unsqueeze(1) < chunks.unsqueeze(2)
    if documents is not None:
        starts = _document_starts(documents)
        mask &= starts.unsqueeze(1) == starts.unsqueeze(2)
    return mask


class _Dual(torch.autograd.Function):
    """The dual form. Its own backward keeps z and v alone, and makes Z Zᵀ again."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, v: Tensor, mask: Tensor, lr: float) -> Tensor:
        ctx.save_for_backward(z, v, mask)
        ctx.lr = lr
        return lr * ((z @ z.transpose(1, 2)).masked_fill(~mask, 0.0) @ v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, v, mask = ctx.saved_tensors
        (d_out,) = grads
        scores = (z @ z.transpose(1, 2)).masked_fill(~mask, 0.0)
        d_v = ctx.lr * (scores.transpose(1, 2) @ d_out)
        d_scores = (d_out @ v.transpose(1, 2)).masked_fill(~mask, 0.0)
        d_z = ctx.lr * ((d_scores + d_scores.transpose(1, 2)) @ z)
        return d_z, d_v, None, None
