"""TTT-MLP on a CUDA device, a block of M frames at a time.

Inside a block the weights stay those of its start, and what its mini-batches have written so far is
read beside them, in the dual form (docs/mathematics.md). With P[t, s] the scale of the write of
frame s where its mini-batch is before that of t, else 0; R the same with `token_scale[t]` for the
frames of t's own mini-batch up to t; w the scale of what a frame writes for those after the block:

    Z1  = K W1 + b1  − (P ⊙ (K Kᵀ + 1)) S1          X2  = gelu(Z1)
    Z2  = X2 W2 + b2 − (P ⊙ (X2 X2ᵀ + 1)) S2        S2  = eta ⊙ ∂loss/∂Z2
    U   = S2 W2ᵀ     − (P ⊙ S2 S2ᵀ) X2              S1  = gelu'(Z1) ⊙ U
    ZQ1 = Q W1 + b1  − (R ⊙ (Q Kᵀ + 1)) S1          XQ2 = gelu(ZQ1)
    ZQ2 = XQ2 W2 + b2 − (R ⊙ (XQ2 X2ᵀ + 1)) S2      out = Q + LN(ZQ2)
    W1 ← W1 − Kᵀ (w S1),   W2 ← W2 − X2ᵀ (w S2)

So only two products with weights, X2 W2 and S2 W2ᵀ, must wait for the mini-batch before, and two
more backwards; all others take a block's frames at once. Weights are read and written once a block.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ttt.ops.inner_loop import mlp_back_writes, mlp_backward, mlp_forward
from ttt.ops.inner_loop.pieces import BLOCK, EPSILON, memory


@dataclass(frozen=True)
class Shape:
    """A shape says how a kernel is compiled, and whether a program takes one tile or all."""

    tile: int
    """Hidden units at once."""
    warps: int = 4
    all_tiles: bool = True
    stages: int = 1


SHAPES = {
    mlp_forward.mlp_first: Shape(64, all_tiles=False),
    mlp_forward.mlp_second: Shape(64, all_tiles=False),
    mlp_forward.mlp_writes: Shape(64, stages=2),
    mlp_forward.mlp_reads: Shape(32, stages=3),
    mlp_backward.mlp_back_frames: Shape(32),
    mlp_backward.mlp_back_first: Shape(64, all_tiles=False),
    mlp_backward.mlp_back_second: Shape(64, all_tiles=False),
    mlp_backward.mlp_back_ends: Shape(128, all_tiles=False),
    mlp_backward.mlp_back_units: Shape(64),
    mlp_back_writes.mlp_back_writes: Shape(64, stages=2),
    mlp_backward.mlp_back_inputs: Shape(64),
    mlp_backward.mlp_grad_first: Shape(64, all_tiles=False),
    mlp_backward.mlp_grad_second: Shape(128, all_tiles=False),
}
"""The fastest of those with four warps that were tried; see docs/benchmarks.md, also for what more
warps and, in `mlp_back_writes`, one stage did."""

KEPT = ("s1", "kept_z2", "kept_zq2")
RESULTS = (
    "d_out", "d_q", "d_k", "d_v", "d_eta", "d_token_scale", "d_norm_weight", "d_norm_bias",
    "d_w1", "d_b1", "d_w2", "d_b2",
)  # fmt: skip
"""The names of kernels' parameters."""

Kept = tuple[Tensor, ...]
"""S1 [rows, ·, D], in terms by block, and Z2 and ZQ2 [rows, ·, f] of a group's frames, in whole
blocks."""


def forward(
    frames: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    out: Tensor,
    num_writes: int,
    group: tuple[int, int],
    *,
    keep: bool,
    split: bool,
) -> tuple[tuple[Tensor, ...], Kept]:
    """The weights after a group, whose part of `out` it fills; and what the backward pass needs, if
    `keep`."""
    launch = _Launch(frames, weights, num_writes, group, split)
    num_kept = launch.num_blocks if keep else 1
    made = launch.kept(num_kept)
    after = tuple(x.clone(memory_format=torch.contiguous_format) for x in weights)
    launch.know(dict(zip(("w1", "b1", "w2", "b2"), after, strict=True)), out=out)
    launch.know(dict(zip(KEPT, made, strict=True)), num_kept=num_kept)
    launch.know({name: launch.new(BLOCK, "D") for name in ("z1", "zq1", "slope")})
    launch.know(x2=launch.terms(BLOCK, "D"), s2=launch.terms(BLOCK, "F"))
    launch.know(w2_terms=launch.terms(out.shape[-1], "D"))
    for start in launch.starts:
        launch(mlp_forward.mlp_first, start)
        launch(mlp_forward.mlp_second, start)
        launch(mlp_forward.mlp_writes, start)
        launch(mlp_forward.mlp_reads, start)
    # What the last block has written.
    end = group[0] + launch.num_blocks * launch.per_block
    launch(mlp_forward.mlp_first, end)
    launch(mlp_forward.mlp_second, end)
    return after, made if keep else launch.kept(launch.num_blocks, exists=False)


