"""The Triton kernels of `in_place.terms`: one pass over memory instead of ten."""

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
    shift,
    size,
    padded,
    num_chunks,
    x_batch,
    x_row,
    x_column,
    IS_LEFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDING: tl.constexpr,
):
    """Rows of a chunk's weights, centered, and their mean."""
    batch, chunk = tl.program_id(2).to(tl.int64), tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, COLUMNS)
    column = chunk * size + i - shift
    inside = (row < rows)[:, None] & ((i < size) & (column >= 0) & (column < columns))[None, :]
    place = x + batch * x_batch + row.to(tl.int64)[:, None] * x_row + column[None, :] * x_column
    value = tl.load(place, mask=inside, other=0.0)
    mean = tl.sum(value, 1) / size
    first = ((batch * rows + row) * num_chunks + chunk) * padded * 3
    centered = tl.where((i < size)[None, :], value - mean[:, None], 0.0)
    stored = (row < rows)[:, None] & (i < size)[None, :]
    _store(out + first[:, None] + i[None, :] * 3, 1, centered, stored, IS_LEFT)
    end = tl.arange(0, PADDING)
    rest = _rest(mean, out.dtype.element_ty)
    ends = tl.where(((end == 0) | (end == 2))[None, :], mean[:, None], 0.0)
    ends = tl.where((end == 1)[None, :], rest[:, None], ends)
    stored = (row < rows)[:, None] & (end < PADDING)[None, :]
    _store(out + first[:, None] + (size + end)[None, :] * 3, 1, ends, stored, IS_LEFT)


@triton.jit
def values_kernel(
    x,
    out,
    length,
    size,
    width,
    x_batch,
    x_row,
    out_batch,
    IS_LEFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDING: tl.constexpr,
):
    """A chunk's frames and their sum; frames from `length` on are zero."""
    batch = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, size, ROWS):
        row = start + tl.arange(0, ROWS)
        here = (column < width)[None, :]
        inside = (row < length)[:, None] & here
        place = x + batch * x_batch + row[:, None] * x_row + column[None, :]
        value = tl.load(place, mask=inside, other=0.0)
        total += tl.sum(value, 0)
        place = out + batch * out_batch + row[:, None] * 3 * width + column[None, :]
        _store(place, width, value, (row < size)[:, None] & here, IS_LEFT)
    end = tl.arange(0, PADDING)
    rest = _rest(total, out.dtype.element_ty)
    ends = tl.where(((end == 0) | (end == 1))[:, None], total[None, :], 0.0)
    ends = tl.where((end == 2)[:, None], rest[None, :], ends)
    place = out + batch * out_batch + (size + end)[:, None] * 3 * width + column[None, :]
    _store(place, width, ends, (end < PADDING)[:, None] & (column < width)[None, :], IS_LEFT)
