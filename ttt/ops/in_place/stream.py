"""A CUDA graph holds one frame of a stream, of either In-Place rule.

A graph replays the same kernels at every frame, while a chunk is written once in `chunk_size`
frames and at each row's own time. So the kernels of a write decide for themselves: their programs
look up how many frames a row has in its chunk, and return at once unless it is complete. They
are few and loop over their tiles, so that not writing costs little more than launching them.

Every launch takes 2 to 3 µs of every frame and layer, however little there is to do. So what is
small (masks, counters, norms, gates) is made within the kernels that need it, and made again in the
layer's plain form.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt.ops.autocast import without_autocast
from ttt.ops.in_place import frame_kernels, kernels

PROGRAMS = 264
"""Programs for a row's write: two for each multiprocessor of an H100."""
TILE = 1024
"""Numbers of a frame that a program keeps or carries over at a time."""
_DTYPES: dict[torch.dtype, Any] = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@without_autocast
def stream_frame(
    z: Tensor,
    source: Tensor,
    is_frame: Tensor | None,
    *,
    change: Tensor,
    pending_z: Tensor,
    pending_source: Tensor,
    pending_read: Tensor | None,
    num_pending: Tensor,
    exec_mask: Tensor,
    rows_on: Tensor,
    conv: Tensor,
    gate: Tensor | None,
    gate_speed: float,
    projection: Tensor,
    num_behind: int,
    lag: int,
    decay: float,
    divides_by_keys: bool,
    lr: float = 1.0,
    max_delta_norm: float | None = None,
    log_beta: Tensor | None = None,
    max_beta: float = math.inf,
) -> Tensor:
    """Read the state with one frame, keep the frame, and write the chunks that it completes.

    Changes what is given from `change` to `num_pending` in place and asks nothing of the device.
    Shapes and meanings are those of `ttt.layers.in_place_state.InPlaceState`.

    Args:
        z: [B, 1, h], to read with.
        source: [B, 1, d], what the frame's target is made of.
        is_frame: [B, 1], false past the end of a recording; None: all are frames.
        change: [B, d, h], S (η ΣΔ for `sum`).
        pending_z, pending_source, pending_read: [B, lag + C, h], [B, tail + C, d] and
            [B, lag + C, d]; the last for `delta` alone.
        num_pending: [B], frames in the open chunk.
        exec_mask, rows_on: [B]; rows that are paused or off keep nothing of the frame.
        conv, projection: [d, K] and [d, d], which make targets of sources.
        gate: one element; the conv is `gate_speed` times as much of it, and sources are divided by
            their RMS. None: neither.
        num_behind: how far to the left of its place in `pending_source` a target's conv begins.
        lag: frames that a key waits for its target.
        decay: γ.
        divides_by_keys: the frame is written with z / ‖z‖², and not with z.
        lr, max_delta_norm: of `sum`.
        log_beta: one element, log β; `delta` if given.
        max_beta: β where `log_beta` says more.

    Returns:
        [B, 1, d], S z in the dtype of z, and zero in rows that are off.
    """
    size, tail = pending_z.shape[1] - lag, pending_source.shape[1] - pending_z.shape[1] + lag
    read, filled = _read(change, z, pending_read, num_pending, exec_mask, rows_on, lag)
    width, hidden = source.shape[2], z.shape[2]
    frame_kernels.keep_kernel[(triton.cdiv(hidden, TILE) + triton.cdiv(width, TILE), len(z))](
        z.contiguous(),
        source.contiguous(),
        pending_z,
        pending_source,
        num_pending,
        filled,
        filled if is_frame is None else is_frame.contiguous(),
        size,
        lag,
        tail,
        hidden,
        width,
        HAS_PADDING=is_frame is not None,
        IS_DIVIDED=divides_by_keys,
        IS_NORMALIZED=gate is not None,
        ACC=_DTYPES[change.dtype],
        BLOCK=TILE,
    )
    write = _Write(filled, chunk_size=size, dtype=change.dtype)
    keys = pending_z[:, :size]
    mixed = write.conv(pending_source, conv, gate, gate_speed, num_behind)
    weights = projection.T.expand(len(z), -1, -1)
    if log_beta is None:
        values = write.product(mixed, weights, torch.empty_like(mixed))
        scale = write.scale(keys, values, max_delta_norm) if max_delta_norm else None
        write.product(values.mT, keys, change, alpha=lr, beta=decay, scale=scale)
    else:
        assert pending_read is not None
        residual = torch.empty_like(pending_read)[:, :size]
        write.product(mixed, weights, residual, minus=pending_read[:, :size])
        inverses = write.inverse(keys, log_beta, max_beta)
        errors = write.product(inverses, residual, torch.empty_like(residual))
        write.product(errors.mT, keys, change, beta=decay)
    if lag or tail:
        _carry_over(change, pending_z, pending_source, pending_read, filled, lag, tail)
    return read


