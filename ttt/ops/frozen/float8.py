"""Frozen weights in e4m3: on a GPU with `torch._scaled_mm`, elsewhere as the reference has it.

The tensor cores read both factors along the sum. The gradient of the input sums over the rows of
the weight, so there the bytes are turned first: a pass over the weight, a few hundredths of what
the product takes, and no second copy that stays.
"""

from typing import Any

import torch
from torch import Tensor

from ttt.ops.frozen import Layout, reference

MULTIPLE = 16
"""Both widths of a weight must be multiples of it, for the tensor cores."""
FAST_SUMS = True
"""The tensor cores keep a sum to its end in their own registers, which have fewer digits than
float32. Otherwise it is added up in float32 every few products, which takes longer."""


def layout(out_features: int, in_features: int) -> Layout:
    return Layout(((out_features, in_features), reference.E4M3), ((out_features,), torch.float32))


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    values, scales = reference.to_e4m3(weight)
    return values, scales.flatten()


def dequantize(
    values: Tensor, scales: Tensor, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    return (values.float() * scales[:, None]).to(dtype)


def product(x: Tensor, values: Tensor, scales: Tensor, out: Tensor) -> None:
    """Fill `out` [N, out] with the product of x [N, in]."""
    if not x.is_cuda:
        out.copy_(reference.float8_product(x, values, scales))
        return
    from ttt.ops.frozen import float8_kernels

    x8, x_scales = float8_kernels.to_e4m3(x)
    _scaled_mm(x8, x_scales, values.t(), scales[None, :], out)


def gradient(d_out: Tensor, values: Tensor, scales: Tensor, d_x: Tensor) -> None:
    """Fill `d_x` [N, in] with the gradient of the input, of that of the output [N, out]."""
    if not d_out.is_cuda:
        d_x.copy_(reference.float8_gradient(d_out, values, scales))
        return
    from ttt.ops.frozen import float8_kernels

    g8, g_scales = float8_kernels.to_e4m3(d_out, scales)
    ones = torch.ones(1, values.shape[1], dtype=torch.float32, device=d_out.device)
    _scaled_mm(g8, g_scales, float8_kernels.turned(values).t(), ones, d_x)


def _scaled_mm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out: Tensor) -> None:
    """Fill `out` [N, M] with a [N, sum], by rows, times b [sum, M], by columns."""
    options: Any = {"scale_a": a_scales, "scale_b": b_scales, "use_fast_accum": FAST_SUMS}
    # With scales by row it puts out bfloat16 alone.
    if out.dtype == torch.bfloat16:
        torch._scaled_mm(a, b, out_dtype=out.dtype, out=out, **options)
    else:
        out.copy_(torch._scaled_mm(a, b, out_dtype=torch.bfloat16, **options))
