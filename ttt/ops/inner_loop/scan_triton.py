"""The scan of TTT-Linear and TTT-MLP on a CUDA device, by kernels of its own.

Every head of every row is a scan of its own, over mini-batches of a few frames: as many small
products as PyTorch would launch kernels for, hundreds of them a mini-batch with their gradients.
Here one kernel takes the heads of TTT-Linear through a whole group of mini-batches, forwards or
backwards; those of TTT-MLP go through it by blocks of mini-batches, see `mlp_blocks`.

The backward pass goes through a group from its end, with what the forward pass has kept of it: the
weights of a start are those of the end with what was written added back,
`W_n = W_{n+1} + xᵀ (η ⊙ g)`, so no weights are kept inside a group. With groups, the fast weights
are kept between them, and the backward pass runs each forwards again; without, all mini-batches are
one group. Under activation checkpointing TTT-MLP may keep what there is of it in the first forward
pass, and its scan then runs once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ttt.ops import recompute
from ttt.ops.autocast import without_autocast
from ttt.ops.inner_loop import linear_kernels, mlp_blocks
from ttt.ops.inner_loop.pieces import EPSILON, InnerLayers, flatten, memory

SPLIT_TYPES: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
"""For frames of these types, factors of products are split in two bfloat16 terms, which is exact to
some 16 bits, and to all where the factor is bfloat16. Factors are shared by many products, and this
way are split once; float32 frames take three products of TensorFloat32, more exact and slower."""


@dataclass(frozen=True)
class Shape:
    """A shape says how a kernel is compiled."""

    tile: int
    """Rows of W at once."""
    warps: int


SHAPES = {
    "linear_forward": Shape(tile=64, warps=4),
    "linear_backward": Shape(tile=64, warps=4),
}
"""The fastest of those that were tried; see docs/benchmarks.md."""


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
    """`ttt.ops.inner_loop.ttt_linear_mlp.inner_scan` of frames laid out in mini-batches.

    Args:
        q, k, v: [B, H, N, K, f], K and f powers of two from 16 on, f at most 128, K at most 64,
            with two layers 32: for more frames at once, what all parts have would not fit.
        eta: [B, H, N, K]; this and all that follow in float32.
        layers: [B, H, in, out] and [B, H, out], one or two of them.
        ln_weight, ln_bias: [H, f].
        token_scale: [K].
        num_writes: how many mini-batches write: N, or N − 1 if the last is incomplete.
        group_size: mini-batches between which nothing but the fast weights is kept; None: all
            is kept that the backward pass needs.

    Returns:
        [B, H, N, K, f] in the dtype of q, and the weights afterwards.
    """
    frames = q, k, v, eta, token_scale, ln_weight, ln_bias
    weights: tuple[Tensor, ...] = flatten(layers)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*frames, *weights)):
        out, *weights = _Scan.apply(*frames, num_writes, group_size, *weights)
    else:
        contiguous = tuple(_aligned(x) for x in frames)
        out = torch.empty_like(contiguous[0])
        everything = (0, q.shape[2])
        weights, _ = _forward(contiguous, weights, out, num_writes, everything, keep=False)
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
        group_size: int | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        frames = tuple(_aligned(x) for x in (q, k, v, eta, token_scale, ln_weight, ln_bias))
        groups = _groups(q.shape[2], group_size or q.shape[2])
        starts: list[Tensor] = []
        kept: tuple[Tensor, ...] = ()
        ctx.has_kept = group_size is None
        made = recompute.kept() if ctx.has_kept else None
        if made is not None:
            starts, (out, *rest) = list(weights), made
            weights, kept = tuple(rest[: len(starts)]), tuple(rest[len(starts) :])
        else:
            out = torch.empty_like(frames[0])
            keep = ctx.has_kept and (recompute.may_keep() or not recompute.discards_what_is_saved())
            for group in groups:
                starts += weights
                weights, kept = _forward(frames, weights, out, num_writes, group, keep=keep)
            if recompute.may_keep() and keep:
                recompute.keep((out, *weights, *kept))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*frames, *starts, *((*weights, *kept) if ctx.has_kept else ()))
        ctx.num_writes, ctx.groups = num_writes, groups
        return out, *weights

    @staticmethod
    @once_differentiable  # else the gradients' own gradients would be zero, and nothing say so
    @without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Once: under activation checkpointing they can be asked for once.
        saved = list(ctx.saved_tensors)
        count = len(grads) - 1
        frames = tuple(saved[:7])
        starts, saved = saved[7 : 7 + count * len(ctx.groups)], saved[7 + count * len(ctx.groups) :]
        ends, kept = saved[:count], tuple(saved[count:])
        q, eta = frames[0], frames[3]
        d_out = torch.zeros_like(q) if grads[0] is None else _aligned(grads[0])
        d_weights = _to_overwrite(grads[1:], starts[:count])
        d_frames = [torch.empty_like(x) for x in frames[:4]]
        lead = q.shape[:2]
        # Of each program its own; summed over the batch below.
        d_scale = eta.new_zeros(*lead, q.shape[3])
        d_norm = [eta.new_zeros(*lead, q.shape[4]) for _ in range(2)]
        out = q.new_empty(0) if ctx.has_kept else torch.empty_like(q)
        for index, group in reversed(list(enumerate(ctx.groups))):
            if ctx.has_kept:
                weights = tuple(ends)
            else:
                start = tuple(starts[index * count : (index + 1) * count])
                weights, kept = _forward(frames, start, out, ctx.num_writes, group, keep=True)
            results = (d_out, *d_frames, d_scale, *d_norm, *d_weights)
            _backward(frames, weights, kept, results, ctx.num_writes, group)
        # TTT-Linear overwrites some of what was kept. Another pass, if one is asked for, goes
        # forwards.
        ctx.has_kept = False
        d_shared = (d_scale.sum((0, 1)), *(x.sum(0) for x in d_norm))
        return *d_frames, *d_shared, None, None, *d_weights


def _aligned(x: Tensor) -> Tensor:
    """Return a tensor in one piece, from a multiple of 16 bytes on, as all tensors of our own are:
    for pointers of another kind Triton compiles a kernel again."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _to_overwrite(weights: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Copies of fast weights, or of their gradients; None is zero."""
    return [
        y.new_zeros(y.shape) if x is None else x.clone(memory_format=torch.contiguous_format)
        for x, y in zip(weights, like, strict=True)
    ]