def _read(
    change: Tensor,
    z: Tensor,
    pending_read: Tensor | None,
    num_pending: Tensor,
    exec_mask: Tensor,
    rows_on: Tensor,
    lag: int,
) -> tuple[Tensor, Tensor]:
    """S z, [B, 1, d]: bound by reading S once; and [B], how many frames the open chunk has with
    this one, 0 in rows that do not keep it."""
    batch, width, hidden = change.shape
    out = torch.empty(batch, 1, width, dtype=z.dtype, device=z.device)
    filled = torch.empty_like(num_pending)
    frame_kernels.read_kernel[(triton.cdiv(width, 8), batch)](
        change,
        z.contiguous(),
        out,
        out if pending_read is None else pending_read,
        num_pending,
        filled,
        exec_mask,
        rows_on,
        0 if pending_read is None else pending_read.shape[1],
        lag,
        width,
        hidden,
        KEEPS_READ=pending_read is not None,
        ROWS=8,
        BLOCK=512,
    )
    return out, filled


def _carry_over(
    change: Tensor,
    pending_z: Tensor,
    pending_source: Tensor,
    pending_read: Tensor | None,
    filled: Tensor,
    lag: int,
    tail: int,
) -> None:
    """Move what waits for its target, or is part of the next ones', to the start of what is
    pending. Reading S for it is all that this costs: a tile of a product would be all but empty,
    and S is float32, which tiles multiply slowly."""
    batch, width, hidden = change.shape
    reads = pending_read is not None and lag > 0
    tiles = triton.cdiv(hidden, TILE) + triton.cdiv(width, TILE)
    frame_kernels.carry_kernel[(triton.cdiv(width, 8) if reads else tiles, batch)](
        change,
        pending_z,
        pending_source,
        change if pending_read is None else pending_read,
        filled,
        pending_z.shape[1] - lag,
        lag,
        tail,
        hidden,
        width,
        READS=reads,
        ROWS=8,
        BLOCK=512,
        TILE=TILE,
    )


class _Write:
    """The kernels that act on the rows whose chunk is complete, and on nothing else: what they
    return is not initialized in the other rows."""

    def __init__(self, filled: Tensor, *, chunk_size: int, dtype: torch.dtype):
        self.filled = filled
        """[B], frames in the open chunk with this one; 0 in rows that do not keep it."""
        self.chunk_size = chunk_size
        self.dtype = dtype
        """To accumulate in."""

    def conv(
        self,
        source: Tensor,
        weight: Tensor,
        gate: Tensor | None,
        gate_speed: float,
        num_behind: int,
    ) -> Tensor:
        """The targets' convolution, [B, C, d] of [B, R, d]: frame t is made of R's frames
        t − num_behind to t − num_behind + K − 1, where there are such."""
        batch, rows, width = source.shape
        out = source.new_empty(batch, self.chunk_size, width)
        kernels.conv_kernel[(PROGRAMS, batch)](
            source,
            weight.contiguous(),
            weight if gate is None else gate,
            out,
            self.filled,
            self.chunk_size,
            rows,
            width,
            weight.shape[1],
            num_behind,
            gate_speed,
            HAS_GATE=gate is not None,
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
            self.filled if scale is None else scale,
            self.filled,
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
            self.filled,
            self.chunk_size,
            float(max_delta_norm),
            ACC=_DTYPES[self.dtype],
            BLOCK=1024,
        )
        return out

    def inverse(self, z: Tensor, log_beta: Tensor, max_beta: float = math.inf) -> Tensor:
        """(Z Zᵀ + λ I)⁻¹, zero where λ is, [B, C, C]: a view of a padded tensor."""
        block = 32 if self.chunk_size <= 256 else 64
        padded = triton.cdiv(self.chunk_size, block) * block
        out = self.gram(z, padded)
        kernels.inverse_kernel[(len(z),)](
            out,
            log_beta,
            self.filled,
            self.chunk_size,
            padded,
            MAX_LOG_BETA=math.log(max_beta),
            ACC=_DTYPES[self.dtype],
            BLOCK=block,
        )
        return out[:, : self.chunk_size, : self.chunk_size]