def backward(
    frames: tuple[Tensor, ...],
    ends: tuple[Tensor, ...],
    kept: Kept,
    results: tuple[Tensor, ...],
    num_writes: int,
    group: tuple[int, int],
    *,
    split: bool,
) -> None:
    """Go through a group from its end.

    Args:
        ends: the weights after the group.
        results: the gradients of `RESULTS`. The first is given; those to the frames are filled, by
            row those to what rows share are added to, and those to the weights of the group's end
            become those to the weights of its start.
    """
    launch = _Launch(frames, ends, num_writes, group, split)
    w1, b1, w2, _ = (x.clone(memory_format=torch.contiguous_format) for x in ends)
    launch.know(dict(zip(RESULTS, results, strict=True)), dict(zip(KEPT, kept, strict=True)))
    launch.know(w1=w1, b1=b1, w2=w2, num_kept=launch.num_blocks)
    launch.know({name: launch.new(BLOCK, "D") for name in ("z1", "slope", "u", "d_s1", "d_x2")})
    hidden = ("x2", "xq2", "d_zq1", "d_u", "d_z1")
    launch.know({name: launch.terms(BLOCK, "D") for name in hidden})
    launch.know({name: launch.new(BLOCK, "F") for name in ("d_s2", "d_target")})
    launch.know({name: launch.terms(BLOCK, "F") for name in ("s2", "d_zq2", "d_z2")})
    launch.know(w2_terms=launch.terms(frames[0].shape[-1], "D"))
    squares = (
        "queries_keys", "keys_keys", "s2_s2", "d_zq2_s2", "x2_x2", "d_zq1_s1", "d_u_x2", "d_z2_s2"
    )  # fmt: skip
    launch.know({name: launch.new(BLOCK, "M") for name in squares})
    num_scales = launch.num_tiles(mlp_backward.mlp_back_ends)
    launch.know(d_scales=launch.new(1, "M"), NUM_SCALES=num_scales)
    for start in reversed(launch.starts):
        launch(mlp_backward.mlp_back_frames, start)
        launch(mlp_backward.mlp_back_first, start)
        launch(mlp_backward.mlp_back_second, start)
        launch(mlp_backward.mlp_back_ends, start)
        launch(mlp_backward.mlp_back_units, start)
        launch(mlp_back_writes.mlp_back_writes, start)
        launch(mlp_backward.mlp_back_inputs, start)
        launch(mlp_backward.mlp_grad_first, start)
        launch(mlp_backward.mlp_grad_second, start)


class _Launch:
    """A launch calls kernels on a group of mini-batches, with what it knows by their parameters'
    names."""

    def __init__(
        self,
        frames: tuple[Tensor, ...],
        weights: tuple[Tensor, ...],
        num_writes: int,
        group: tuple[int, int],
        split: bool,
    ) -> None:
        names = ("q", "k", "v", "eta", "token_scale", "norm_weight", "norm_bias")
        batch, heads, num_batches, size, width = frames[0].shape
        self.per_block = BLOCK // size
        self.starts = range(*group, self.per_block)
        self.num_blocks = len(self.starts)
        self._rows = batch * heads
        self._like = weights[0]
        self._values: dict[str, Any] = {
            **dict(zip(names, frames, strict=True)),
            "num_heads": heads,
            "num_batches": num_batches,
            "num_writes": num_writes,
            "first": group[0],
            "last": group[1],
            "EPS": EPSILON,
            "K": size,
            "F": width,
            # Not a constant, so that the compiler does not unroll the loops over tiles.
            "num_units": weights[1].shape[-1],
            "D": weights[1].shape[-1],
            "M": BLOCK,
            "SPLIT": split,
        }

    def know(self, *values: dict[str, Any], **more: Any) -> None:
        """Add to what it knows."""
        for some in (*values, more):
            self._values.update(some)

    def new(self, num_frames: int, width: str, *, exists: bool = True) -> Tensor:
        """Return memory of every row's own; see `memory`."""
        return memory(self._like, self._rows, num_frames, self._values[width], exists=exists)

    def terms(self, num_frames: int, width: str, *, exists: bool = True) -> Tensor:
        """Return memory for terms."""
        if not self._values["SPLIT"]:
            return self.new(num_frames, width, exists=exists)
        shape = self._rows, 2 * num_frames, self._values[width]
        return memory(self._like, *shape, exists=exists, dtype=torch.bfloat16)

    def kept(self, num_blocks: int, *, exists: bool = True) -> Kept:
        """Return memory for what is kept of blocks."""
        num_frames = num_blocks * BLOCK
        s1 = self.terms(num_frames, "D", exists=exists)
        return s1, *(self.new(num_frames, "F", exists=exists) for _ in range(2))

    def num_tiles(self, kernel: Any) -> int:
        """Return the number of tiles of hidden units."""
        return int(self._values["D"] // self._tile(kernel))

    def _tile(self, kernel: Any) -> int:
        return min(SHAPES[kernel].tile, self._values["D"])

    def __call__(self, kernel: Any, start: int) -> None:
        shape = SHAPES[kernel]
        self._values |= {"start": start, "TILE": self._tile(kernel)}
        grid = (self._rows,) if shape.all_tiles else (self._rows, self.num_tiles(kernel))
        kernel[grid](
            **{name: self._values[name] for name in kernel.arg_names},
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
