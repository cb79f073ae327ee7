"""A CUDA graph holds one frame of a stream, of either In-Place rule.

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

from ttt.ops.autocast import without_autocast
from ttt.ops.in_place import kernels

PROGRAMS = 264
"""Programs for a row's write: two for each multiprocessor of an H100."""
_DTYPES: dict[torch.dtype, Any] = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@without_autocast
def stream_frame(
    z: Tensor,
    key: Tensor,
    source: Tensor,
    is_frame: Tensor,
    *,
    change: Tensor,
    pending_z: Tensor,
    pending_source: Tensor,
    pending_read: Tensor | None,
    num_pending: Tensor,
    learns: Tensor,
    conv: Tensor,
    projection: Tensor,
    num_behind: int,
    lag: int,
    decay: float,
    lr: float = 1.0,
    max_delta_norm: float | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """Read the state with one frame, keep the frame, and write the chunks that it completes.

    Changes what is given from `change` to `num_pending` in place and asks nothing of the device.
    Shapes and meanings are those of `ttt.layers.in_place_state.InPlaceState`.

    Args:
        z: [B, 1, h], to read with.
        key: [B, 1, h], to write with: z, or scaled.
        source: [B, 1, d], what the frame's target is made of.
        is_frame: [B, 1], false past the end of a recording.
        change: [B, d, h], S (η ΣΔ for `sum`).
        pending_z, pending_source, pending_read: [B, lag + C, h], [B, tail + C, d] and
            [B, lag + C, d]; the last for `delta` alone.
        num_pending: [B], frames in the open chunk.
        learns: [B], the rows that this frame is for; the others' is not kept.
        conv, projection: [d, K] and [d, d], which make targets of sources.
        num_behind: how far to the left of its place in `pending_source` a target's conv begins.
        lag: frames that a key waits for its target.
        decay: γ.
        lr, max_delta_norm: of `sum`.
        beta: one element, β; `delta` if given.

    Returns:
        [B, 1, d], S z in the dtype of `change`.
    """
    size, tail = pending_z.shape[1] - lag, pending_source.shape[1] - pending_z.shape[1] + lag
    read = _read(change, z)
    absent = learns & ~is_frame[:, 0]
    _append(key, pending_z, num_pending, lag, absent)
    _append(source, pending_source, num_pending, tail)
    if pending_read is not None:
        _append(read, pending_read, num_pending, lag)
    num_pending += learns
    write = _Write(num_pending, chunk_size=size, dtype=change.dtype)
    keys = pending_z[:, :size]
    mixed = write.conv(pending_source, conv, num_behind)
    weights = projection.T.expand(len(z), -1, -1)
    if beta is None:
        values = write.product(mixed, weights, torch.empty_like(mixed))
        scale = write.scale(keys, values, max_delta_norm) if max_delta_norm else None
        write.product(values.mT, keys, change, alpha=lr, beta=decay, scale=scale)
    else:
        assert pending_read is not None
        residual = torch.empty_like(pending_read)[:, :size]
        write.product(mixed, weights, residual, minus=pending_read[:, :size])
        errors = write.product(write.inverse(keys, beta), residual, torch.empty_like(residual))
        write.product(errors.mT, keys, change, beta=decay)
    write.carry_over(pending_z, lag)
    write.carry_over(pending_source, tail)
    if pending_read is not None and lag:
        # What waits is compared with the state that its own write will see.
        write.read_carried(change, pending_z, pending_read, lag)
    num_pending.masked_fill_(num_pending == size, 0)
    return read


def _read(change: Tensor, z: Tensor) -> Tensor:
    """S z, [B, 1, d]: bound by reading S once."""
    batch, width, hidden = change.shape
    out = torch.empty(batch, 1, width, dtype=change.dtype, device=change.device)
    grid = (triton.cdiv(width, 8), batch)
    kernels.read_kernel[grid](change, z.contiguous(), out, width, hidden, ROWS=8, BLOCK=512)
    return out


def _append(
    x: Tensor, buffer: Tensor, num_pending: Tensor, offset: int, absent: Tensor | None = None
) -> None:
    """buffer[b, offset + num_pending[b]] = x[b, 0].

    Args:
        absent: [B], rows in which zeros are kept instead, and over the `offset` frames before.
    """
    batch, rows, size = buffer.shape
    grid = (triton.cdiv(size, 1024), batch)
    kernels.append_kernel[grid](
        x.contiguous(),
        buffer,
        num_pending,
        num_pending if absent is None else absent,
        rows,
        size,
        offset,
        HAS_ABSENT=absent is not None,
        BLOCK=1024,
    )


class _Write:
    """The kernels that act on the rows whose chunk is complete, and on nothing else: what they
    return is not initialized in the other rows."""

    def __init__(self, num_pending: Tensor, *, chunk_size: int, dtype: torch.dtype):
        self.num_pending = num_pending
        self.chunk_size = chunk_size
        self.dtype = dtype
        """To accumulate in."""

    def conv(self, source: Tensor, weight: Tensor, num_behind: int) -> Tensor:
        """The targets' convolution, [B, C, d] of [B, R, d]: frame t is made of R's frames
        t − num_behind to t − num_behind + K − 1, where there are such."""
        batch, rows, width = source.shape
        out = source.new_empty(batch, self.chunk_size, width)
        kernels.conv_kernel[(PROGRAMS, batch)](
            source,
            weight.contiguous(),
            out,
            self.num_pending,
            self.chunk_size,
            rows,
            width,
            weight.shape[1],
            num_behind,
            ACC=_DTYPES[self.dtype],
            BLOCK=1024,
        )
        return out

    def carry_over(self, buffer: Tensor, length: int) -> None:
        """buffer[:, :length] = buffer[:, C : C + length]."""
        if length:
            batch, rows, size = buffer.shape
            kernels.carry_kernel[(triton.cdiv(size, 1024), batch)](
                buffer, self.num_pending, self.chunk_size, rows, size, length, BLOCK=1024
            )

    def read_carried(self, change: Tensor, z: Tensor, out: Tensor, length: int) -> None:
        """out[:, :length] = z[:, :length] Sᵀ. As for one frame, reading S is all that it costs: a
        tile of a product would be all but empty, and S is float32, which tiles multiply slowly."""
        batch, width, hidden = change.shape
        kernels.read_carried_kernel[(triton.cdiv(width, 8), batch)](
            change,
            z,
            out,
            self.num_pending,
            self.chunk_size,
            z.shape[1],
            length,
            width,
            hidden,
            ROWS=8,
            BLOCK=512,
        )

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
        """OUT = alpha · scale · A B + beta · OUT − minus, of [B, M, K], [B, K, N] and [B, M, N].

        Factors of 16 bits are multiplied as such, and a wide A with them as the sum of two terms.

        Args:
            minus: with the strides of `out`; A B is rounded to A's type before it is subtracted.
            scale: [B].
        """
        assert minus is None or minus.stride() == out.stride()
        low = b.dtype in (torch.bfloat16, torch.float16)
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
            IS_SPLIT=low and a.dtype != b.dtype,
            # Products of 16-bit numbers are exact in float32; others must not be rounded first.
            DOT=_DTYPES[b.dtype if low else self.dtype],
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
