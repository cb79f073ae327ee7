"""`ttt.ops.moshi.turned` for compiled code.

In a module of its own, as PyTorch's compiler comes with it, which takes seconds to import.
"""

from typing import Any

import torch
from torch import Tensor

from ttt.ops.moshi.turned import gradient, parts
from ttt.ops.rope import RopeTable


def compiled_turned(
    qkv: Tensor, num_heads: int, table: RopeTable, *, interleave: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `turned` does."""
    q, k, v = _turned(qkv, *table, num_heads, interleave)
    return q, k, v


@torch.library.triton_op("moshi_ttt::turned", mutates_args={})
def _turned(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, interleave: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v.

    The compiler sees what is in an operator of this kind. It sees into an autograd function too,
    but keeps all that one makes, also in layers that are to be made again.
    """
    q, k, v = parts(qkv, cos, sin, num_heads, interleave)
    # What an operator returns may be no view of what it was given.
    return q, k, v.clone()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, cos, sin, _, ctx.interleave = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    d_q, d_k, d_v = grads
    cos, sin = ctx.saved_tensors
    return gradient(d_q, d_k, d_v, cos, sin, ctx.interleave), None, None, None, None


_turned.register_autograd(_backward, setup_context=_setup_context)
