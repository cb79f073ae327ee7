"""One frame of a stream on a CUDA device, of either In-Place rule, for a CUDA graph to hold.

A graph replays the same kernels at every frame, while a chunk is written once in `chunk_size`
frames and at each row's own time. So the kernels of a write decide for themselves: their programs
look up how many frames a row has pending, and return at once unless its chunk is complete. They
are few and loop over their tiles, so that not writing costs little more than launching them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 264
"""Programs for a row's write: two for each multiprocessor of an H100."""
_DTYPES: dict[torch.dtype, Any] = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def stream_frame(
    z: Tensor,
    source: Tensor,
    *,
    change: Tensor,
    pending_z: Tensor,
    pending_source: Tensor,
    pending_read: Tensor | None,
    num_pending: Tensor,
    exec_mask: Tensor,
    conv: Tensor,
    projection: Tensor,
    lookahead: int,
    decay: float,
    lr: float = 1.0,
    max_delta_norm: float | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """Reads the state with one frame, keeps the frame, and writes the chunks that it completes.

    Changes `change` to `exec_mask` in place and asks nothing of the device.

    Args:
        z: [B, 1, h].
        source: [B, 1, d], what the frame's target is made of.
        change: [B, d, h], S (η ΣΔ for `sum`).
        pending_z, pending_source: [B, C, h] and [B, C, d], the open chunk.
        pending_read: [B, C, d], what its frames read; for `delta` alone.
        num_pending: [B], its frames.
        exec_mask: [B], the rows that this frame is for; the others' is not kept.
        conv, projection, lookahead: [d, K], [d, d] and L, which make targets of sources.
        decay: γ.
        lr, max_delta_norm: of `sum`.
        beta: one element, β; `delta` if given.

    Returns:
        [B, 1, d], S z in the dtype of `change`.
    """
    read = _read(change, z)
    _append(z, pending_z, num_pending)
    _append(source, pending_source, num_pending)
    if pending_read is not None:
        _append(read, pending_read, num_pending)
    num_pending += exec_mask
    write = _Write(num_pending, chunk_size=pending_z.shape[1], dtype=change.dtype)
    mixed = write.conv(pending_source, conv, lookahead)
    weights = projection.T.expand(len(z), -1, -1)
    if beta is None:
        values = write.product(mixed, weights, torch.empty_like(mixed))
        scale = write.scale(pending_z, values, max_delta_norm) if max_delta_norm else None
        write.product(values.mT, pending_z, change, alpha=lr, beta=decay, scale=scale)
    else:
        assert pending_read is not None
        residual = write.product(mixed, weights, torch.empty_like(pending_read), minus=pending_read)
        errors = write.product(write.inverse(pending_z, beta), residual, torch.empty_like(mixed))
        write.product(errors.mT, pending_z, change, beta=decay)
    num_pending.masked_fill_(num_pending == pending_z.shape[1], 0)
    return read


def _read(change: Tensor, z: Tensor) -> Tensor:
    """S z, [B, 1, d]: bound by reading S once."""
    batch, width, hidden = change.shape
    out = torch.empty(batch, 1, width, dtype=change.dtype, device=change.device)
    grid = (triton.cdiv(width, 8), batch)
    _read_kernel[grid](change, z.contiguous(), out, width, hidden, ROWS=8, BLOCK=512)
    return out


def _append(x: Tensor, buffer: Tensor, num_pending: Tensor) -> None:
    """buffer[b, num_pending[b]] = x[b, 0]."""
    batch, chunk_size, size = buffer.shape
    grid = (triton.cdiv(size, 1024), batch)
    _append_kernel[grid](x.contiguous(), buffer, num_pending, chunk_size, size, BLOCK=1024)


class _Write:
    """The kernels that act on the rows whose chunk is complete, and on nothing else: what they
    return is not initialised in the other rows."""

    def __init__(self, num_pending: Tensor, *, chunk_size: int, dtype: torch.dtype):
        self.num_pending = num_pending
        self.chunk_size = chunk_size
        self.dtype = dtype
        """To accumulate in."""

    def conv(self, source: Tensor, weight: Tensor, lookahead: int) -> Tensor:
        """`ttt.ops.chunk_conv` of the open chunk, [B, C, d]."""
        out = torch.empty_like(source)
        batch, _, width = source.shape
        kernel_size = weight.shape[1]
        _conv_kernel[(PROGRAMS, batch)](
            source,
            weight.contiguous(),
            out,
            self.num_pending,
            self.chunk_size,
            width,
            kernel_size,
            kernel_size - 1 - lookahead,
            ACC=_DTYPES[self.dtype],
            BLOCK=1024,
        )
        return out

    def product(
        self,
        a: Tensor,
        b: Tensor,
        out: Tensor,
        *,
        alpha: float = 1.0,
        beta: float = 0.0,
        minus: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """OUT = alpha · scale · A B + beta · OUT − minus, of [B, M, K], [B, K, N] and [B, M, N];
        `scale` is [B]. `minus` has the strides of `out`."""
        assert minus is None or minus.stride() == out.stride()
        low = a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)
        wide = self.dtype == torch.float64
        _product_kernel[(PROGRAMS, len(a))](
            a,
            b,
            out,
            out if minus is None else minus,
            self.num_pending if scale is None else scale,
            self.num_pending,
            self.chunk_size,
            a.shape[1],
            b.shape[2],
            a.shape[2],
            *a.stride(),
            *b.stride(),
            *out.stride(),
            float(alpha),
            float(beta),
            HAS_BETA=beta != 0,
            HAS_MINUS=minus is not None,
            HAS_SCALE=scale is not None,
            # Products of 16-bit numbers are exact in float32; others must not be rounded first.
            DOT=_DTYPES[a.dtype if low else self.dtype],
            ACC=_DTYPES[self.dtype],
            BLOCK_M=32 if wide else 64,
            BLOCK_N=32 if wide else 128 if low else 64,
            BLOCK_K=64 if low else 16,
            num_warps=8 if low else 4,
        )
        return out

    def gram(self, x: Tensor, padded: int) -> Tensor:
        """X Xᵀ, in the corner of a [B, padded, padded]."""
        out = torch.empty(len(x), padded, padded, dtype=self.dtype, device=x.device)
        self.product(x, x.mT, out)
        return out

    def scale(self, z: Tensor, v: Tensor, max_delta_norm: float) -> Tensor:
        """min(1, τ / ‖Vᵀ Z‖), [B]."""
        out = torch.empty(len(z), dtype=self.dtype, device=z.device)
        _scale_kernel[(len(z),)](
            self.gram(z, self.chunk_size),
            self.gram(v, self.chunk_size),
            out,
            self.num_pending,
            self.chunk_size,
            float(max_delta_norm),
            ACC=_DTYPES[self.dtype],
            BLOCK=1024,
        )
        return out

    def inverse(self, z: Tensor, beta: Tensor) -> Tensor:
        """(Z Zᵀ + λ I)⁻¹, zero where λ is, [B, C, C]: a view of a padded tensor."""
        block = 32 if self.chunk_size <= 256 else 64
        padded = triton.cdiv(self.chunk_size, block) * block
        out = self.gram(z, padded)
        _inverse_kernel[(len(z),)](
            out,
            beta.to(self.dtype),
            self.num_pending,
            self.chunk_size,
            padded,
            ACC=_DTYPES[self.dtype],
            BLOCK=block,
        )
        return out[:, : self.chunk_size, : self.chunk_size]


# Kernels ----------------------------------------------------------------------------------------


@triton.jit
def _read_kernel(change, z, out, width, hidden, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK), change.dtype.element_ty)
    for start in range(0, hidden, BLOCK):
        i = start + tl.arange(0, BLOCK)
        query = tl.load(z + row * hidden + i, mask=i < hidden, other=0.0)
        inside = (d < width)[:, None] & (i < hidden)[None, :]
        weights = change + (row * width + d)[:, None] * hidden + i[None, :]
        total += tl.load(weights, mask=inside, other=0.0) * query[None, :].to(total.dtype)
    tl.store(out + row * width + d, tl.sum(total, 1), mask=d < width)


