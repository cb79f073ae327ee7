"""The Triton kernels of `in_place.terms` and of inverses: one pass over memory instead of ten."""

import triton
import triton.language as tl


@triton.jit
def _store(place, step, x, mask, IS_LEFT: tl.constexpr):
    """The terms of x at place, place + step and place + 2 step."""
    kind = place.dtype.element_ty
    high = x.to(kind)
    low = (x - high.to(x.dtype)).to(kind)
    tl.store(place, high, mask=mask)
    if IS_LEFT:
        tl.store(place + step, high, mask=mask)
        tl.store(place + 2 * step, low, mask=mask)
    else:
        tl.store(place + step, low, mask=mask)
        tl.store(place + 2 * step, high, mask=mask)


@triton.jit
def _rest(x, KIND: tl.constexpr):
    high = x.to(KIND).to(x.dtype)
    return x - high - (x - high).to(KIND).to(x.dtype)


@triton.jit
def weights_kernel(
    x,
    out,
    rows,
    columns,
    skip,
    shift,
    num_chunks,
    x_batch,
    x_row,
    x_column,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    IS_LEFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STORED: tl.constexpr,
):
    """Rows of a chunk's weights, centered, and their mean.

    Neighboring threads store neighboring numbers, which are terms of one weight: each of them reads
    the weight, which is cheap, as it is near by then.
    """
    batch, chunk = tl.program_id(2).to(tl.int64), tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = x + batch * x_batch + (row - skip).to(tl.int64)[:, None] * x_row
    is_row, is_read = (row < rows)[:, None], ((row >= skip) & (row < rows))[:, None]
    i = tl.arange(0, COLUMNS)
    column = chunk * SIZE + i - shift
    inside = is_read & ((i < SIZE) & (column >= 0) & (column < columns))[None, :]
    mean = tl.sum(tl.load(start + column[None, :] * x_column, mask=inside, other=0.0), 1) / SIZE
    rest = _rest(mean, out.dtype.element_ty)
    first = ((batch * rows + row) * num_chunks + chunk) * (PADDED * 3)
    for done in range(0, PADDED * 3, STORED):
        place = done + tl.arange(0, STORED)
        u = place // 3
        source = chunk * SIZE + u - shift
        is_there = is_read & ((u < SIZE) & (source >= 0) & (source < columns))[None, :]
        value = tl.load(start + source[None, :] * x_column, mask=is_there, other=0.0)
        ends = tl.where(((u == SIZE) | (u == SIZE + 2))[None, :], mean[:, None], 0.0)
        ends = tl.where((u == SIZE + 1)[None, :], rest[:, None], ends)
        value = tl.where((u < SIZE)[None, :], value - mean[:, None], ends)
        high = value.to(out.dtype.element_ty)
        low = (value - high.to(value.dtype)).to(out.dtype.element_ty)
        is_low = (place - u * 3 == (2 if IS_LEFT else 1))[None, :]
        stored = is_row & (place < PADDED * 3)[None, :]
        tl.store(out + first[:, None] + place[None, :], tl.where(is_low, low, high), mask=stored)


@triton.jit
def values_kernel(
    x,
    less,
    out,
    rounded,
    length,
    less_length,
    size,
    width,
    x_batch,
    x_row,
    less_batch,
    less_row,
    out_batch,
    rounded_batch,
    rounded_row,
    IS_ROUNDED: tl.constexpr,
    IS_LEFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDING: tl.constexpr,
):
    """A chunk's frames less those of `less`, and their sum; both are zero past their lengths.
    IS_ROUNDED: also the frames in 16 bits."""
    batch = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, size, ROWS):
        row = start + tl.arange(0, ROWS)
        here = (column < width)[None, :]
        inside = (row < length)[:, None] & here
        place = x + batch * x_batch + row[:, None] * x_row + column[None, :]
        value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        place = less + batch * less_batch + row[:, None] * less_row + column[None, :]
        value -= tl.load(place, mask=(row < less_length)[:, None] & here, other=0.0)
        total += tl.sum(value, 0)
        place = out + batch * out_batch + row[:, None] * 3 * width + column[None, :]
        _store(place, width, value, (row < size)[:, None] & here, IS_LEFT)
        if IS_ROUNDED:
            place = rounded + batch * rounded_batch + row[:, None] * rounded_row + column[None, :]
            tl.store(place, value.to(rounded.dtype.element_ty), mask=inside)
    end = tl.arange(0, PADDING)
    rest = _rest(total, out.dtype.element_ty)
    ends = tl.where(((end == 0) | (end == 1))[:, None], total[None, :], 0.0)
    ends = tl.where((end == 2)[:, None], rest[None, :], ends)
    place = out + batch * out_batch + (size + end)[:, None] * 3 * width + column[None, :]
    _store(place, width, ends, (end < PADDING)[:, None] & (column < width)[None, :], IS_LEFT)


@triton.jit
def split_kernel(x, high, low, span, BLOCK: tl.constexpr):
    """Two terms of each number of a piece of memory."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, mask=place < span)
    first = value.to(high.dtype.element_ty)
    tl.store(high + place, first, mask=place < span)
    second = (value - first.to(value.dtype)).to(low.dtype.element_ty)
    tl.store(low + place, second, mask=place < span)


@triton.jit
def factor_kernel(
    matrix, out, size, matrix_batch, matrix_row, out_batch, out_row, BLOCK: tl.constexpr
):
    """L⁻¹ of L Lᵀ = matrix, [size, size] with size up to BLOCK; one program a matrix.

    Elimination of rows, of the matrix and of the identity beside it. After step k, columns up to k
    are those of L⁻¹, and the others what is left of the matrix, which stays symmetric.
    """
    batch = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    i, j = n[:, None], n[None, :]
    inside = (i < size) & (j < size)
    # Only the lower triangle is read.
    place = matrix + batch * matrix_batch + tl.maximum(i, j) * matrix_row + tl.minimum(i, j)
    x = tl.load(place, mask=inside, other=0.0)
    x = tl.where(inside, x, tl.where(i == j, 1.0, 0.0))
    for k in range(0, BLOCK):
        row = tl.sum(tl.where(i == k, x, 0.0), 0)
        column = tl.sum(tl.where(j == k, x, 0.0), 1)
        scale = 1.0 / tl.sqrt_rn(tl.sum(tl.where(n == k, row, 0.0), 0))
        row = tl.where(n == k, scale, row * scale)
        left = tl.where(n > k, column * scale, 0.0)
        others = tl.where(j == k, 0.0, x) - left[:, None] * row[None, :]
        x = tl.where(i == k, row[None, :], others)
    tl.store(out + batch * out_batch + i * out_row + j, x, mask=inside)
