"""Triton kernels around the products of `float8`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt.ops.frozen.reference import E4M3

BLOCK = 2048
"""Numbers of a row at once."""
TILE = 128
"""Rows and columns that are turned at once."""


@triton.jit
def _to_e4m3_kernel(
    x, factors, values, scales, width,
    HAS_FACTORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        here = start + columns
        wide = tl.load(x + row + here, mask=here < width, other=0.0).to(tl.float32)
        if HAS_FACTORS:
            wide *= tl.load(factors + here, mask=here < width, other=0.0)
        largest = tl.maximum(largest, tl.abs(wide))
    most = tl.max(largest, 0)
    scale = tl.where(most > 0, most / 448.0, 1.0)
    # The row is read again, from the cache.
    for start in range(0, width, BLOCK):
        here = start + columns
        wide = tl.load(x + row + here, mask=here < width, other=0.0).to(tl.float32)
        if HAS_FACTORS:
            wide *= tl.load(factors + here, mask=here < width, other=0.0)
        tl.store(values + row + here, (wide / scale).to(tl.float8e4nv), mask=here < width)
    tl.store(scales + tl.program_id(0), scale)


@triton.jit
def _turn_kernel(source, target, rows, columns, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tile = tl.load(source + row[:, None] * columns + column[None, :], mask=inside, other=0)
    tl.store(target + column[:, None] * rows + row[None, :], tl.trans(tile), mask=tl.trans(inside))


def to_e4m3(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [N, C], times `factors` [C], in e4m3, and the scales [N, 1]; see `reference.to_e4m3`."""
    x = x.contiguous()
    num_rows, width = x.shape
    values = torch.empty_like(x, dtype=E4M3)
    scales = torch.empty(num_rows, 1, dtype=torch.float32, device=x.device)
    # Triton launches on the current device.
    with torch.cuda.device_of(x):
        _to_e4m3_kernel[(num_rows,)](
            x,
            x if factors is None else factors,
            values,
            scales,
            width,
            HAS_FACTORS=factors is not None,
            BLOCK=min(BLOCK, triton.next_power_of_2(width)),
            num_warps=8,
        )
    return values, scales


def turned(values: Tensor) -> Tensor:
    """[in, out] of bytes [out, in], both row after row."""
    rows, columns = values.shape
    target = values.new_empty(columns, rows)
    with torch.cuda.device_of(values):
        _turn_kernel[(triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))](
            values.view(torch.uint8),
            target.view(torch.uint8),
            rows,
            columns,
            TILE=TILE,
            num_warps=8,
        )
    return target
