"""The Triton kernel of `ttt.ops.moshi.turned`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 4096
"""Numbers that one program turns back: some heads of a frame."""


@triton.jit
def _partner(x, INTERLEAVE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr):
    """Each channel's partner, [HEADS, D]; see `ttt.ops.rope.rotate`."""
    if INTERLEAVE:
        first, second = tl.split(tl.reshape(x, (HEADS, D // 2, 2)))
        return tl.reshape(tl.join(second, first), (HEADS, D))
    first, second = tl.split(tl.permute(tl.reshape(x, (HEADS, 2, D // 2)), (0, 2, 1)))
    return tl.reshape(tl.permute(tl.join(second, first), (0, 2, 1)), (HEADS, D))


@triton.jit
def _gradient_kernel(
    d_q, d_k, d_v, cos, sin, out, num_frames, num_heads,
    q_batch, q_frame, q_head, k_batch, k_frame, k_head, v_batch, v_frame, v_head,
    INTERLEAVE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Some heads' queries, keys and values of one frame."""
    frame, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head = (tl.program_id(2) * HEADS + tl.arange(0, HEADS))[:, None]
    channel = tl.arange(0, D)[None, :]
    there = head < num_heads
    c, s = tl.load(cos + frame * D + channel), tl.load(sin + frame * D + channel)
    out += (batch * num_frames + frame) * (3 * num_heads * D) + head * D + channel

    d_q += batch * q_batch + frame * q_frame + head * q_head + channel
    x = tl.load(d_q, mask=there, other=0.0).to(tl.float32)
    tl.store(out, x * c - _partner(x, INTERLEAVE, HEADS, D) * s, mask=there)
    d_k += batch * k_batch + frame * k_frame + head * k_head + channel
    x = tl.load(d_k, mask=there, other=0.0).to(tl.float32)
    tl.store(out + num_heads * D, x * c - _partner(x, INTERLEAVE, HEADS, D) * s, mask=there)
    d_v += batch * v_batch + frame * v_frame + head * v_head + channel
    tl.store(out + 2 * num_heads * D, tl.load(d_v, mask=there, other=0.0), mask=there)


def gradient(
    d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor, *, interleave: bool
) -> Tensor:
    """Return the gradient of `turned`'s input [B, T, 3 H D]."""
    batch, num_frames, num_heads, width = d_q.shape
    out = d_q.new_empty(batch, num_frames, 3 * num_heads * width)
    parts = [x if x.stride(3) == 1 else x.contiguous() for x in (d_q, d_k, d_v)]
    cos, sin = cos.contiguous(), sin.contiguous()
    heads = max(1, NUMBERS // width)
    # Triton launches on the current device.
    with torch.cuda.device_of(d_q):
        _gradient_kernel[(num_frames, batch, triton.cdiv(num_heads, heads))](
            *parts,
            cos,
            sin,
            out,
            num_frames,
            num_heads,
            *(step for x in parts for step in x.stride()[:3]),
            INTERLEAVE=interleave,
            HEADS=heads,
            D=width,
            num_warps=8,
        )
    return out
