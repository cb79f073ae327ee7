"""The Triton kernels of a write in `ttt.ops.in_place.stream`, which says what they are for.

They act on the rows whose open chunk is full, `filled` being `chunk_size`, and return at once in
the others.
"""

import triton
import triton.language as tl


@triton.jit
def conv_kernel(
    source,
    weight,
    gate,
    out,
    filled,
    chunk_size,
    rows,
    width,
    kernel_size,
    num_behind,
    gate_speed,
    HAS_GATE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    if tl.load(filled + row) == chunk_size:
        across = tl.cdiv(width, BLOCK)
        if HAS_GATE:
            # Rounded as `gated_conv` of `ttt.layers.in_place` is.
            factor = (tl.load(gate).to(ACC) * gate_speed).to(gate.dtype.element_ty).to(ACC)
        for tile in range(tl.program_id(0), chunk_size * across, tl.num_programs(0)):
            frame = tile // across
            i = tile % across * BLOCK + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK,), ACC)
            for k in range(0, kernel_size):
                other = frame + k - num_behind
                inside = (i < width) & (other >= 0) & (other < rows)
                x = tl.load(source + (row * rows + other) * width + i, mask=inside, other=0.0)
                w = tl.load(weight + i * kernel_size + k, mask=inside, other=0.0)
                if HAS_GATE:
                    w = (w.to(ACC) * factor).to(weight.dtype.element_ty)
                total += x.to(ACC) * w.to(ACC)
            tl.store(out + (row * chunk_size + frame) * width + i, total, mask=i < width)


