"""Products with the inverses H⁻¹ of `write: delta`, as precise as float32.

H⁻¹ enlarges what is rounded, so 24 bits are needed. On a GPU a kernel makes these products on
tensor cores, each float32 number as a sum of two of float16, which have 22 bits: scaled so that the
largest of a matrix, or of a column, lies near the end of float16's range. It adds up 64 products at
a time, which rounds less than a sum over a whole chunk does: the result is no further from
float64's than that of a product in float32 (docs/numerics.md). What it multiplies with it makes
itself, and so what the operator needs of the result: that takes no other pass over memory.
"""

import torch
from torch import Tensor

from ttt.ops.in_place import terms

MAX_SIZE = 256
"""The most frames of a chunk that the kernel takes: their results lie in its registers."""
MAX_LAG = 8
"""The longest lag that it takes: it has code of its own for each frame."""
COLUMNS = 64
"""Columns that one program makes."""
SLICE = 64
"""Products that are added up at a time."""
SHARED_BYTES = 200_000
"""With so much shared memory a program loads the next numbers while it multiplies (on an H100, not
on GPUs of 24 GB). Measured on an H200, like the sizes above."""
ROWS = 32
"""Rows of an inverse that one program makes halves of."""


class Solver:
    """Multiplies with the inverses of a window's chunks.

    Args:
        inverses: [N, n, C, C] in the accumulating type, H⁻¹.
        lag, decay: see `chunks.Cut`.
        dtype: the type of the window's frames.
    """

    def __init__(self, inverses: Tensor, *, lag: int, decay: float, dtype: torch.dtype):
        self.inverses, self.lag, self.decay = inverses, lag, decay
        self.size = inverses.shape[3]
        self.halves: tuple[Tensor, Tensor, Tensor] | None = None
        is_taken = terms.num_terms(dtype) > 1 and self.size <= MAX_SIZE and lag <= MAX_LAG
        if is_taken and inverses.numel() > 0 and terms.has_kernels(inverses):
            self.halves = _halves(inverses)

    def errors(
        self,
        i: int,
        v: Tensor,
        read: Tensor,
        waited: Tensor | None,
        again: Tensor | None,
        e: Tensor,
    ) -> Tensor | None:
        """Write E of chunk i, H⁻¹ (V − R), and return what the next chunk's first keys read.

        Args:
            v: [N, C, d].
            read: [N, C, d] in the accumulating type, what the chunk's frames read.
            waited: [N, lag, d] likewise, what its first keys read; None: nothing.
            again: [N, lag, C], k_u · K_i for the first pairs u of the next chunk; None: there is
                no complete one.
            e: [N, C', m, d], for E as `terms.of_values` makes it.
        """
        lag, size = self.lag, self.size
        following = None if again is None else torch.empty_like(read[:, :lag])
        if self.halves is not None:
            self._launch(i, v, e, read=read, edge=waited, again=again, out=following)
            return following
        residual = torch.empty_like(read)
        torch.sub(v[:, lag:], read[:, : size - lag], out=residual[:, lag:])
        residual[:, :lag] = v[:, :lag] if waited is None else v[:, :lag] - waited
        errors = torch.bmm(self.inverses[:, i], residual)
        terms.of_values(errors, size, e)
        if again is None or following is None:
            return None
        torch.mul(read[:, size - lag :], self.decay, out=following)
        return following.baddbmm_(again, errors)

    def adjoints(
        self,
        i: int,
        x: Tensor,
        following: Tensor | None,
        again: Tensor | None,
        left: Tensor,
        rounded: Tensor,
    ) -> None:
        """Make X of chunk i, H⁻¹ P, of what its errors receive.

        Args:
            x: [N, C, d] in the accumulating type; holds what is received but for the next chunk's
                first keys, and becomes X.
            following: [N, lag, d], X of the next chunk's first pairs; None: there is no complete
                one.
            again: [N, lag, C], see `errors`.
            left: [N, C, m, d], for the left terms of X.
            rounded: [N, C, d], for X in its type.
        """
        if self.halves is not None:
            self._launch(i, x, left, edge=following, again=again, out=x, rounded=rounded)
            return
        received = x.clone()
        if following is not None and again is not None:
            received.baddbmm_(again.mT, following, alpha=-1)
        torch.bmm(self.inverses[:, i], received, out=x)
        left.copy_(terms.left(x, left.dtype, dim=2))
        rounded.copy_(x)

    def _launch(
        self,
        i: int,
        x: Tensor,
        made: Tensor,
        *,
        read: Tensor | None = None,
        edge: Tensor | None,
        again: Tensor | None,
        out: Tensor | None,
        rounded: Tensor | None = None,
    ) -> None:
        from ttt.ops.in_place import solve_kernels as kernels

        assert self.halves is not None
        high, low, units = (half[:, i] for half in self.halves)
        batch, _, width = x.shape
        minus = x if read is None else read
        # Nothing is read or written for what is None.
        edge_or_any, again_or_any = (
            minus if edge is None else edge,
            high if again is None else again,
        )
        out_or_any, rounded_or_any = (minus if y is None else y for y in (out, rounded))
        with torch.cuda.device_of(x):
            kernels.solve_kernel[(-(-width // COLUMNS), batch)](
                high,
                low,
                units,
                x,
                minus,
                edge_or_any,
                again_or_any,
                made,
                out_or_any,
                rounded_or_any,
                self.size,
                width,
                self.decay,
                high.stride(0),
                units.stride(0),
                *x.stride()[:2],
                *minus.stride()[:2],
                *edge_or_any.stride()[:2],
                *again_or_any.stride()[:2],
                made.stride(0),
                *out_or_any.stride()[:2],
                *rounded_or_any.stride()[:2],
                LAG=self.lag,
                IS_ADJOINT=read is None,
                HAS_EDGE=edge is not None and self.lag > 0,
                HAS_NEXT=again is not None and self.lag > 0,
                SIZE=high.shape[-1],
                COLUMNS=COLUMNS,
                SLICE=min(SLICE, high.shape[-1]),
                PADDING=terms.PADDING,
                num_warps=8 if high.shape[-1] > 64 else 4,
                num_stages=2 if _shared_bytes(x) >= SHARED_BYTES else 1,
            )


def _shared_bytes(x: Tensor) -> int:
    if not x.is_cuda:
        return 0
    properties = torch.cuda.get_device_properties(x.device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def _halves(inverses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return H⁻¹ as two terms of float16, [N, n, C'', C''] with zeros past C, and the unit that
    they count in, [N, n]."""
    from ttt.ops.in_place import solve_kernels as kernels

    batch, count, size = inverses.shape[:3]
    padded = max(16, 1 << (size - 1).bit_length())
    # None of a positive definite matrix's numbers is larger than the largest of its diagonal.
    exponents = torch.frexp(inverses.diagonal(dim1=2, dim2=3).amax(2)).exponent
    units = torch.ldexp(torch.ones_like(exponents, dtype=inverses.dtype), exponents - 15)
    high, low = (
        inverses.new_empty(batch, count, padded, padded, dtype=torch.float16) for _ in range(2)
    )
    with torch.cuda.device_of(inverses):
        kernels.halves_kernel[(-(-padded // ROWS), batch * count)](
            inverses.contiguous(),
            units,
            high,
            low,
            size,
            PADDED=padded,
            ROWS=min(ROWS, padded),
            num_warps=4,
        )
    return high, low, units
