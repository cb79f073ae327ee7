"""The Triton kernel of `ttt.ops.in_place.delta_gradient`."""

import triton
import triton.language as tl


@triton.jit
def gradient_kernel(
    products,
    matrices,
    diagonals,
    waiting,
    powers,
    high,
    low,
    frames,
    lead,
    offset,
    size,
    padded,
    count,
    lag,
    product_batch,
    product_row,
    out_batch,
    out_row,
    TILE: tl.constexpr,
):
    """Two terms of a tile of D + Dᵀ and, as it is symmetric, of the one across the diagonal.

    Of two frames the later one, t, may have read the pair of the earlier one, s; or else their
    pairs may be of one chunk, and so in one matrix; or t's pair may be one of the first of its
    chunk, whose keys read what the chunk of the pair of s has written.
    """
    batch = tl.program_id(2).to(tl.int64)
    if tl.program_id(1) > tl.program_id(0):
        return
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    t = tl.maximum(row[:, None], column[None, :])
    s = tl.minimum(row[:, None], column[None, :])
    inside = t < frames
    # The pairs whose keys these are, and their chunks.
    pair_t, pair_s = t - offset, s - offset
    chunk_t, chunk_s = pair_t // size, pair_s // size
    in_t, in_s = pair_t - chunk_t * size, pair_s - chunk_s * size
    is_pair = inside & (chunk_s < count)

    reader = t - lead
    reading = tl.where(reader >= 0, reader, 0) // size
    is_read = is_pair & (reader >= 0) & (reading > chunk_s)
    place = products + batch * product_batch
    place += (reading * padded + reader - reading * size) * product_row + chunk_s * padded + in_s
    value = tl.load(place, mask=is_read, other=0.0)
    value *= tl.load(powers + reading - 1 - chunk_s, mask=is_read, other=0.0)

    is_one = is_pair & (chunk_t == chunk_s)
    matrix = matrices + (batch * count + chunk_s) * size * size
    value -= tl.load(matrix + in_t * size + in_s, mask=is_one, other=0.0)
    value -= tl.load(matrix + in_s * size + in_t, mask=is_one, other=0.0)
    place = diagonals + (batch * count + chunk_s) * size + in_s
    value += 2 * tl.load(place, mask=is_one & (t == s), other=0.0)

    is_waiting = is_pair & (chunk_t == chunk_s + 1) & (chunk_t < count) & (in_t < lag)
    place = waiting + ((batch * count + chunk_t) * lag + in_t) * size + in_s
    value -= tl.load(place, mask=is_waiting, other=0.0)

    first = value.to(high.dtype.element_ty)
    second = (value - first.to(tl.float32)).to(high.dtype.element_ty)
    place = batch * out_batch + row[:, None] * out_row + column[None, :]
    inside = (row < frames)[:, None] & (column < frames)[None, :]
    tl.store(high + place, first, mask=inside)
    tl.store(low + place, second, mask=inside)
    if tl.program_id(1) < tl.program_id(0):
        place = batch * out_batch + column[:, None] * out_row + row[None, :]
        inside = (column < frames)[:, None] & (row < frames)[None, :]
        tl.store(high + place, tl.trans(first), mask=inside)
        tl.store(low + place, tl.trans(second), mask=inside)
