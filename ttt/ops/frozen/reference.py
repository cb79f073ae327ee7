"""Frozen weights in the plainest form: the definition that the fast ones are tested with.

float8: W = q s, with q in e4m3 and s_o = max_i |W_oi| / 448 for every row o, where 448 is the
largest number of e4m3. Both factors of a product are in e4m3, the input and the gradient with a
scale for every row (frame) of their own:

    y  = (x̂ qᵀ) · s_x sᵀ             x̂: x in e4m3, with the scales s_x
    dx = (ĝ q) · s_g                  ĝ: dy · s in e4m3, with the scales s_g

The scales s go into the gradient before it is rounded, as the product sums over the rows of q: so
the one copy of the weight serves both.

nf4: 64 weights after each other share a scale, the largest of their absolute values; each is the
nearest of sixteen numbers times that. The numbers are the quantiles of a normal distribution
(QLoRA, Dettmers et al. 2023, appendix E).
"""

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of e4m3."""

BLOCK = 64
"""Weights of nf4 that share a scale."""
# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)
# fmt: on


def to_e4m3(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [N, C], times `factors` [C], in e4m3, and the scales float32 [N, 1] of its rows."""
    wide = x.float() if factors is None else x.float() * factors
    largest = wide.abs().amax(dim=1, keepdim=True)
    scales = torch.where(largest > 0, largest / LARGEST, 1.0)
    return (wide / scales).to(E4M3), scales


def float8_product(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """y of x [N, in], values e4m3 [out, in] and scales float32 [out]."""
    x8, x_scales = to_e4m3(x)
    return (x8.float() @ values.float().T * (x_scales * scales)).to(x.dtype)


def float8_gradient(d_out: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """dx of dy [N, out]."""
    g8, g_scales = to_e4m3(d_out, scales)
    return (g8.float() @ values.float() * g_scales).to(d_out.dtype)


def nf4_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return which of the sixteen numbers each weight is, int64 of the weight's shape, and the
    scales, float32 [blocks]."""
    flat = weight.float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    share = blocks / torch.where(scales > 0, scales, 1.0)[:, None]
    numbers = torch.tensor(NF4, device=weight.device)
    codes = (share[:, :, None] - numbers).abs().argmin(dim=2)
    return codes.flatten()[: len(flat)].view(weight.shape), scales


def nf4_dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """The weights of codes [out, in], float32."""
    numbers = torch.tensor(NF4, device=codes.device)[codes]
    return numbers * scales.repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)