def _groups(num_batches: int, size: int) -> list[tuple[int, int]]:
    return [(n, min(n + size, num_batches)) for n in range(0, num_batches, size)]


def _forward(
    frames: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    out: Tensor,
    num_writes: int,
    group: tuple[int, int],
    *,
    keep: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The weights after a group, whose part of `out` it fills; and what the backward pass needs, if
    `keep`."""
    split = out.dtype in SPLIT_TYPES
    if len(weights) == 4:
        return mlp_blocks.forward(frames, weights, out, num_writes, group, keep=keep, split=split)
    rows, size, width = math.prod(out.shape[:2]), *out.shape[3:]
    num_kept = rows * size * (group[1] - group[0])
    kept = tuple(memory(weights[0], num_kept, width, exists=keep) for _ in range(2))
    after = tuple(_to_overwrite(weights, weights))
    _launch(
        linear_kernels.linear_forward,
        frames,
        (*after, out, _scratch(out), *kept),
        (num_writes, *group),
        KEEP=keep,
    )
    return after, kept


def _backward(
    frames: tuple[Tensor, ...],
    ends: tuple[Tensor, ...],
    kept: tuple[Tensor, ...],
    results: tuple[Tensor, ...],
    num_writes: int,
    group: tuple[int, int],
) -> None:
    """Go through a group from its end, where its weights are `ends`: `results` are the gradient to
    the output, and those that are filled or added to."""
    if len(ends) == 4:
        split = frames[0].dtype in SPLIT_TYPES
        mlp_blocks.backward(frames, ends, kept, results, num_writes, group, split=split)
        return
    (weight,) = _to_overwrite(ends[:1], ends[:1])
    _launch(
        linear_kernels.linear_backward,
        frames,
        (weight, _scratch(frames[0]), *kept, *results),
        (num_writes, *group),
    )


def _scratch(out: Tensor) -> Tensor:
    """A program's own memory."""
    rows, size, width = math.prod(out.shape[:2]), *out.shape[3:]
    return out.new_empty(rows, size, 2 * width, dtype=torch.float32)


def _launch(
    kernel: Any,
    frames: tuple[Tensor, ...],
    others: tuple[Tensor, ...],
    numbers: tuple[int, int, int],
    **options: Any,
) -> None:
    batch, heads, num_batches, size, width = frames[0].shape
    shape = SHAPES[kernel.__name__]
    kernel[(batch * heads,)](
        *frames,
        *others,
        heads,
        num_batches,
        *numbers,
        # Not a constant, so that the compiler does not unroll the loops over tiles.
        width,
        EPS=EPSILON,
        K=size,
        F=width,
        SPLIT=frames[0].dtype in SPLIT_TYPES,
        TILE=min(shape.tile, width),
        num_warps=shape.warps,
        num_stages=1,  # the registers are full: nothing can be loaded ahead
        **options,
    )
