"""Queries, keys and values of one projection, turned by RoPE, and their gradient in one pass.

What a compiler makes of the backward pass chooses between three gradients for every number that it
writes, and takes three times as long as memory needs. Here one kernel does it.
"""

from typing import Any

import torch
from torch import Tensor

from ttt.ops.rope import RopeTable, rotate


def turned(
    qkv: Tensor, num_heads: int, rope: RopeTable, *, interleave: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v [B, T, H, D], of which q and k are turned by RoPE.

    Args:
        qkv: [B, T, 3 H D].
        rope: cos and ±sin, [T, 1, D].
        interleave: see `rotate`.
    """
    parts: tuple[Tensor, Tensor, Tensor] = _turned(qkv, *rope, num_heads, interleave)
    return parts


@torch.library.triton_op("moshi_ttt::turned", mutates_args={})
def _turned(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, interleave: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compiled code sees what is in here, and its gradient as a whole: of an autograd function in
    a layer that is made again it would keep everything."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
    q, k = (rotate(x, (cos, sin), interleave=interleave) for x in (q, k))
    # What an operator returns may be no view of what it was given.
    return q, k, v.clone()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, cos, sin, _, ctx.interleave = inputs
    ctx.save_for_backward(cos, sin)


def _backward(
    ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor
) -> tuple[Tensor, None, None, None, None]:
    cos, sin = ctx.saved_tensors
    return gradient(d_q, d_k, d_v, cos, sin, ctx.interleave), None, None, None, None


_turned.register_autograd(_backward, setup_context=_setup_context)


def gradient(
    d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor, interleave: bool
) -> Tensor:
    """Return the gradient [B, T, 3 H D] of what q, k and v were: turned back, and rounded once."""
    if fits_kernel(d_q, cos):
        return _gradient(d_q, d_k, d_v, cos, sin, interleave)
    back = cos, -sin
    d_q, d_k = (rotate(x, back, interleave=interleave) for x in (d_q, d_k))
    return torch.stack([d_q, d_k, d_v], 2).flatten(2)


def fits_kernel(d_q: Tensor, cos: Tensor) -> bool:
    return d_q.is_cuda and cos.dtype == torch.float32 and d_q.shape[-1] in (32, 64, 128, 256)


@torch.library.custom_op("moshi_ttt::turned_gradient", mutates_args=())
def _gradient(
    d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor, interleave: bool
) -> Tensor:
    from ttt.ops.moshi import turned_kernels

    return turned_kernels.gradient(d_q, d_k, d_v, cos, sin, interleave=interleave)


@_gradient.register_fake
def _(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor, interleave: bool) -> Tensor:
    batch, num_frames, num_heads, width = d_q.shape
    return d_q.new_empty(batch, num_frames, 3 * num_heads * width)
