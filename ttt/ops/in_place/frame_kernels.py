"""The Triton kernels of `ttt.ops.in_place.stream` that take frames in and carry them over.

Those of the write itself are in `kernels.py`.
"""

import triton
import triton.language as tl


@triton.jit
def _read(change, z, row, place, d, width, hidden, end, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One row's S, at its rows d, times the first `end` numbers of the vector at a place of z."""
    total = tl.zeros((ROWS, BLOCK), change.dtype.element_ty)
    for start in range(0, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        query = tl.load(z + place * hidden + i, mask=i < hidden, other=0.0)
        inside = (d < width)[:, None] & (i < hidden)[None, :]
        weights = change + (row * width + d)[:, None] * hidden + i[None, :]
        total += tl.load(weights, mask=inside, other=0.0) * query[None, :].to(total.dtype)
    return tl.sum(total, 1)


@triton.jit
def read_kernel(
    change,
    z,
    out,
    pending_read,
    num_pending,
    filled,
    exec_mask,
    rows_on,
    rows,
    lag,
    width,
    hidden,
    KEEPS_READ: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """OUT = S z, and zero in rows that are switched off, whose S is not read.

    Also says which rows keep the frame, in FILLED, and keeps there what was read.
    """
    row = tl.program_id(1).to(tl.int64)
    is_on = tl.load(rows_on + row)
    learns = tl.load(exec_mask + row) & is_on
    before = tl.load(num_pending + row)
    if tl.program_id(0) == 0:
        tl.store(filled + row, tl.where(learns, before + 1, 0))
    d = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    end = tl.where(is_on, hidden, 0)
    read = _read(change, z, row, row, d, width, hidden, end, ROWS, BLOCK)
    tl.store(out + row * width + d, read, mask=d < width)
    if KEEPS_READ:
        place = pending_read + (row * rows + lag + before) * width + d
        tl.store(place, read, mask=(d < width) & learns)


@triton.jit
def _square(x, row, size, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """‖x‖² of one row."""
    total = tl.zeros((BLOCK,), ACC)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * size + i, mask=i < size, other=0.0).to(ACC)
        total += value * value
    return tl.sum(total, 0)


@triton.jit
def _keep_key(
    z,
    place,
    is_frame,
    row,
    tile,
    lag,
    hidden,
    HAS_PADDING: tl.constexpr,
    IS_DIVIDED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tile * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(z + row * hidden + i, mask=i < hidden, other=0.0)
    if IS_DIVIDED:
        square = _square(z, row, hidden, ACC, BLOCK)
        inverse = tl.where(square > 0, 1.0 / tl.where(square > 0, square, 1.0), 0.0)
        # Rounded as whole sequences have it.
        key = key.to(ACC) * inverse.to(z.dtype.element_ty).to(ACC)
    if HAS_PADDING:
        is_present = tl.load(is_frame + row)
        key = tl.where(is_present, key, 0.0)
        # Nor are the frames written whose targets it would be a part of.
        for frame in range(0, tl.where(is_present, 0, lag)):
            tl.store(place + frame * hidden + i, key, mask=i < hidden)
    tl.store(place + lag * hidden + i, key, mask=i < hidden)


@triton.jit
def _keep_source(
    source,
    place,
    row,
    tile,
    width,
    IS_NORMALIZED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tile * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + row * width + i, mask=i < width, other=0.0)
    if IS_NORMALIZED:
        square = _square(source, row, width, ACC, BLOCK) / width
        value = value.to(ACC) * tl.rsqrt(tl.where(square > 0, square, 1.0))
    tl.store(place + i, value, mask=i < width)


@triton.jit
def keep_kernel(
    z,
    source,
    pending_z,
    pending_source,
    num_pending,
    filled,
    is_frame,
    chunk_size,
    lag,
    tail,
    hidden,
    width,
    HAS_PADDING: tl.constexpr,
    IS_DIVIDED: tl.constexpr,
    IS_NORMALIZED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keep a frame's key and what its target is made of, and count it."""
    row = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    count = tl.load(filled + row)
    if count > 0:
        if tile == 0:
            tl.store(num_pending + row, count % chunk_size)
        tiles = tl.cdiv(hidden, BLOCK)
        if tile < tiles:
            key = pending_z + (row * (lag + chunk_size) + count - 1) * hidden
            _keep_key(z, key, is_frame, row, tile, lag, hidden, HAS_PADDING, IS_DIVIDED, ACC, BLOCK)
        else:
            value = pending_source + (row * (tail + chunk_size) + tail + count - 1) * width
            _keep_source(source, value, row, tile - tiles, width, IS_NORMALIZED, ACC, BLOCK)


@triton.jit
def _carry(buffer, tile, chunk_size, size, length, BLOCK: tl.constexpr):
    """A tile of one row's buffer[:length] = buffer[C : C + length]."""
    i = tile * BLOCK + tl.arange(0, BLOCK)
    for frame in range(0, length):
        place = buffer + frame * size + i
        tl.store(place, tl.load(place + chunk_size * size, mask=i < size), mask=i < size)


@triton.jit
def carry_kernel(
    change,
    pending_z,
    pending_source,
    pending_read,
    filled,
    chunk_size,
    lag,
    tail,
    hidden,
    width,
    READS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Move what the next chunk needs to where it looks for it.

    What waits for its target is compared with the S that its own write will see, so S is read for
    it, with keys from where they still are.
    """
    row = tl.program_id(1).to(tl.int64)
    if tl.load(filled + row) == chunk_size:
        keys = pending_z + row * (lag + chunk_size) * hidden
        sources = pending_source + row * (tail + chunk_size) * width
        tiles = tl.cdiv(hidden, TILE)
        for tile in range(tl.program_id(0), tiles + tl.cdiv(width, TILE), tl.num_programs(0)):
            if tile < tiles:
                _carry(keys, tile, chunk_size, hidden, lag, TILE)
            else:
                _carry(sources, tile - tiles, chunk_size, width, tail, TILE)
        if READS:
            d = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
            for frame in range(0, lag):
                read = _read(
                    change, keys, row, chunk_size + frame, d, width, hidden, hidden, ROWS, BLOCK
                )
                place = pending_read + (row * (lag + chunk_size) + frame) * width + d
                tl.store(place, read, mask=d < width)
