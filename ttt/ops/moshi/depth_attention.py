"""Causal attention over the few steps of the depth transformer, of very many frames at once.

A frame's K steps (8 in Moshi) know nothing of other frames: at B · T = 20,000 frames and 16 heads
these are 320,000 attentions of 8 × 8, of which general kernels each make a tile of 128 rows. Here a
tile holds the steps of several frames, and pairs of different frames are masked.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def depth_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """softmax(q kᵀ / √D) v, step i over steps 0 … i of the same frame.

    Args:
        qkv: [K, N, 3C]; step by step, for N frames, queries, keys and values of all heads.

    Returns:
        [K, N, C].
    """
    num_steps, num_frames, width = qkv.shape
    head_width = width // 3 // num_heads
    if qkv.is_cuda and fits_kernel(num_steps, head_width):
        return _depth_attention(qkv.contiguous(), num_heads)
    q, k, v = qkv.view(num_steps, num_frames, 3, num_heads, head_width).permute(2, 1, 3, 0, 4)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.permute(2, 0, 1, 3).reshape(num_steps, num_frames, width // 3)


def fits_kernel(num_steps: int, head_width: int) -> bool:
    return num_steps <= 32 and head_width in (16, 32, 64, 128)


@torch.library.custom_op("moshi_ttt::depth_attention", mutates_args=())
def _depth_attention(qkv: Tensor, num_heads: int) -> Tensor:
    from ttt.ops.moshi import depth_kernels

    return depth_kernels.forward(qkv, num_heads)


@torch.library.custom_op("moshi_ttt::depth_attention_backward", mutates_args=())
def _depth_attention_backward(d_out: Tensor, qkv: Tensor, num_heads: int) -> Tensor:
    from ttt.ops.moshi import depth_kernels

    return depth_kernels.backward(d_out, qkv, num_heads)


@_depth_attention.register_fake
def _(qkv: Tensor, num_heads: int) -> Tensor:
    num_steps, num_frames, width = qkv.shape
    return qkv.new_empty(num_steps, num_frames, width // 3)


@_depth_attention_backward.register_fake
def _(d_out: Tensor, qkv: Tensor, num_heads: int) -> Tensor:
    return torch.empty_like(qkv)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.num_heads = inputs[1]


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
    (qkv,) = ctx.saved_tensors
    return _depth_attention_backward(d_out.contiguous(), qkv, ctx.num_heads), None


_depth_attention.register_autograd(_backward, setup_context=_setup_context)
