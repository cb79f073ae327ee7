"""The scan of TTT-Linear and TTT-MLP on a CUDA device: one kernel for a group of mini-batches.

Every head of every row is a scan of its own, over mini-batches of a few frames: as many small
products as PyTorch would launch kernels for, hundreds of them a mini-batch with their gradients.
Here one program takes one head through a whole group, forwards or backwards.

The backward pass needs what the layers gave for the group's frames, and goes through it from its
end: a mini-batch's own weights are those of its end with what it wrote added back,
`W_n = W_{n+1} + xᵀ (η ⊙ g)`, so no weights are kept inside a group. With groups, the fast weights
are kept between them, and the backward pass runs each forwards again; without, all mini-batches are
one group, and the forward pass keeps what the layers gave.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ttt.ops.autocast import without_autocast
from ttt.ops.inner_loop import kernels, linear_kernels
from ttt.ops.inner_loop.mlp_backward import mlp_backward
from ttt.ops.inner_loop.pieces import EPSILON, InnerLayers, flatten
from ttt.ops.recompute import discards_what_is_saved

SPLIT_TYPES: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
"""For frames of these types, factors of products are split in two bfloat16 terms, which is exact to
some 16 bits, and to all where the factor is bfloat16. Factors are shared by many products, and this
way are split once; float32 frames take three products of TensorFloat32, more exact and slower."""


@dataclass(frozen=True)
class Shape:
    """A shape says how a kernel is compiled."""

    tile: int
    """Rows of W, or hidden units, at once."""
    warps: int


SHAPES = {
    "linear_forward": Shape(tile=64, warps=4),
    "linear_backward": Shape(tile=64, warps=4),
    "mlp_forward": Shape(tile=16, warps=2),
    "mlp_backward": Shape(tile=16, warps=4),
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
        out = torch.empty_like(frames[0])
        groups = _groups(q.shape[2], group_size or q.shape[2])
        starts: list[Tensor] = []
        kept: tuple[Tensor, ...] = ()
        ctx.has_kept = group_size is None
        keep = ctx.has_kept and not discards_what_is_saved()
        for group in groups:
            starts += weights
            weights, kept = _forward(frames, weights, out, num_writes, group, keep=keep)
        if ctx.has_kept and not keep:
            # Of the shapes that checkpointing expects again, and no memory.
            num_frames = math.prod(q.shape[:4])
            kept = tuple(x.new_empty(1, 1).expand(num_frames, x.shape[1]) for x in kept)
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
        kernel, parts, options = linear_kernels.linear_backward, 0, {}
        if count == 4:
            parts = _backward_parts(*q.shape[3:])
            kernel, options = mlp_backward, {"PARTS": parts}
        d_weights = _for_backward(grads[1:], starts[:count], parts)
        d_frames = [torch.empty_like(x) for x in frames[:4]]
        lead = q.shape[:2]
        # Of each program its own; summed over the batch below.
        d_scale = eta.new_zeros(*lead, q.shape[3])
        d_norm = [eta.new_zeros(*lead, q.shape[4]) for _ in range(2)]
        scratch = _scratch(q, starts[:count])
        out = q.new_empty(0) if ctx.has_kept else torch.empty_like(q)
        for index, group in reversed(list(enumerate(ctx.groups))):
            if ctx.has_kept:
                weights = tuple(ends)
            else:
                start = tuple(starts[index * count : (index + 1) * count])
                weights, kept = _forward(frames, start, out, ctx.num_writes, group, keep=True)
            changing = _for_backward(weights, weights, parts)
            _launch(
                kernel,
                frames,
                (*changing, scratch, *kept, d_out, *d_frames, d_scale, *d_norm, *d_weights),
                (ctx.num_writes, *group),
                **options,
            )
        # Some of what was kept is overwritten. Another pass, if one is asked for, goes forwards.
        ctx.has_kept = False
        d_shared = (d_scale.sum((0, 1)), *(x.sum(0) for x in d_norm))
        return *d_frames, *d_shared, None, None, *_from_backward(d_weights, starts[:count], parts)


def _aligned(x: Tensor) -> Tensor:
    """Return a tensor in one piece, from a multiple of 16 bytes on, as all tensors of our own are:
    for pointers of another kind Triton gives threads other pieces, and `_turned_term` would be
    wrong."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _for_backward(
    weights: Sequence[Tensor | None], like: Sequence[Tensor], parts: int
) -> list[Tensor]:
    """Fast weights, or their gradients, for a backward kernel to overwrite; None is zero."""
    if all(x is None for x in weights):
        return [x.new_zeros(x.shape) for x in like]
    given = [y.new_zeros(y.shape) if x is None else x for x, y in zip(weights, like, strict=True)]
    ordered = _backward_order(given, parts)
    return [x.clone(memory_format=torch.contiguous_format) for x in ordered]


