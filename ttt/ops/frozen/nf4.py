"""Frozen weights in nf4, by bitsandbytes: it is what people know, comes with `moshi`, and has
kernels for GPUs and CPUs.

A product takes the weight back to the type of its input and multiplies there; for a single frame
the two are one kernel, which reads 4.5 bits a weight.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ttt.ops.frozen import Layout
from ttt.ops.frozen.reference import BLOCK, NF4


def layout(out_features: int, in_features: int) -> Layout:
    number = out_features * in_features
    num_blocks = -(-number // BLOCK)
    return Layout((((number + 1) // 2, 1), torch.uint8), ((num_blocks,), torch.float32))


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.float() if weight.dtype == torch.float64 else weight
    found: tuple[Tensor, Tensor] = _operators().quantize_4bit(
        weight.contiguous(), BLOCK, "nf4", torch.uint8
    )
    return found


def dequantize(
    values: Tensor, scales: Tensor, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    if values.is_meta:
        return torch.empty(out_features, in_features, dtype=dtype, device="meta")
    # It knows no float64.
    known = torch.float32 if dtype == torch.float64 else dtype
    # As one row: on CPUs with AVX-512, bitsandbytes 0.49 takes each row to begin with a block.
    flat = (out_features * in_features,)
    found: Tensor = _operators().dequantize_4bit(values, scales, BLOCK, "nf4", flat, known)
    return found.view(out_features, in_features).to(dtype)


def product(x: Tensor, values: Tensor, scales: Tensor, out: Tensor) -> None:
    """Fill `out` [N, out] with the product of x [N, in]."""
    shape = (out.shape[1], x.shape[1])
    if x.is_cuda and len(x) == 1 and x.shape[1] % BLOCK == 0:
        # It takes the packed weight lying down.
        found = _operators().gemv_4bit(
            x.contiguous(), values.t(), shape, scales, _numbers(x.device), BLOCK
        )
        out.copy_(found)
    else:
        torch.mm(x, dequantize(values, scales, *shape, x.dtype).t(), out=out)


def gradient(d_out: Tensor, values: Tensor, scales: Tensor, d_x: Tensor) -> None:
    """Fill `d_x` [N, in] with the gradient of the input, of that of the output [N, out]."""
    shape = (d_out.shape[1], d_x.shape[1])
    torch.mm(d_out, dequantize(values, scales, *shape, d_out.dtype), out=d_x)


@cache
def _operators() -> Any:
    import bitsandbytes  # noqa: F401

    return torch.ops.bitsandbytes


@cache
def _numbers(device: torch.device) -> Tensor:
    return torch.tensor(NF4, device=device)
