"""Triton kernels of `depth_attention`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ROWS = 64
"""Rows of a tile: (frames in it) · (steps, rounded up to a power of two)."""


@triton.jit
def _probabilities(q, k, steps, frames, is_row, scale):
    """softmax of a tile's scores, zero for pairs of different frames and for later steps."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    visible = (frames[:, None] == frames[None, :]) & (steps[:, None] >= steps[None, :])
    visible = visible & is_row[:, None] & is_row[None, :]
    # A finite bound: rows without any step would give NaN.
    scores = tl.where(visible, scores, -1e30)
    p = tl.where(visible, tl.exp(scores - tl.max(scores, 1)[:, None]), 0.0)
    total = tl.sum(p, 1)
    return p / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def _rows(num_frames, STEPS: tl.constexpr, PADDED_STEPS: tl.constexpr, ROWS: tl.constexpr):
    """Return step and frame of each row of this tile, and whether there is such a row."""
    row = tl.arange(0, ROWS)
    steps = row % PADDED_STEPS
    frames = tl.program_id(0) * (ROWS // PADDED_STEPS) + row // PADDED_STEPS
    return steps, frames, (steps < STEPS) & (frames < num_frames)


@triton.jit
def _forward_kernel(
    qkv, out, num_frames, scale,
    STEPS: tl.constexpr, PADDED_STEPS: tl.constexpr, ROWS: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = HEADS * D
    steps, frames, is_row = _rows(num_frames, STEPS, PADDED_STEPS, ROWS)
    place = steps.to(tl.int64) * num_frames + frames
    columns = tl.program_id(1) * D + tl.arange(0, D)
    source = qkv + place[:, None] * (3 * C) + columns[None, :]
    q = tl.load(source, mask=is_row[:, None], other=0.0)
    k = tl.load(source + C, mask=is_row[:, None], other=0.0)
    v = tl.load(source + 2 * C, mask=is_row[:, None], other=0.0)
    p = _probabilities(q, k, steps, frames, is_row, scale)
    result = tl.dot(p.to(v.dtype), v, input_precision="ieee")
    target = out + place[:, None] * C + columns[None, :]
    tl.store(target, result.to(q.dtype), mask=is_row[:, None])


@triton.jit
def _backward_kernel(
    d_out, qkv, d_qkv, num_frames, scale,
    STEPS: tl.constexpr, PADDED_STEPS: tl.constexpr, ROWS: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = HEADS * D
    steps, frames, is_row = _rows(num_frames, STEPS, PADDED_STEPS, ROWS)
    place = steps.to(tl.int64) * num_frames + frames
    columns = tl.program_id(1) * D + tl.arange(0, D)
    offsets = place[:, None] * (3 * C) + columns[None, :]
    q = tl.load(qkv + offsets, mask=is_row[:, None], other=0.0)
    k = tl.load(qkv + offsets + C, mask=is_row[:, None], other=0.0)
    v = tl.load(qkv + offsets + 2 * C, mask=is_row[:, None], other=0.0)
    d_o = tl.load(d_out + place[:, None] * C + columns[None, :], mask=is_row[:, None], other=0.0)
    p = _probabilities(q, k, steps, frames, is_row, scale)
    d_v = tl.dot(tl.trans(p.to(v.dtype)), d_o, input_precision="ieee")
    d_p = tl.dot(d_o, tl.trans(v), input_precision="ieee")
    d_s = (p * (d_p - tl.sum(p * d_p, 1)[:, None]) * scale).to(q.dtype)
    d_q = tl.dot(d_s, k, input_precision="ieee")
    d_k = tl.dot(tl.trans(d_s), q, input_precision="ieee")
    tl.store(d_qkv + offsets, d_q.to(q.dtype), mask=is_row[:, None])
    tl.store(d_qkv + offsets + C, d_k.to(q.dtype), mask=is_row[:, None])
    tl.store(d_qkv + offsets + 2 * C, d_v.to(q.dtype), mask=is_row[:, None])


def forward(qkv: Tensor, num_heads: int) -> Tensor:
    """[K, N, 3C] to [K, N, C]; see `depth_attention`."""
    out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    _launch(_forward_kernel, (qkv, out), qkv, num_heads)
    return out


def backward(d_out: Tensor, qkv: Tensor, num_heads: int) -> Tensor:
    """The gradient of [K, N, 3C]."""
    d_qkv = torch.empty_like(qkv)
    _launch(_backward_kernel, (d_out, qkv, d_qkv), qkv, num_heads)
    return d_qkv


def _launch(kernel, tensors: tuple[Tensor, ...], qkv: Tensor, num_heads: int) -> None:
    num_steps, num_frames, width = qkv.shape
    head_width = width // 3 // num_heads
    padded = max(2, triton.next_power_of_2(num_steps))
    grid = (triton.cdiv(num_frames, TILE_ROWS // padded), num_heads)
    # Triton launches on the current device.
    with torch.cuda.device_of(qkv):
        kernel[grid](
            *tensors,
            num_frames,
            head_width**-0.5,
            STEPS=num_steps,
            PADDED_STEPS=padded,
            ROWS=TILE_ROWS,
            HEADS=num_heads,
            D=head_width,
            num_warps=4,
        )
