"""Numbers of 32 bits as sums of two of 16, for products that run on tensor cores.

A product of 16-bit factors is exact in a float32 accumulator, so what rounds is the factors alone:
one bfloat16 keeps 8 bits of mantissa, a sum of two keeps 16. Of the four products of two such sums,
the smallest is left out:

    x y ≈ x₁ y₁ + x₁ y₂ + x₂ y₁

The three come from one matrix product over a threefold inner dimension, in which the left factor
has the terms (x₁, x₁, x₂) and the right one (y₁, y₂, y₁), next to each other: so any range of the
inner dimension stays in one piece. Numbers of 32 or 64 bits are their own single term.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt.ops.process_setting import ProcessSetting

PADDING = 8
"""Frames that are added to a chunk for its sum: as many as 16 bytes have 16-bit numbers, so that
products stay fast."""


_PRODUCTS = torch.backends.cuda.matmul
_FLOAT32_PRODUCTS: ProcessSetting[str] = ProcessSetting(
    "ieee",
    read=lambda: str(_PRODUCTS.fp32_precision),
    write=lambda value: setattr(_PRODUCTS, "fp32_precision", value),
)


@contextmanager
def all_digits() -> Iterator[None]:
    """Have products of float32 numbers on a GPU no TF32, which has 10 bits of mantissa: of
    inverses it makes noise, and of what is positive definite something that is not."""
    with _FLOAT32_PRODUCTS.holding():
        yield


def accumulating_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type that sums of `dtype` are made in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def promoted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the type that they all fit in."""
    dtype = reduce(torch.promote_types, (x.dtype for x in tensors))
    return tuple(x.to(dtype) for x in tensors)


def num_terms(dtype: torch.dtype) -> int:
    """Return how many terms a factor has in products of `dtype`: 3 for 16 bits, else 1."""
    return 1 if dtype == accumulating_dtype(dtype) else 3


def has_kernels(x: Tensor) -> bool:
    """Return whether terms of x are made by Triton kernels."""
    return x.is_cuda


def left(x: Tensor, dtype: torch.dtype, *, dim: int) -> Tensor:
    """Return the terms of x as a left factor, in a new dimension `dim` next to the inner one."""
    if num_terms(dtype) == 1:
        return x.unsqueeze(dim)
    high, low = split(x, dtype)
    return torch.stack([high, high, low], dim)


def right(x: Tensor, dtype: torch.dtype, *, dim: int) -> Tensor:
    """Return the terms of x as a right factor, in a new dimension `dim` next to the inner one."""
    if num_terms(dtype) == 1:
        return x.unsqueeze(dim)
    high, low = split(x, dtype)
    return torch.stack([high, low, high], dim)