def _from_backward(found: Sequence[Tensor], like: Sequence[Tensor], parts: int) -> Sequence[Tensor]:
    """The other way round."""
    if len(like) == 2:
        return found
    results = [x.new_empty(x.shape) for x in like]
    for view, x in zip(_backward_order(results, parts), found, strict=True):
        view.copy_(x.view(view.shape))
    return results


def _backward_order(weights: Sequence[Tensor], parts: int) -> Sequence[Tensor]:
    """Views in the order in which a backward kernel takes them."""
    if len(weights) == 2:
        return weights
    w1, b1, w2, b2 = weights
    w1, w2 = in_lines(w1, w2, parts)
    return w1, b1, w2, b2


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
    rows, size, width = math.prod(out.shape[:2]), *out.shape[3:]
    num_kept = rows * size * (group[1] - group[0])
    kept: tuple[Tensor, ...]

    def new(*shape: int) -> Tensor:
        return out.new_empty(num_kept if keep else 0, *shape, dtype=torch.float32)

    if len(weights) == 2:
        kept = new(width), new(width)
        after = tuple(x.clone(memory_format=torch.contiguous_format) for x in weights)
        _launch(
            linear_kernels.linear_forward,
            frames,
            (*after, out, _scratch(out, weights), *kept),
            (num_writes, *group),
            KEEP=keep,
        )
        return after, kept
    w1, b1, w2, b2 = weights
    hidden = b1.shape[-1]
    kept = *(new(hidden) for _ in range(3)), new(width), new(width), new(size)
    parts = _parts(width)
    w1, w2 = (x.contiguous() for x in in_lines(w1, w2, parts))
    b1, b2 = (x.clone(memory_format=torch.contiguous_format) for x in (b1, b2))
    scratch = out.new_zeros(rows, size, 2 * hidden + 3 * width, dtype=torch.float32)
    _launch(
        kernels.mlp_forward,
        frames,
        (w1, b1, w2, b2, out, scratch, *kept),
        (num_writes, *group),
        KEEP=keep,
        PARTS=parts,
    )
    found1, found2 = (x.new_empty(x.shape) for x in (weights[0], weights[2]))
    for lines, found in zip(in_lines(found1, found2, parts), (w1, w2), strict=True):
        lines.copy_(found)
    return (found1, b1, found2, b2), kept


def _parts(width: int) -> int:
    """Parts that `mlp_forward` divides a head into, each one warp's."""
    return min(SHAPES["mlp_forward"].warps, width // 16)


def _backward_parts(size: int, width: int) -> int:
    """Return the number of parts for `mlp_backward`, more for more frames."""
    return min(SHAPES["mlp_backward"].warps * size // 16, width // 16)


def in_lines(w1: Tensor, w2: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Views of w1 [B, H, f, h] and w2 [B, H, h, f] in the order in which the threads of
    `mlp_forward` hold them: of 16 hidden units and 8 columns of each part in turn, see
    `kernels._line`. Of these units, four in sequence are one thread's as columns."""
    columns, units = (parts, -1, 4, 2), (-1, 4, 2, 2)
    w1 = w1.unflatten(-1, units).unflatten(2, columns)
    w2 = w2.unflatten(-1, columns).unflatten(2, units)
    # Columns as part, piece, pair, of it; units as piece, four, of rows g and g + 8, of two rows.
    return w1.permute(0, 1, 6, 3, 2, 7, 9, 4, 8, 5), w2.permute(0, 1, 2, 7, 6, 3, 5, 8, 4, 9)


def _scratch(out: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """A program's own memory."""
    per_frame = 2 * out.shape[-1]
    if len(weights) == 4:
        per_frame = 5 * out.shape[-1] + 9 * weights[1].shape[-1]
    rows, size = math.prod(out.shape[:2]), out.shape[3]
    return out.new_empty(rows, size, per_frame, dtype=torch.float32)


def _launch(
    kernel: Any,
    frames: tuple[Tensor, ...],
    others: tuple[Tensor, ...],
    numbers: tuple[int, int, int],
    **options: Any,
) -> None:
    batch, heads, num_batches, size, width = frames[0].shape
    shape = SHAPES[kernel.__name__]
    num_units, tile, warps = width, min(shape.tile, width), shape.warps
    if "PARTS" in options:
        num_units = options["D"] = others[1].shape[-1]
        # All parts have all of a tile's units for all frames.
        tile, warps = max(16, shape.tile * 16 // size), options["PARTS"]
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
        TILE=tile,
        num_warps=warps,
        num_stages=1,  # the registers are full: nothing can be loaded ahead
        **options,
    )
