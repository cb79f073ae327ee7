"""The Triton kernels of `ttt.ops.scan`, which says what they are for and names the shapes.

A program takes one head of one row through mini-batches `first` to `last - 1`, forwards or
backwards. All arithmetic is in float32. Names are those of `ttt.ops.linear`: z what a layer gives
for the keys, s = eta · g its errors, zq what it gives for the queries; u is the error that TTT-MLP
hands back through its second layer, before the GELU; d_x is the gradient of x.
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
    """A B in float32; SPLIT: see `ttt.ops.scan.SPLIT_TYPES`."""
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
    """What a layer norm scales, and 1 / standard deviation."""
    centred = z - _mean(z, F)
    rstd = tl.rsqrt(_mean(centred * centred, F) + EPS)
    return centred * rstd, rstd


@triton.jit
def _project(x, normed, F: tl.constexpr):
    """Without its mean and its part along `normed`: a layer norm's gradient, but for 1/std."""
    return x - _mean(x, F) - normed * _mean(x * normed, F)


@triton.jit
def _gradient(z, target, weight, bias, EPS: tl.constexpr, F: tl.constexpr):
    """∂/∂z of ½ ‖LN(z) − target‖²."""
    normed, rstd = _normed(z, EPS, F)
    missed = normed * weight[None, :] + bias[None, :] - target
    return rstd * _project(missed * weight[None, :], normed, F)


