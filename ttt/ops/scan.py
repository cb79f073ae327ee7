"""The scan of TTT-Linear and TTT-MLP on a CUDA device: one kernel for a group of mini-batches.

Every head of every row is a scan of its own, over mini-batches of a few frames: as many small
products as PyTorch would launch kernels for, hundreds of them a mini-batch with their gradients.
Here one program takes one head through a whole group, forwards or backwards.

Between groups the fast weights are kept. The backward pass runs a group forwards again, keeps what
the layers gave for its frames, and then goes through it from its end: a mini-batch's own weights
are those of its end with what it wrote added back, `W_n = W_{n+1} + xᵀ (η ⊙ g)`, so no weights are
kept inside a group.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ttt.ops import scan_kernels as kernels
from ttt.ops.linear import EPSILON, InnerLayers, flatten
from ttt.ops.scan_mlp_backward import mlp_backward

SPLIT_TYPES: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
"""For frames of these types, factors of products are split in two bfloat16 terms, which is exact to
some 16 bits, and to all where the factor is bfloat16. Factors are shared by many products, and this
way are split once; float32 frames take three products of TensorFloat32, more exact and slower."""
TILE = 32
"""Rows of W, or hidden units, at once."""
WARPS = 4
BACKWARD_REGISTERS = 128
"""Of a thread in TTT-MLP's backward kernel, for mini-batches of 16 frames: so that a multiprocessor
holds four programs that wait for memory in turn. Larger ones would not fit."""


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    layers: InnerLayers,
    ln_weight: Tensor,
    ln_bias: Tensor,
    *,
    token_scale: Tensor,
    num_writes: int,
    group_size: int | None,
) -> tuple[Tensor, InnerLayers]:
    """`ttt.ops.linear.inner_scan` of frames laid out in mini-batches.

    Args:
        q, k, v: [B, H, N, K, f], K and f powers of two from 16 on, f at most 128.
        eta: [B, H, N, K]; this and all that follow in float32.
        layers: [B, H, in, out] and [B, H, out], one or two of them.
        ln_weight, ln_bias: [H, f].
        token_scale: [K].
        num_writes: how many mini-batches write: N, or N − 1 if the last is incomplete.
        group_size: mini-batches between which nothing but the fast weights is kept.

    Returns:
        [B, H, N, K, f] in the dtype of q, and the weights afterwards.
    """
    group_size = group_size or q.shape[2]
    out, *weights = _Scan.apply(
        q, k, v, eta, token_scale, ln_weight, ln_bias, num_writes, group_size, *flatten(layers)
    )
    return out, tuple(zip(weights[0::2], weights[1::2], strict=True))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        eta: Tensor,
        token_scale: Tensor,
        ln_weight: Tensor,
        ln_bias: Tensor,
        num_writes: int,
        group_size: int,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        frames = tuple(x.contiguous() for x in (q, k, v, eta, token_scale, ln_weight, ln_bias))
        out = torch.empty_like(frames[0])
        starts: list[Tensor] = []
        for first, last in _groups(q.shape[2], group_size):
            starts += weights
            weights = tuple(x.clone(memory_format=torch.contiguous_format) for x in weights)
            _forward(frames, weights, out, num_writes, first, last, keep=False)
        ctx.save_for_backward(*frames, *starts)
        ctx.num_writes, ctx.group_size = num_writes, group_size
        return out, *weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Once: under activation checkpointing they can be asked for once.
        tensors = ctx.saved_tensors
        saved, starts = tensors[:7], tensors[7:]
        *frames, _, _, _ = saved
        q, eta = frames[0], frames[3]
        d_out = grads[0].contiguous()
        d_weights = [x.clone(memory_format=torch.contiguous_format) for x in grads[1:]]
        count = len(d_weights)
        d_frames = [torch.empty_like(x) for x in frames]
        lead = q.shape[:2]
        # Of each program its own; summed over the batch below.
        d_scale = eta.new_zeros(*lead, q.shape[3])
        d_norm = [eta.new_zeros(*lead, q.shape[4]) for _ in range(2)]
        out = torch.empty_like(q)
        groups = _groups(q.shape[2], ctx.group_size)
        for index, (first, last) in reversed(list(enumerate(groups))):
            weights = tuple(
                x.clone(memory_format=torch.contiguous_format)
                for x in starts[index * count : (index + 1) * count]
            )
            kept = _forward(saved, weights, out, ctx.num_writes, first, last, keep=True)
            bounded = count == 4 and q.shape[3] == 16
            _launch(
                kernels.linear_backward if count == 2 else mlp_backward,
                saved,
                (*weights, *kept, d_out, *d_frames, d_scale, *d_norm, *d_weights),
                (ctx.num_writes, first, last),
                maxnreg=BACKWARD_REGISTERS if bounded else None,
            )
        d_shared = (d_scale.sum((0, 1)), *(x.sum(0) for x in d_norm))
        return *d_frames, *d_shared, None, None, *d_weights


def _groups(num_batches: int, size: int) -> list[tuple[int, int]]:
    return [(n, min(n + size, num_batches)) for n in range(0, num_batches, size)]


def _forward(
    frames: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    out: Tensor,
    num_writes: int,
    first: int,
    last: int,
    *,
    keep: bool,
) -> tuple[Tensor, ...]:
    """Changes `weights` and the group's part of `out`; what the backward pass needs, if `keep`."""
    rows, size, width = math.prod(out.shape[:2]), *out.shape[3:]
    num_kept = rows * size * (last - first)

    def new(num_frames: int, *shape: int) -> Tensor:
        return out.new_empty(num_frames if keep else 0, *shape, dtype=torch.float32)

    kept: tuple[Tensor, ...]
    if len(weights) == 2:
        scratch = out.new_empty(rows, size, 2 * width, dtype=torch.float32)
        kept = (scratch, new(num_kept, width), new(num_kept, width))
    else:
        hidden = weights[1].shape[-1]
        scratch = out.new_empty(rows, size, 5 * hidden + 2 * width, dtype=torch.float32)
        shapes = (hidden, hidden, hidden, width, width, size)
        kept = (scratch, *(new(num_kept, n) for n in shapes))
    _launch(
        kernels.linear_forward if len(weights) == 2 else kernels.mlp_forward,
        frames,
        (*weights, out, *kept),
        (num_writes, first, last),
        KEEP=keep,
    )
    return kept


def _launch(
    kernel: Any,
    frames: tuple[Tensor, ...],
    others: tuple[Tensor, ...],
    numbers: tuple[int, int, int],
    **options: Any,
) -> None:
    batch, heads, num_batches, size, width = frames[0].shape
    num_units = width
    if kernel in (kernels.mlp_forward, mlp_backward):
        num_units = options["D"] = others[1].shape[-1]
    kernel[(batch * heads,)](
        *frames,
        *others,
        heads,
        num_batches,
        *numbers,
        # Not a constant, so that the compiler does not unroll the loops over tiles.
        num_units,
        EPS=EPSILON,
        K=size,
        F=width,
        SPLIT=frames[0].dtype in SPLIT_TYPES,
        TILE=min(TILE, width),
        num_warps=WARPS,
        # Loading ahead made TTT-MLP slower; its registers are full.
        num_stages=1,
        **options,
    )
