"""The kernels of TTT-Linear; `ttt.ops.inner_loop.kernels` says how to read them.

A program takes one head of one row through mini-batches `first` to `last - 1`, forwards or
backwards. W goes through in tiles of rows: a whole one would fill the registers.
"""

import triton
import triton.language as tl

from ttt.ops.inner_loop.kernels import (
    COUNTS,
    _add_to,
    _dot,
    _gradient,
    _gradient_backward,
    _normed,
    _products,
    _project,
    _steps,
)


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
    q, k, v, eta, token_scale, norm_weight, norm_bias, w1, scratch, kept_z, kept_zq,
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