@triton.jit
def _gradient_backward(d_g, z, target, weight, bias, EPS: tl.constexpr, F: tl.constexpr):
    """Of `_gradient`: to z, target, weight, bias."""
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
def _gelu(x):
    """The tanh-GELU: x times a logistic function."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _gelu_slope(x):
    """Its derivative."""
    p = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return p + x * p * (1 - p) * 1.5957691216057308 * (1 + 0.134145 * x * x)


@triton.jit
def _gelu_curvature(x):
    """Its second derivative."""
    p = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    slope = 1.5957691216057308 * (1 + 0.134145 * x * x)
    bend = 1.5957691216057308 * 0.26829 * x
    return p * (1 - p) * (2 * slope + x * (bend + (1 - 2 * p) * slope * slope))


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


# TTT-Linear. W goes through in tiles of rows: a whole one would fill the registers -------------


@triton.jit(do_not_specialize=COUNTS)
def linear_forward(
    q, k, v, eta, token_scale, norm_weight, norm_bias, w1, b1, out, scratch, kept_z, kept_zq,
    num_heads, num_batches, num_writes, first, last, num_units,
    EPS: tl.constexpr, KEEP: tl.constexpr, K: tl.constexpr, F: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    t, f, h = tl.arange(0, K), tl.arange(0, F), tl.arange(0, TILE)
    frames = t[:, None] * F + f[None, :]
    part = t[:, None] * F + h[None, :]
    tile = row * F * F + h[:, None] * F + f[None, :]
    own = scratch + row * 2 * K * F + frames
    norm_w = tl.load(norm_weight + row % num_heads * F + f)
    norm_b = tl.load(norm_bias + row % num_heads * F + f)
    scale, _causal, write_scale = _steps(token_scale, K)
    bias = tl.load(b1 + row * F + f)
    for n in range(first, last):
        here = (row * num_batches + n) * K
        z = tl.zeros((K, F), tl.float32) + bias[None, :]
        zq = tl.zeros((K, F), tl.float32) + bias[None, :]
        for j in range(0, num_units, TILE):
            weight = tl.load(w1 + tile + j * F)
            query = tl.load(q + here * F + j + part)
            key = tl.load(k + here * F + j + part)
            z += _dot(key, weight, SPLIT)
            zq += _dot(query, weight, SPLIT)
        target = tl.load(v + here * F + frames).to(tl.float32)
        target -= tl.load(k + here * F + frames).to(tl.float32)
        s = tl.load(eta + here + t)[:, None] * _gradient(z, target, norm_w, norm_b, EPS, F)
        products = _products(q + here * F + part, k + here * F + part, num_units, K, TILE, SPLIT)
        zq -= _dot(products * scale, s, SPLIT)
        normed, _rstd = _normed(zq, EPS, F)
        found = tl.load(q + here * F + frames).to(tl.float32)
        found += normed * norm_w[None, :] + norm_b[None, :]
        tl.store(out + here * F + frames, found.to(out.dtype.element_ty))
        if KEEP:
            there = (row * (last - first) + n - first) * K * F
            tl.store(kept_z + there + frames, z)
            tl.store(kept_zq + there + frames, zq)
        s *= tl.where(n < num_writes, write_scale, 0.0)
        bias -= tl.sum(s, 0)
        tl.store(own, s)
        tl.debug_barrier()
        for j in range(0, num_units, TILE):
            key = tl.load(k + here * F + j + part)
            change = _dot(tl.trans(key), tl.load(own), SPLIT)
            tl.store(w1 + tile + j * F, tl.load(w1 + tile + j * F) - change)
        tl.debug_barrier()
    tl.store(b1 + row * F + f, bias)


@triton.jit(do_not_specialize=COUNTS)
def linear_backward(
    q, k, v, eta, token_scale, norm_weight, norm_bias, w1, b1, scratch, kept_z, kept_zq,
    d_out, d_q, d_k, d_v, d_eta, d_token_scale, d_norm_weight, d_norm_bias, d_w1, d_b1,
    num_heads, num_batches, num_writes, first, last, num_units,
    EPS: tl.constexpr, K: tl.constexpr, F: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    t, f, h = tl.arange(0, K), tl.arange(0, F), tl.arange(0, TILE)
    frames = t[:, None] * F + f[None, :]
    part = t[:, None] * F + h[None, :]
    tile = row * F * F + h[:, None] * F + f[None, :]
    own_d_zq = scratch + row * 2 * K * F + frames
    own_d_z = own_d_zq + K * F
    norm_w = tl.load(norm_weight + row % num_heads * F + f)
    norm_b = tl.load(norm_bias + row % num_heads * F + f)
    scale, causal, write_scale = _steps(token_scale, K)
    d_bias = tl.load(d_b1 + row * F + f)
    d_norm_w, d_norm_b = tl.zeros((F,), tl.float32), tl.zeros((F,), tl.float32)
    d_scale = tl.zeros((K,), tl.float32)
    for i in range(0, last - first):
        n = last - 1 - i
        here = (row * num_batches + n) * K
        there = (row * (last - first) + n - first) * K * F
        written = tl.where(n < num_writes, write_scale, 0.0)
        products = _products(q + here * F + part, k + here * F + part, num_units, K, TILE, SPLIT)
        taken = tl.zeros((K, F), tl.float32) + d_bias[None, :]
        for j in range(0, num_units, TILE):
            key = tl.load(k + here * F + j + part)
            taken += _dot(key, tl.load(d_w1 + tile + j * F), SPLIT)
        # What is read.
        zq = tl.load(kept_zq + there + frames)
        d_found = tl.load(d_out + here * F + frames).to(tl.float32)
        normed, rstd = _normed(zq, EPS, F)
        d_norm_w += tl.sum(d_found * normed, 0)
        d_norm_b += tl.sum(d_found, 0)
        d_zq = rstd * _project(d_found * norm_w[None, :], normed, F)
        tl.store(own_d_zq, d_zq)
        # What is written.
        target = tl.load(v + here * F + frames).to(tl.float32)
        target -= tl.load(k + here * F + frames).to(tl.float32)
        z = tl.load(kept_z + there + frames)
        g = _gradient(z, target, norm_w, norm_b, EPS, F)
        rate = tl.load(eta + here + t)[:, None]
        s = rate * g
        d_steps = -_dot(d_zq, tl.trans(s), SPLIT)
        d_scale += tl.sum(d_steps * causal * products, 1)
        d_products = d_steps * scale
        d_written = -tl.sum(tl.sum(s * taken, 1), 0)
        d_scale += tl.where((t == K - 1) & (n < num_writes), d_written, 0.0)
        d_s = -_dot(tl.trans(products * scale), d_zq, SPLIT) - written * taken
        tl.store(d_eta + here + t, tl.sum(d_s * g, 1))
        d_z, d_target, d_nw, d_nb = _gradient_backward(
            rate * d_s, z, target, norm_w, norm_b, EPS, F
        )
        d_norm_w += d_nw
        d_norm_b += d_nb
        d_bias += tl.sum(d_zq, 0) + tl.sum(d_z, 0)
        tl.store(d_v + here * F + frames, d_target.to(d_v.dtype.element_ty))
        tl.store(kept_zq + there + frames, d_target)
        tl.store(kept_z + there + frames, written * s)
        tl.store(own_d_z, d_z)
        tl.debug_barrier()
        for j in range(0, num_units, TILE):
            key = tl.load(k + here * F + j + part)
            # The weights of this mini-batch's start, from those of its end.
            weight = tl.load(w1 + tile + j * F)
            weight += _dot(tl.trans(key), tl.load(kept_z + there + frames), SPLIT)
            tl.store(w1 + tile + j * F, weight)
            d_query = tl.load(d_out + here * F + j + part).to(tl.float32)
            d_query += _dot(d_products, key, SPLIT)
            d_query += _dot(tl.load(own_d_zq), tl.trans(weight), SPLIT)
            tl.store(d_q + here * F + j + part, d_query.to(d_q.dtype.element_ty))
        tl.debug_barrier()
        for j in range(0, num_units, TILE):
            query = tl.load(q + here * F + j + part)
            d_key = _dot(tl.trans(d_products), query, SPLIT)
            d_key -= tl.load(kept_zq + there + j + part)
            d_weight = tl.load(d_w1 + tile + j * F)
            d_key -= _dot(tl.load(kept_z + there + frames), tl.trans(d_weight), SPLIT)
            d_z = tl.load(own_d_z)
            d_key += _dot(d_z, tl.trans(tl.load(w1 + tile + j * F)), SPLIT)
            d_weight += _dot(tl.trans(query), tl.load(own_d_zq), SPLIT)
            key = tl.load(k + here * F + j + part)
            d_weight += _dot(tl.trans(key), d_z, SPLIT)
            tl.store(d_w1 + tile + j * F, d_weight)
            tl.store(d_k + here * F + j + part, d_key.to(d_k.dtype.element_ty))
        tl.debug_barrier()
    tl.store(d_b1 + row * F + f, d_bias)
    _add_to(d_norm_weight + row * F + f, d_norm_w)
    _add_to(d_norm_bias + row * F + f, d_norm_b)
    _add_to(d_token_scale + row * K + t, d_scale)


# TTT-MLP. W1 and W2 go through in tiles of hidden units: they are larger than a multiprocessor's
# memory. Factors are loaded inside the loops; kept outside, they would fill the registers ---------


@triton.jit(do_not_specialize=COUNTS)
def mlp_forward(
    q, k, v, eta, token_scale, norm_weight, norm_bias, w1, b1, w2, b2, out, scratch,
    kept_z1, kept_zq1, kept_u, kept_z2, kept_zq2, kept_products2,
    num_heads, num_batches, num_writes, first, last, num_units,
    EPS: tl.constexpr, KEEP: tl.constexpr, K: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    t, f, h = tl.arange(0, K), tl.arange(0, F), tl.arange(0, TILE)
    frames, square = t[:, None] * F + f[None, :], t[:, None] * K + t[None, :]
    part, units = t[:, None] * F + h[None, :], t[:, None] * D + h[None, :]
    tile1 = row * F * D + h[:, None] + f[None, :] * D
    tile2 = row * F * D + h[:, None] * F + f[None, :]
    own = scratch + row * K * (3 * D + 2 * F)
    own_z1, own_x2, own_xq2 = own + units, own + K * D + units, own + 2 * K * D + units
    own_s2 = own + 3 * K * D + frames
    norm_w = tl.load(norm_weight + row % num_heads * F + f)
    norm_b = tl.load(norm_bias + row % num_heads * F + f)
    scale, _causal, write_scale = _steps(token_scale, K)
    bias2 = tl.load(b2 + row * F + f)
    for n in range(first, last):
        here = (row * num_batches + n) * K
        there = (row * (last - first) + n - first) * K
        written = tl.where(n < num_writes, write_scale, 0.0)
        z2 = tl.zeros((K, F), tl.float32) + bias2[None, :]
        for j in range(0, num_units, TILE):
            key = tl.load(k + here * F + frames)
            z1 = _dot(key, tl.trans(tl.load(w1 + tile1 + j)), SPLIT)
            z1 += tl.load(b1 + row * D + j + h)[None, :]
            tl.store(own_z1 + j, z1)
            z2 += _dot(_gelu(z1), tl.load(w2 + tile2 + j * F), SPLIT)
        target = tl.load(v + here * F + frames).to(tl.float32)
        target -= tl.load(k + here * F + frames).to(tl.float32)
        s2 = tl.load(eta + here + t)[:, None] * _gradient(z2, target, norm_w, norm_b, EPS, F)
        tl.store(own_s2, s2)
        if KEEP:
            tl.store(kept_z2 + there * F + frames, z2)
        steps1 = scale * _products(q + here * F + part, k + here * F + part, F, K, TILE, SPLIT)
        zq2 = tl.zeros((K, F), tl.float32) + bias2[None, :]
        tl.debug_barrier()
        for j in range(0, num_units, TILE):
            z1 = tl.load(own_z1 + j)
            x2 = _gelu(z1)
            tl.store(own_x2 + j, x2)
            s2 = tl.load(own_s2)
            weight2 = tl.load(w2 + tile2 + j * F)
            u = _dot(s2, tl.trans(weight2), SPLIT)
            changed2 = weight2 - _dot(tl.trans(x2), written * s2, SPLIT)
            tl.store(w2 + tile2 + j * F, changed2)
            s1 = _gelu_slope(z1) * u
            weight1 = tl.load(w1 + tile1 + j)
            bias1 = tl.load(b1 + row * D + j + h)
            query = tl.load(q + here * F + frames)
            zq1 = _dot(query, tl.trans(weight1), SPLIT) + bias1[None, :]
            zq1 -= _dot(steps1, s1, SPLIT)
            key = tl.load(k + here * F + frames)
            changed1 = weight1 - _dot(tl.trans(written * s1), key, SPLIT)
            tl.store(w1 + tile1 + j, changed1)
            tl.store(b1 + row * D + j + h, bias1 - tl.sum(written * s1, 0))
            xq2 = _gelu(zq1)
            zq2 += _dot(xq2, weight2, SPLIT)
            tl.store(own_xq2 + j, xq2)
            if KEEP:
                place = there * D + j + units
                tl.store(kept_z1 + place, z1)
                tl.store(kept_zq1 + place, zq1)
                tl.store(kept_u + place, u)
        tl.debug_barrier()
        products2 = _products(own_xq2, own_x2, num_units, K, TILE, SPLIT)
        s2 = tl.load(own_s2)
        zq2 -= _dot(products2 * scale, s2, SPLIT)
        normed, _rstd = _normed(zq2, EPS, F)
        found = tl.load(q + here * F + frames).to(tl.float32)
        found += normed * norm_w[None, :] + norm_b[None, :]
        tl.store(out + here * F + frames, found.to(out.dtype.element_ty))
        if KEEP:
            tl.store(kept_zq2 + there * F + frames, zq2)
            tl.store(kept_products2 + there * K + square, products2)
        bias2 -= written * tl.sum(s2, 0)
        tl.debug_barrier()
    tl.store(b2 + row * F + f, bias2)