def shape(size: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return C' and m: how many frames a chunk of `size` has in products of `dtype`, and terms."""
    return (size, 1) if num_terms(dtype) == 1 else (size + PADDING, 3)


def of_weights(
    x: Tensor, size: int, dtype: torch.dtype, *, skip: int = 0, shift: int = 0, swap: bool = False
) -> Tensor:
    """Return weights as left terms, chunk by chunk: centered, and their mean.

    Args:
        x: [N, R − skip, K] in the accumulating type: in each row the weights of frames `shift` and
            on; rows before `skip` are zero.
        size: C, frames of a chunk.
        swap: right terms, for the other factor's left ones.

    Returns:
        [N, R, ⌈(shift + K) / C⌉, C', m]; for wide types the weights as they are, and C' = C.
    """
    batch, rows, columns = len(x), skip + x.shape[1], x.shape[2]
    count = -(-(shift + columns) // size)
    padded, m = shape(size, dtype)
    if m == 1 or not has_kernels(x) or count == 0 or rows == 0:
        x = F.pad(x, (shift, count * size - shift - columns, skip, 0)).unflatten(2, (count, size))
        if m == 1:
            return x.unsqueeze(-1)
        mean = x.mean(-1, keepdim=True)
        ends = [mean, _rest(mean, dtype), mean]
        x = F.pad(torch.cat([x - mean, *ends], -1), (0, PADDING - len(ends)))
        return (right if swap else left)(x, dtype, dim=-1)
    from ttt.ops.in_place import terms_kernels as kernels

    out = torch.empty(batch, rows, count, padded, m, dtype=dtype, device=x.device)
    across = 1 << (size - 1).bit_length()
    block = max(1, min(32, 8192 // across))
    with torch.cuda.device_of(x):
        kernels.weights_kernel[(-(-rows // block), count, batch)](
            x,
            out,
            rows,
            columns,
            skip,
            shift,
            count,
            *x.stride(),
            SIZE=size,
            PADDED=padded,
            IS_LEFT=not swap,
            ROWS=block,
            COLUMNS=across,
            STORED=128,
            num_warps=8,
        )
    return out


def of_values(
    x: Tensor,
    size: int,
    out: Tensor,
    *,
    less: Tensor | None = None,
    swap: bool = False,
    rounded: Tensor | None = None,
) -> None:
    """Write the frames of a chunk, x − less, and their sum, as right terms, to `out`.

    With `of_weights` as the left factor, Σ_u w_u x_u is then w̄ Σ_u x_u + Σ_u (w_u − w̄) x_u, whose
    first sum is exact to 24 bits: x may be large and cancel itself where all w are nearly one.

    Args:
        x: [N, T, d], T up to C; frames past them are zero.
        size: C.
        out: [N, C', m, d].
        less: [N, up to T, d] in the accumulating type; None: nothing.
        swap: left terms, for weights that have right ones.
        rounded: [N, T, d], also gets the frames, in its type.
    """
    dtype = out.dtype
    if num_terms(dtype) == 1 or not has_kernels(x):
        length = x.shape[1]
        x = F.pad(x.to(accumulating_dtype(dtype)), (0, 0, 0, size - x.shape[1]))
        if less is not None:
            x = x - F.pad(less, (0, 0, 0, size - less.shape[1]))
        if rounded is not None:
            rounded.copy_(x[:, :length])
        if num_terms(dtype) > 1:
            total = x.sum(1, keepdim=True)
            ends = [total, total, _rest(total, dtype)]
            x = F.pad(torch.cat([x, *ends], 1), (0, 0, 0, PADDING - len(ends)))
        out.copy_((left if swap else right)(x, dtype, dim=2))
        return
    from ttt.ops.in_place import terms_kernels as kernels

    batch, length, width = x.shape
    minus = x if less is None else less
    also = out if rounded is None else rounded
    with torch.cuda.device_of(x):
        kernels.values_kernel[(-(-width // 32), batch)](
            x,
            minus,
            out,
            also,
            length,
            0 if less is None else less.shape[1],
            size,
            width,
            x.stride(0),
            x.stride(1),
            minus.stride(0),
            minus.stride(1),
            out.stride(0),
            also.stride(0),
            also.stride(1),
            IS_ROUNDED=rounded is not None,
            IS_LEFT=swap,
            ROWS=64,
            COLUMNS=32,
            PADDING=PADDING,
            num_warps=4,
        )


def compact(values: Tensor) -> Tensor:
    """Return what `of_values` has made of frames, [N, C', m, d], without the term that is there
    twice; `expanded` is its inverse."""
    return values if values.shape[-2] == 1 else values[..., :2, :].contiguous()


def expanded(values: Tensor) -> Tensor:
    """Return the right terms, [N, C', m, d], that `compact` has made smaller."""
    if values.shape[-2] == 1:
        return values
    return torch.cat([values, values[..., :1, :]], -2)


def _rest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what two terms leave of means and sums, for which they are not enough: x ≈ x₁ + x₂
    + rest, and (x₁ + x₂) (y₁ + y₂) + rest (y₁ + y₂) + (x₁ + x₂) rest are three products of two
    terms."""
    high, low = split(x, dtype)
    return x - high - low


def split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return two tensors of 16-bit `dtype` whose sum is x to twice their digits."""
    if not has_kernels(x) or x.dtype != torch.float32 or x.numel() == 0:
        high = x.to(dtype)
        return high, (x - high).to(dtype)
    from ttt.ops.in_place import terms_kernels as kernels

    # With what lies between the rows of x, so that those of its terms start where its own do.
    high, low = (
        torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device) for _ in range(2)
    )
    span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    with torch.cuda.device_of(x):
        kernels.split_kernel[(-(-span // 4096),)](x, high, low, span, BLOCK=4096, num_warps=8)
    return high, low


def product(a: Tensor, b: Tensor, *, out: Tensor | None = None, keep: float = 0.0) -> Tensor:
    """Return A B of batches of matrices, in float32 (float64 for float64).

    Args:
        a: [N, I, K].
        b: [N, K, J], of the same type.
        out: [N, I, J] in the accumulating type, which then holds `keep` · OUT + A B.
    """
    dtype = accumulating_dtype(a.dtype)
    if a.dtype != dtype and not a.is_cuda:
        a, b = a.to(dtype), b.to(dtype)
    if out is None:
        return torch.bmm(a, b) if a.dtype == dtype else torch.bmm(a, b, dtype)
    if a.dtype == dtype:
        return torch.baddbmm(out, a, b, beta=keep, out=out)
    return torch.baddbmm(out, a, b, dtype, beta=keep, out=out)