@triton.jit
def _append_kernel(x, buffer, num_pending, chunk_size, size, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    frame = tl.load(num_pending + row)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + row * size + i, mask=i < size)
    tl.store(buffer + (row * chunk_size + frame) * size + i, value, mask=i < size)


@triton.jit
def _conv_kernel(
    source,
    weight,
    out,
    num_pending,
    chunk_size,
    width,
    kernel_size,
    num_behind,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    if tl.load(num_pending + row) == chunk_size:
        across = tl.cdiv(width, BLOCK)
        for tile in range(tl.program_id(0), chunk_size * across, tl.num_programs(0)):
            frame = tile // across
            i = tile % across * BLOCK + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK,), ACC)
            for k in range(0, kernel_size):
                other = frame + k - num_behind
                inside = (i < width) & (other >= 0) & (other < chunk_size)
                x = tl.load(source + (row * chunk_size + other) * width + i, mask=inside, other=0.0)
                w = tl.load(weight + i * kernel_size + k, mask=inside, other=0.0)
                total += x.to(ACC) * w.to(ACC)
            tl.store(out + (row * chunk_size + frame) * width + i, total, mask=i < width)


@triton.jit
def _product_kernel(
    a,
    b,
    out,
    minus,
    scale,
    num_pending,
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
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    if tl.load(num_pending + row) == chunk_size:
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
                total += tl.dot(left.to(DOT), right.to(DOT), input_precision="ieee", out_dtype=ACC)
            place = row * out_batch + m[:, None] * out_row + n[None, :] * out_column
            inside = (m < rows)[:, None] & (n < columns)[None, :]
            total *= alpha
            if HAS_SCALE:
                total *= tl.load(scale + row)
            if HAS_BETA:
                total += beta * tl.load(out + place, mask=inside, other=0.0)
            if HAS_MINUS:
                total -= tl.load(minus + place, mask=inside, other=0.0)
            tl.store(out + place, total, mask=inside)


@triton.jit
def _scale_kernel(
    gram_z,
    gram_v,
    out,
    num_pending,
    chunk_size,
    max_delta_norm,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(num_pending + row) == chunk_size:
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
def _inverse_kernel(
    matrix, beta, num_pending, chunk_size, padded, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """(G + λ I)⁻¹ in place, by Gauss-Jordan elimination of blocks; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(num_pending + row) == chunk_size:
        matrix += row * padded * padded
        i = tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), ACC)
        for a in range(0, padded, BLOCK):
            diagonal = matrix + (a + i) * padded + a + i
            total += tl.load(diagonal, mask=a + i < chunk_size, other=0.0)
        strength = tl.sum(total, 0) / chunk_size / tl.load(beta)
        # In units of λ. A silent chunk becomes the identity here, and zero at the end.
        unit = tl.where(strength > 0, 1.0 / tl.where(strength > 0, strength, 1.0), 0.0)
        for a in range(0, padded, BLOCK):
            for b in range(0, padded, BLOCK):
                tile = _tile(matrix, a, b, padded, BLOCK)
                inside = (a + i < chunk_size)[:, None] & (b + i < chunk_size)[None, :]
                eye = tl.where((a + i)[:, None] == (b + i)[None, :], 1.0, 0.0)
                # The padding is not initialised, so it must not be multiplied.
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
