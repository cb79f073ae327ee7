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


@triton.jit
def _queries_backward(
    k, w1, written, d_out, d_zq, d_products, d_q, num_units,
    K: tl.constexpr, F: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Make a mini-batch's d_q, a tile at a time; W becomes what it was before the mini-batch.

    Args:
        k, d_out, d_q: pointers to the mini-batch's frames.
        w1: pointers to the first tile.
        written: pointer to what the mini-batch has written, the scale times s.
        d_zq: pointers to the frames of one program's memory."""
    t, f, h = tl.arange(0, K), tl.arange(0, F), tl.arange(0, TILE)
    frames, part = t[:, None] * F + f[None, :], t[:, None] * F + h[None, :]
    for j in range(0, num_units, TILE):
        key = tl.load(k + j + part)
        weight = tl.load(w1 + j * F)
        weight += _dot(tl.trans(key), tl.load(written + frames), SPLIT)
        tl.store(w1 + j * F, weight)
        d_query = tl.load(d_out + j + part).to(tl.float32)
        d_query += _dot(d_products, key, SPLIT)
        d_query += _dot(tl.load(d_zq), tl.trans(weight), SPLIT)
        tl.store(d_q + j + part, d_query.to(d_q.dtype.element_ty))


@triton.jit
def _keys_backward(
    q, k, w1, written, d_target, d_zq, d_z, d_products, d_w1, d_k, num_units,
    K: tl.constexpr, F: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Make a mini-batch's d_k, a tile at a time; d_W becomes that of the weights before the
    mini-batch.

    Args:
        q, k, d_k: pointers to the mini-batch's frames.
        w1, d_w1: pointers to the first tile; those of w1 are before the mini-batch.
        written, d_target: pointers to what the mini-batch has written, and d_target.
        d_zq, d_z: pointers to the frames of one program's memory."""
    t, f, h = tl.arange(0, K), tl.arange(0, F), tl.arange(0, TILE)
    frames, part = t[:, None] * F + f[None, :], t[:, None] * F + h[None, :]
    for j in range(0, num_units, TILE):
        query = tl.load(q + j + part)
        d_key = _dot(tl.trans(d_products), query, SPLIT)
        d_key -= tl.load(d_target + j + part)
        d_weight = tl.load(d_w1 + j * F)
        d_key -= _dot(tl.load(written + frames), tl.trans(d_weight), SPLIT)
        own_d_z = tl.load(d_z)
        d_key += _dot(own_d_z, tl.trans(tl.load(w1 + j * F)), SPLIT)
        d_weight += _dot(tl.trans(query), tl.load(d_zq), SPLIT)
        key = tl.load(k + j + part)
        d_weight += _dot(tl.trans(key), own_d_z, SPLIT)
        tl.store(d_w1 + j * F, d_weight)
        tl.store(d_k + j + part, d_key.to(d_k.dtype.element_ty))


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
        _queries_backward(
            k + here * F, w1 + tile, kept_z + there, d_out + here * F, own_d_zq, d_products,
            d_q + here * F, num_units, K, F, TILE, SPLIT,
        )  # fmt: skip
        tl.debug_barrier()
        _keys_backward(
            q + here * F, k + here * F, w1 + tile, kept_z + there, kept_zq + there, own_d_zq,
            own_d_z, d_products, d_w1 + tile, d_k + here * F, num_units, K, F, TILE, SPLIT,
        )  # fmt: skip
        tl.debug_barrier()
    tl.store(d_b1 + row * F + f, d_bias)
    _add_to(d_norm_weight + row * F + f, d_norm_w)
    _add_to(d_norm_bias + row * F + f, d_norm_b)
    _add_to(d_token_scale + row * K + t, d_scale)
