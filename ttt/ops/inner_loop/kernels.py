"""What the Triton kernels of `scan_triton` have in common, which says what they are for and names
the shapes.

All arithmetic is in float32. Names are those of `ttt_linear_mlp`: z what a layer gives for the
keys, s = eta · g its errors, zq what it gives for the queries; d_x is the gradient of x.
"""

import triton
import triton.language as tl

COUNTS = ["num_heads", "num_batches", "num_writes", "first", "last"]
"""Triton would compile a kernel again where one of these is 1, or a multiple of 16."""


@triton.jit
def _halves(x):
    """x as a sum of two bfloat16 terms, exact to some 16 bits: its first 16 bits, and the rest."""
    bits = x.to(tl.int32, bitcast=True)
    high = (bits & -65536).to(tl.float32, bitcast=True)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), (x - high).to(tl.bfloat16)


@triton.jit
def _dot(a, b, SPLIT: tl.constexpr):
    """A B in float32; SPLIT: see `ttt.ops.inner_loop.scan_triton.SPLIT_TYPES`."""
    if not SPLIT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32x3")
    elif a.dtype == tl.bfloat16 and b.dtype == tl.bfloat16:
        return tl.dot(a, b)
    elif a.dtype == tl.bfloat16:
        b_high, b_low = _halves(b.to(tl.float32))
        return tl.dot(a, b_high, tl.dot(a, b_low))
    elif b.dtype == tl.bfloat16:
        a_high, a_low = _halves(a.to(tl.float32))
        return tl.dot(a_high, b, tl.dot(a_low, b))
    else:
        a_high, a_low = _halves(a.to(tl.float32))
        b_high, b_low = _halves(b.to(tl.float32))
        return tl.dot(a_high, b_high, tl.dot(a_high, b_low, tl.dot(a_low, b_high)))


@triton.jit
def _mean(x, F: tl.constexpr):
    return tl.sum(x, 1)[:, None] / F


@triton.jit
def _normed(z, EPS: tl.constexpr, F: tl.constexpr):
    """Return what a layer norm scales, and 1 / standard deviation."""
    centered = z - _mean(z, F)
    rstd = tl.rsqrt(_mean(centered * centered, F) + EPS)
    return centered * rstd, rstd


@triton.jit
def _project(x, normed, F: tl.constexpr):
    """Return a vector without its mean and its part along `normed`: a layer norm's gradient, but
    for 1/std."""
    return x - _mean(x, F) - normed * _mean(x * normed, F)


@triton.jit
def _gradient(z, target, weight, bias, EPS: tl.constexpr, F: tl.constexpr):
    """∂/∂z of ½ ‖LN(z) − target‖²."""
    normed, rstd = _normed(z, EPS, F)
    missed = normed * weight[None, :] + bias[None, :] - target
    return rstd * _project(missed * weight[None, :], normed, F)


@triton.jit
def _gradient_backward(d_g, z, target, weight, bias, EPS: tl.constexpr, F: tl.constexpr):
    """Return the gradients of `_gradient` to z, target, weight, bias."""
    normed, rstd = _normed(z, EPS, F)
    w = weight[None, :]
    missed = normed * w + bias[None, :] - target
    h = missed * w
    g = rstd * _project(h, normed, F)
    d_h = rstd * _project(d_g, normed, F)
    p = rstd * d_g
    d_normed = d_h * w * w - p * _mean(h * normed, F) - h * _mean(p * normed, F)
    d_z = rstd * (_project(d_normed, normed, F) - normed * _mean(d_g * g, F))
    d_weight = tl.sum(d_h * (missed + normed * w), 0)
    return d_z, -d_h * w, d_weight, tl.sum(d_h * w, 0)


@triton.jit
def _steps(token_scale, K: tl.constexpr):
    """The scale of frame s as frame t reads it, [K, K]; and of the write."""
    t = tl.arange(0, K)
    scale = tl.load(token_scale + t)
    causal = tl.where(t[:, None] >= t[None, :], 1.0, 0.0)
    return scale[:, None] * causal, causal, tl.sum(tl.where(t == K - 1, scale, 0.0), 0)


@triton.jit
def _products(x, y, num_units, K: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr):
    """X Yᵀ + 1, [K, K], from pointers to the first tiles of rows of `num_units`.

    In a loop of its own: Triton divides all products of a loop among its warps alike, and it would
    divide the others as is good for this one alone."""
    products = tl.zeros((K, K), tl.float32) + 1
    for j in range(0, num_units, TILE):
        products += _dot(tl.load(x + j), tl.trans(tl.load(y + j)), SPLIT)
    return products


@triton.jit
def _add_to(pointer, x):
    tl.store(pointer, tl.load(pointer) + x)
