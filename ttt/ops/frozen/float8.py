"""Frozen weights in e4m3: on a GPU with `torch._scaled_mm`, elsewhere as the reference has it.

The tensor cores read both factors along the sum. The gradient of the input sums over the rows of
the weight, so there the bytes are turned first: a pass over the weight, a few hundredths of what
the product takes, and no second copy that stays.
"""

import torch
from torch import Tensor

from ttt.ops.frozen import Layout, reference

MULTIPLE = 16
"""Both widths of a weight must be multiples of it, for the tensor cores."""


def layout(out_features: int, in_features: int) -> Layout:
    return Layout(((out_features, in_features), reference.E4M3), ((out_features,), torch.float32))


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    values, scales = reference.to_e4m3(weight)
    return values, scales.flatten()


def dequantize(
    values: Tensor, scales: Tensor, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    return (values.float() * scales[:, None]).to(dtype)


def product(
    x: Tensor, values: Tensor, scales: Tensor, out_features: int, in_features: int
) -> Tensor:
    if not x.is_cuda:
        return reference.float8_product(x, values, scales)
    from ttt.ops.frozen import float8_kernels

    x8, x_scales = float8_kernels.to_e4m3(x)
    return _scaled_mm(x8, x_scales, values.t(), scales[None, :]).to(x.dtype)


def gradient(
    d_out: Tensor, values: Tensor, scales: Tensor, out_features: int, in_features: int
) -> Tensor:
    if not d_out.is_cuda:
        return reference.float8_gradient(d_out, values, scales)
    from ttt.ops.frozen import float8_kernels

    g8, g_scales = float8_kernels.to_e4m3(d_out, scales)
    ones = torch.ones(1, in_features, dtype=torch.float32, device=d_out.device)
    return _scaled_mm(g8, g_scales, float8_kernels.turned(values).t(), ones).to(d_out.dtype)


def _scaled_mm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    """Multiply a [N, sum], by rows, with b [sum, M], by columns; bfloat16 [N, M]."""
    return torch._scaled_mm(
        a, b, scale_a=a_scales, scale_b=b_scales, out_dtype=torch.bfloat16, use_fast_accum=True
    )
