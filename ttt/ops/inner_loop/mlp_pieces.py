"""What the forward and the backward kernels of TTT-MLP have in common; `mlp_blocks` says what they
compute and names the shapes."""

import triton
import triton.language as tl

from ttt.ops.inner_loop.kernels import _halves

COUNTS = [
    *("num_heads", "num_batches", "num_writes", "num_kept", "num_units"),
    *("first", "last", "start"),
]
"""Triton would compile a kernel again where one of these is 1, or a multiple of 16."""


@triton.jit
def _terms(x, SPLIT: tl.constexpr):
    """Return what X is multiplied as: its terms; see `scan_triton.SPLIT_TYPES`."""
    if not SPLIT:
        return (x.to(tl.float32),)
    elif x.dtype == tl.bfloat16:
        return (x,)
    else:
        return _halves(x.to(tl.float32))


@triton.jit
def _load_terms(x, places, SIZE: tl.constexpr, SPLIT: tl.constexpr):
    """Return terms that `_store_terms` left at these places of a row of SIZE numbers."""
    if SPLIT:
        return tl.load(x + places), tl.load(x + SIZE + places)
    else:
        return (tl.load(x + places),)


@triton.jit
def _load_some(x, places, real, SIZE: tl.constexpr, SPLIT: tl.constexpr):
    """Return such terms of frames, zero where there are none."""
    if SPLIT:
        return _frames(x, places, real), _frames(x + SIZE, places, real)
    else:
        return (_frames(x, places, real),)


@triton.jit
def _store_terms(x, places, terms, SIZE: tl.constexpr):
    """Store terms for products to come, which then need not make them again."""
    tl.store(x + places, terms[0])
    if len(terms) == 2:
        tl.store(x + SIZE + places, terms[1])


@triton.jit
def _sum_terms(x):
    """Return X in float32, of terms."""
    if len(x) == 1:
        return x[0]
    else:
        return x[0].to(tl.float32) + x[1].to(tl.float32)


@triton.jit
def _flip(x):
    """Xᵀ, of terms."""
    if len(x) == 1:
        return (tl.trans(x[0]),)
    else:
        return tl.trans(x[0]), tl.trans(x[1])


@triton.jit
def _plus(total, x, y):
    """total + X Y in float32, of terms."""
    if len(y) == 2:
        total = tl.dot(x[0], y[1], total)
    if len(x) == 2:
        total = tl.dot(x[1], y[0], total)
    return tl.dot(x[0], y[0], total, input_precision="tf32x3")


@triton.jit
def _frames(x, places, real):
    """Return frames [T, ·] from memory, zero where there are none."""
    return tl.load(x + places, mask=real[:, None], other=0.0)


@triton.jit
def _block(row, first, start, num_kept, M: tl.constexpr, K: tl.constexpr):
    """Return the place of a row's block where `num_kept` blocks a row are kept, all of a group or
    the last one alone. (Whether all are is no constant: kernels that are compiled apart may sum in
    another order.)"""
    return row * num_kept + tl.minimum((start - first) * K // M, num_kept - 1)


@triton.jit
def _writes(start, num_writes, M: tl.constexpr, K: tl.constexpr):
    """Return which frames from mini-batch `start` on write, [M]."""
    return tl.arange(0, M) // K < num_writes - start


@triton.jit
def _before(M: tl.constexpr, K: tl.constexpr):
    """Return whether the mini-batch of frame s is before that of frame t, [M, M]."""
    t = tl.arange(0, M)
    return t[None, :] // K < t[:, None] // K


@triton.jit
def _own(M: tl.constexpr, K: tl.constexpr):
    """Return whether frame s is in the mini-batch of frame t, and not after t, [M, M]."""
    t = tl.arange(0, M)
    return (t[None, :] // K == t[:, None] // K) & (t[None, :] <= t[:, None])


@triton.jit
def _read_scale(token_scale, M: tl.constexpr, K: tl.constexpr):
    """Return R [M, M]."""
    scale = tl.load(token_scale + tl.arange(0, M) % K)
    earlier = tl.where(_before(M, K), tl.load(token_scale + K - 1), 0.0)
    return tl.where(_own(M, K), scale[:, None], earlier)


@triton.jit
def _gate(x):
    """Return what the tanh-GELU multiplies x by, by instructions that take no care of tiny
    numbers."""
    root = tl.rsqrt(1 + tl.exp2(x * (-2.302208198 - 0.1029432396 * x * x)))
    return root * root


@triton.jit
def _gelu(x):
    """Return tanh-GELU of x and its derivative."""
    gate = _gate(x)
    y = x * gate
    return y, gate + y * (1 - gate) * (1.5957691216057308 + 0.2140644488 * x * x)


@triton.jit
def _gelu_derivatives(x, factor):
    """Return the first derivative of tanh-GELU, and the second one times `factor`."""
    gate = _gate(x)
    inner = 1.5957691216057308 + 0.2140644488 * x * x
    rest = 1 - gate
    bend = 2 * inner + x * (0.4281288976 * x + (rest - gate) * inner * inner)
    return gate + x * gate * rest * inner, bend * (gate * rest * factor)
