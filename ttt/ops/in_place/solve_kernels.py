"""The Triton kernels of `ttt.ops.in_place.solve`, which says what they are for."""

import triton
import triton.language as tl

from ttt.ops.in_place.terms_kernels import _rest, _store


@triton.jit
def halves_kernel(matrix, units, high, low, size, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """Two float16 numbers for each number of a matrix, in its unit; zero past its size."""
    place = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    inside = (row < size)[:, None] & (column < size)[None, :]
    source = matrix + place * size * size + row[:, None] * size + column[None, :]
    # A quotient of powers of two is exact.
    value = tl.load(source, mask=inside, other=0.0) / tl.load(units + place)
    first = value.to(tl.float16)
    target = place * PADDED * PADDED + row[:, None] * PADDED + column[None, :]
    tl.store(high + target, first, mask=(row < PADDED)[:, None])
    tl.store(
        low + target, (value - first.to(tl.float32)).to(tl.float16), mask=(row < PADDED)[:, None]
    )


@triton.jit
def _side(
    x,
    minus,
    edge,
    again,
    row,
    column,
    size,
    width,
    x_row,
    minus_row,
    edge_row,
    again_row,
    LAG: tl.constexpr,
    IS_ADJOINT: tl.constexpr,
    HAS_EDGE: tl.constexpr,
):
    """Rows of what is multiplied with: V − R, or what errors receive."""
    here = (column < width)[None, :]
    inside = (row < size)[:, None] & here
    value = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0)
    value = value.to(tl.float32)
    if IS_ADJOINT:
        if HAS_EDGE:
            for u in tl.static_range(0, LAG):
                weight = tl.load(again + u * again_row + row, mask=row < size, other=0.0)
                later = tl.load(edge + u * edge_row + column, mask=column < width, other=0.0)
                value -= weight[:, None] * later[None, :]
    else:
        has_read = inside & (row >= LAG)[:, None]
        place = minus + (row - LAG)[:, None] * minus_row + column[None, :]
        value -= tl.load(place, mask=has_read, other=0.0)
        if HAS_EDGE:
            place = edge + row[:, None] * edge_row + column[None, :]
            value -= tl.load(place, mask=(row < LAG)[:, None] & here, other=0.0)
    return value


@triton.jit
def solve_kernel(
    high,
    low,
    units,
    x,
    minus,
    edge,
    again,
    made,
    out,
    rounded,
    size,
    width,
    decay,
    half_batch,
    unit_batch,
    x_batch,
    x_row,
    minus_batch,
    minus_row,
    edge_batch,
    edge_row,
    again_batch,
    again_row,
    made_batch,
    out_batch,
    out_row,
    rounded_batch,
    rounded_row,
    LAG: tl.constexpr,
    IS_ADJOINT: tl.constexpr,
    HAS_EDGE: tl.constexpr,
    HAS_NEXT: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICE: tl.constexpr,
    PADDING: tl.constexpr,
):
    """Columns of one chunk's errors, or of their adjoint, and their terms."""
    batch = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    x += batch * x_batch
    minus += batch * minus_batch
    edge += batch * edge_batch
    again += batch * again_batch
    u = tl.arange(0, SLICE)
    row = tl.arange(0, SIZE)
    total = tl.zeros((SIZE, COLUMNS), tl.float32)
    half = batch * half_batch + row[:, None] * SIZE + u[None, :]
    for start in range(0, SIZE, SLICE):
        value = _side(
            x, minus, edge, again, start + u, column, size, width,
            x_row, minus_row, edge_row, again_row, LAG, IS_ADJOINT, HAS_EDGE,
        )  # fmt: skip
        # In units of the power of two below each column's largest number, over 2^13.
        largest = tl.max(tl.abs(value), 0)
        unit = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        # Smaller ones than these count as zeros.
        unit = tl.where(unit > 1e-33, unit / 8192, 1.0)
        value = value * (1 / unit)[None, :]
        right = value.to(tl.float16)
        right_low = (value - right.to(tl.float32)).to(tl.float16)
        left = tl.load(high + half + start)
        part = tl.dot(tl.load(low + half + start), right)
        part = tl.dot(left, right_low, part)
        # Not into the total: a tensor core rounds more than an addition in float32.
        part = tl.dot(left, right, part)
        total += part * unit[None, :]
    total = total * tl.load(units + batch * unit_batch)

    here = (column < width)[None, :]
    inside = (row < size)[:, None] & here
    place = made + batch * made_batch + row[:, None] * 3 * width + column[None, :]
    _store(place, width, total, inside, IS_ADJOINT)
    out += batch * out_batch
    if IS_ADJOINT:
        # Over what was read: by this program alone, which has done so.
        tl.debug_barrier()
        tl.store(out + row[:, None] * out_row + column[None, :], total, mask=inside)
        place = rounded + batch * rounded_batch + row[:, None] * rounded_row + column[None, :]
        tl.store(place, total.to(rounded.dtype.element_ty), mask=inside)
    else:
        summed = tl.sum(total, 0)
        rest = _rest(summed, made.dtype.element_ty)
        end = tl.arange(0, PADDING)
        ends = tl.where(((end == 0) | (end == 1))[:, None], summed[None, :], 0.0)
        ends = tl.where((end == 2)[:, None], rest[None, :], ends)
        place = made + batch * made_batch + (size + end)[:, None] * 3 * width + column[None, :]
        _store(place, width, ends, (end < PADDING)[:, None] & here, False)
        if HAS_NEXT:
            for k in tl.static_range(0, LAG):
                weight = tl.load(again + k * again_row + row, mask=row < size, other=0.0)
                last = minus + (size - LAG + k) * minus_row + column
                own = decay * tl.load(last, mask=column < width, other=0.0)
                own += tl.sum(weight[:, None] * total, 0)
                tl.store(out + k * out_row + column, own, mask=column < width)
