"""Queries, keys and values of one projection, turned by RoPE, and their gradient in one pass.

What a compiler makes of the backward pass chooses between three gradients for every number that it
writes, and takes three times as long as memory needs. Here one kernel does it.
"""

from typing import Any

import torch
from torch import Tensor

from ttt.ops.rope import RopeTable, rotate


def turned(
    qkv: Tensor, num_heads: int, table: RopeTable, *, interleave: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v [B, T, H, D], of which q and k are turned.

    Args:
        qkv: [B, T, 3 H D].
        table: of [T, 1, D].
        interleave: see `rotate`.
    """
    q, k, v = _Turned.apply(qkv, *table, num_heads, interleave)
    return q, k, v


class _Turned(torch.autograd.Function):
    # Apart from `setup_context`, as `torch.func` asks for.
    @staticmethod
    def forward(
        qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, interleave: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return parts(qkv, cos, sin, num_heads, interleave)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, cos, sin, _, ctx.interleave = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_q, d_k, d_v = grads
        cos, sin = ctx.saved_tensors
        return gradient(d_q, d_k, d_v, cos, sin, ctx.interleave), None, None, None, None


def parts(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, interleave: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `turned` does."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
    q, k = (rotate(x, (cos, sin), interleave=interleave) for x in (q, k))
    return q, k, v


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
