"""The Triton kernels of `ttt.ops.in_place.delta_window`: what inverses are multiplied with, in one
pass over memory each."""

import triton
import triton.language as tl


@triton.jit
def residual_kernel(
    v,
    read,
    first,
    out,
    size,
    width,
    lag,
    num_first,
    v_batch,
    v_row,
    read_batch,
    read_row,
    first_batch,
    first_row,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """V less what the keys read: their frames lie `lag` rows before, but for the first `lag` of
    them, which read `first`, or nothing if `num_first` is 0."""
    batch = tl.program_id(2).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < size) & (column < width)
    value = tl.load(v + batch * v_batch + row * v_row + column, mask=inside, other=0.0)
    place = read + batch * read_batch + (row - lag) * read_row + column
    value = value.to(tl.float32) - tl.load(place, mask=inside & (row >= lag), other=0.0)
    place = first + batch * first_batch + row * first_row + column
    value -= tl.load(place, mask=inside & (row < num_first), other=0.0)
    tl.store(out + (batch * size + row) * width + column, value, mask=inside)


@triton.jit
def received_kernel(
    x,
    again,
    following,
    out,
    size,
    width,
    lag,
    x_batch,
    x_row,
    again_batch,
    again_row,
    following_batch,
    following_row,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """X less what the next chunk's first `lag` pairs hand back: of each of these its row of
    `following`, weighted by its row of `again`."""
    batch = tl.program_id(2).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < size) & (column < width)
    value = tl.load(x + batch * x_batch + row * x_row + column, mask=inside, other=0.0)
    for pair in range(lag):
        place = again + batch * again_batch + pair * again_row + row
        weight = tl.load(place, mask=row < size, other=0.0)
        place = following + batch * following_batch + pair * following_row + column
        value -= weight * tl.load(place, mask=column < width, other=0.0)
    tl.store(out + (batch * size + row) * width + column, value, mask=inside)