@triton.jit
def product_kernel(
    a,
    b,
    out,
    minus,
    scale,
    filled,
    chunk_size,
    rows,
    columns,
    inner,
    a_batch,
    a_row,
    a_inner,
    b_batch,
    b_inner,
    b_column,
    out_batch,
    out_row,
    out_column,
    alpha,
    beta,
    HAS_BETA: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    if tl.load(filled + row) == chunk_size:
        across = tl.cdiv(columns, BLOCK_N)
        for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M) * across, tl.num_programs(0)):
            m = tile // across * BLOCK_M + tl.arange(0, BLOCK_M)
            n = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
            total = tl.zeros((BLOCK_M, BLOCK_N), ACC)
            for start in range(0, inner, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                left = tl.load(
                    a + row * a_batch + m[:, None] * a_row + k[None, :] * a_inner,
                    mask=(m < rows)[:, None] & (k < inner)[None, :],
                    other=0.0,
                )
                right = tl.load(
                    b + row * b_batch + k[:, None] * b_inner + n[None, :] * b_column,
                    mask=(k < inner)[:, None] & (n < columns)[None, :],
                    other=0.0,
                )
                right = right.to(DOT)
                high = left.to(DOT)
                total += tl.dot(high, right, input_precision="ieee", out_dtype=ACC)
                if IS_SPLIT:
                    low = (left - high.to(left.dtype)).to(DOT)
                    total += tl.dot(low, right, input_precision="ieee", out_dtype=ACC)
            place = row * out_batch + m[:, None] * out_row + n[None, :] * out_column
            inside = (m < rows)[:, None] & (n < columns)[None, :]
            total *= alpha
            if HAS_SCALE:
                total *= tl.load(scale + row)
            if HAS_BETA:
                total += beta * tl.load(out + place, mask=inside, other=0.0)
            if HAS_MINUS:
                # As whole sequences have it.
                total = total.to(a.dtype.element_ty).to(ACC)
                total -= tl.load(minus + place, mask=inside, other=0.0)
            tl.store(out + place, total, mask=inside)


@triton.jit
def scale_kernel(
    gram_z,
    gram_v,
    out,
    filled,
    chunk_size,
    max_delta_norm,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(filled + row) == chunk_size:
        size = chunk_size * chunk_size
        total = tl.zeros((BLOCK,), ACC)
        for start in range(0, size, BLOCK):
            i = start + tl.arange(0, BLOCK)
            x = tl.load(gram_z + row * size + i, mask=i < size, other=0.0)
            total += x * tl.load(gram_v + row * size + i, mask=i < size, other=0.0)
        norm = tl.sqrt(tl.maximum(tl.sum(total, 0), 0.0))
        tl.store(out + row, max_delta_norm / tl.maximum(norm, max_delta_norm))


@triton.jit
def _tile(matrix, a, b, padded, BLOCK: tl.constexpr):
    """Pointers to a tile of a matrix."""
    i = tl.arange(0, BLOCK)
    return matrix + (a + i)[:, None] * padded + (b + i)[None, :]


@triton.jit
def _invert_tile(x, BLOCK: tl.constexpr):
    """Gauss-Jordan elimination; without pivots, as x is symmetric and positive definite."""
    i = tl.arange(0, BLOCK)[:, None]
    j = tl.arange(0, BLOCK)[None, :]
    for k in range(0, BLOCK):
        above = tl.sum(tl.where(i == k, x, 0.0), 0)
        left = tl.sum(tl.where(j == k, x, 0.0), 1)
        pivot = tl.sum(tl.where(tl.arange(0, BLOCK) == k, above, 0.0), 0)
        scaled = above / pivot
        others = tl.where(j == k, 0.0, x) - left[:, None] * tl.where(j == k, 0.0, scaled[None, :])
        others = tl.where(j == k, -(left / pivot)[:, None], others)
        itself = tl.where(j == k, 1.0 / pivot, scaled[None, :])
        x = tl.where(i == k, itself, others)
    return x


@triton.jit
def inverse_kernel(
    matrix,
    log_beta,
    filled,
    chunk_size,
    padded,
    MAX_LOG_BETA: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(G + λ I)⁻¹ in place, by Gauss-Jordan elimination of blocks; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(filled + row) == chunk_size:
        matrix += row * padded * padded
        i = tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), ACC)
        count = 0
        for a in range(0, padded, BLOCK):
            diagonal = matrix + (a + i) * padded + a + i
            square = tl.load(diagonal, mask=a + i < chunk_size, other=0.0)
            total += square
            count += tl.sum((square > 0).to(tl.int32), 0)
        # β as `write_strength` of `ttt.layers.in_place` has it.
        log = tl.load(log_beta).to(ACC)
        beta = tl.exp(log - tl.maximum(log - MAX_LOG_BETA, 0.0))
        strength = tl.sum(total, 0) / tl.maximum(count, 1) / beta
        # In units of λ. A silent chunk becomes the identity here, and zero at the end.
        unit = tl.where(strength > 0, 1.0 / tl.where(strength > 0, strength, 1.0), 0.0)
        for a in range(0, padded, BLOCK):
            for b in range(0, padded, BLOCK):
                tile = _tile(matrix, a, b, padded, BLOCK)
                inside = (a + i < chunk_size)[:, None] & (b + i < chunk_size)[None, :]
                eye = tl.where((a + i)[:, None] == (b + i)[None, :], 1.0, 0.0)
                # The padding is not initialized, so it must not be multiplied.
                tl.store(tile, tl.where(inside, tl.load(tile) * unit, 0.0) + eye)
        # What one thread stores another loads: hence the barriers.
        tl.debug_barrier()
        for k in range(0, padded, BLOCK):
            pivot = _invert_tile(tl.load(_tile(matrix, k, k, padded, BLOCK)), BLOCK)
            for a in range(0, padded, BLOCK):
                if a != k:
                    left = tl.load(_tile(matrix, a, k, padded, BLOCK))
                    factor = tl.dot(left, pivot, input_precision="ieee", out_dtype=ACC)
                    for b in range(0, padded, BLOCK):
                        if b != k:
                            tile = _tile(matrix, a, b, padded, BLOCK)
                            above = tl.load(_tile(matrix, k, b, padded, BLOCK))
                            change = tl.dot(factor, above, input_precision="ieee", out_dtype=ACC)
                            tl.store(tile, tl.load(tile) - change)
                    tl.debug_barrier()
                    tl.store(_tile(matrix, a, k, padded, BLOCK), -factor)
            tl.debug_barrier()
            for b in range(0, padded, BLOCK):
                tile = _tile(matrix, k, b, padded, BLOCK)
                above = tl.dot(pivot, tl.load(tile), input_precision="ieee", out_dtype=ACC)
                tl.debug_barrier()
                tl.store(tile, tl.where(b == k, pivot, above))
            tl.debug_barrier()
        for a in range(0, padded, BLOCK):
            for b in range(0, padded, BLOCK):
                tile = _tile(matrix, a, b, padded, BLOCK)
                tl.store(tile, tl.load(tile) * unit)
