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

from ttt.ops.in_place import kernels

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
    key: Tensor,
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
        z: [B, 1, h], to read with.
        key: [B, 1, h], to write with: z, or scaled.
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
    _append(key, pending_z, num_pending)
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
    kernels.read_kernel[grid](change, z.contiguous(), out, width, hidden, ROWS=8, BLOCK=512)
    return out


def _append(x: Tensor, buffer: Tensor, num_pending: Tensor) -> None:
    """buffer[b, num_pending[b]] = x[b, 0]."""
    batch, chunk_size, size = buffer.shape
    grid = (triton.cdiv(size, 1024), batch)
    kernels.append_kernel[grid](x.contiguous(), buffer, num_pending, chunk_size, size, BLOCK=1024)


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
        kernels.conv_kernel[(PROGRAMS, batch)](
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
        kernels.product_kernel[(PROGRAMS, len(a))](
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
        kernels.scale_kernel[(len(z),)](
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
        kernels.inverse_kernel[(len(z),)](
            out,
            beta.to(self.dtype),
            self.num_pending,
            self.chunk_size,
            padded,
            ACC=_DTYPES[self.dtype],
            BLOCK=block,
        )
        return out[:, : self.chunk_size, : self.chunk_size]
