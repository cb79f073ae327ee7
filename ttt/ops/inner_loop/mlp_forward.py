"""The forward kernels of TTT-MLP; `mlp_blocks` says what they compute and names the shapes."""

import triton
import triton.language as tl

from ttt.ops.inner_loop.kernels import _gate, _gradient, _normed
from ttt.ops.inner_loop.mlp_pieces import (
    COUNTS,
    _flip,
    _frames,
    _gelu,
    _place,
    _plus,
    _read_scale,
    _terms,
    _write_scale,
)


@triton.jit(do_not_specialize=COUNTS)
def mlp_update(
    q, k, token_scale, w1, b1, w2, b2, z1, zq1, x2, s1, s2,
    num_batches, num_writes, first, last, start,
    K: tl.constexpr, F: tl.constexpr, D: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """A tile of hidden units takes what the block before has written; then the first layer reads
    the block's keys and queries: z1, zq1."""
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE
    m, f, h = tl.arange(0, M), tl.arange(0, F), tl.arange(0, TILE)
    frames, hidden = m[:, None] * F + f[None, :], j + m[:, None] * D + h[None, :]
    here = (row * num_batches + start) * K
    hidden += row * M * D
    w1 += row * F * D + j + f[:, None] * D + h[None, :]
    w2 += row * F * D + (j + h[:, None]) * F + f[None, :]
    b1 += row * D + j + h
    b2 += row * F + f
    was = (start > first) & (m < (last - start) * K + M)
    scale = _write_scale(token_scale, start - M // K, num_writes, M, K)
    written = _frames(s2, row * M * F + frames, was) * -scale
    turned = _flip(_terms(_frames(x2, hidden, was), SPLIT))
    tl.store(w2, _plus(tl.load(w2), turned, _terms(written, SPLIT)))
    if j == 0:
        tl.store(b2, tl.load(b2) + tl.sum(written, 0))
    written = _frames(s1, hidden, was) * -scale
    turned = _flip(_terms(_frames(k + here * F - M * F, frames, was), SPLIT))
    weight1 = _plus(tl.load(w1), turned, _terms(written, SPLIT))
    tl.store(w1, weight1)
    bias1 = tl.load(b1) + tl.sum(written, 0)
    tl.store(b1, bias1)
    weight1_terms = _terms(weight1, SPLIT)
    given = tl.broadcast_to(bias1[None, :], (M, TILE))
    real = m < (last - start) * K
    key_terms = _terms(_frames(k + here * F, frames, real), SPLIT)
    tl.store(z1 + hidden, _plus(given, key_terms, weight1_terms))
    query_terms = _terms(_frames(q + here * F, frames, real), SPLIT)
    tl.store(zq1 + hidden, _plus(given, query_terms, weight1_terms))


@triton.jit(do_not_specialize=COUNTS)
def mlp_writes(
    k, v, eta, token_scale, norm_weight, norm_bias, w2, b2, z1, x2, slope, s1, s2,
    kept_z1, kept_u, kept_z2,
    num_heads, num_batches, first, last, start, num_units,
    EPS: tl.constexpr, KEEP: tl.constexpr, K: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """What a block's mini-batches write, one after the other: x2 and s2, s1; slope is gelu'(z1)."""
    row = tl.program_id(0).to(tl.int64)
    m, t, f, h = tl.arange(0, M), tl.arange(0, K), tl.arange(0, F), tl.arange(0, TILE)
    frames, own_frames = m[:, None] * F + f[None, :], t[:, None] * F + f[None, :]
    hidden, own_hidden = m[:, None] * D + h[None, :], t[:, None] * D + h[None, :]
    here = (row * num_batches + start) * K
    there = _place(row, first, last, start, M, K)
    w2 += row * F * D + h[:, None] * F + f[None, :]
    z1, x2, slope, s1 = z1 + row * M * D, x2 + row * M * D, slope + row * M * D, s1 + row * M * D
    s2 += row * M * F
    norm_w = tl.load(norm_weight + row % num_heads * F + f)
    norm_b = tl.load(norm_bias + row % num_heads * F + f)
    bias2 = tl.load(b2 + row * F + f)
    write_scale = tl.load(token_scale + K - 1)
    all_real = m < (last - start) * K
    for n in range(0, M // K):
        past, now = m < n * K, n * K + t
        real = now < (last - start) * K
        scale = tl.where(past, write_scale, 0.0)[None, :]
        key_terms = _terms(_frames(k + (here + n * K) * F, own_frames, real), SPLIT)
        past_key_terms = _terms(_frames(k + here * F, frames, past & all_real), SPLIT)
        ones = tl.zeros((K, M), tl.float32) + 1
        steps = _terms(-scale * _plus(ones, key_terms, _flip(past_key_terms)), SPLIT)
        products = ones
        found2 = tl.broadcast_to(bias2[None, :], (K, F))
        for j in range(0, num_units, TILE):
            place = n * K * D + j + own_hidden
            found1 = tl.load(z1 + place)
            found1 = _plus(found1, steps, _terms(_frames(s1, j + hidden, past), SPLIT))
            own_x2, own_slope = _gelu(found1, _gate(found1))
            tl.store(x2 + place, own_x2)
            tl.store(slope + place, own_slope)
            if KEEP:
                tl.store(kept_z1 + there * D + place, found1)
            x2_terms = _terms(own_x2, SPLIT)
            past_x2_terms = _terms(_frames(x2, j + hidden, past), SPLIT)
            products = _plus(products, x2_terms, _flip(past_x2_terms))
            found2 = _plus(found2, x2_terms, _terms(tl.load(w2 + j * F), SPLIT))
        past_s2_terms = _terms(_frames(s2, frames, past), SPLIT)
        found2 = _plus(found2, _terms(-scale * products, SPLIT), past_s2_terms)
        if KEEP:
            tl.store(kept_z2 + (there + n * K) * F + own_frames, found2)
        target = _frames(v + (here + n * K) * F, own_frames, real).to(tl.float32)
        target -= _frames(k + (here + n * K) * F, own_frames, real).to(tl.float32)
        rate = tl.load(eta + here + now, mask=real, other=0.0)
        own_s2 = rate[:, None] * _gradient(found2, target, norm_w, norm_b, EPS, F)
        tl.store(s2 + n * K * F + own_frames, own_s2)
        s2_terms = _terms(own_s2, SPLIT)
        steps2 = _plus(tl.zeros((K, M), tl.float32), s2_terms, _flip(past_s2_terms))
        steps2_terms = _terms(-scale * steps2, SPLIT)
        for j in range(0, num_units, TILE):
            place = n * K * D + j + own_hidden
            u = tl.zeros((K, TILE), tl.float32)
            u = _plus(u, steps2_terms, _terms(_frames(x2, j + hidden, past), SPLIT))
            u = _plus(u, s2_terms, _flip(_terms(tl.load(w2 + j * F), SPLIT)))
            if KEEP:
                tl.store(kept_u + there * D + place, u)
            tl.store(s1 + place, tl.load(slope + place) * u)
        # The next mini-batch reads what other threads have stored.
        tl.debug_barrier()


@triton.jit(do_not_specialize=COUNTS)
def mlp_reads(
    q, k, token_scale, norm_weight, norm_bias, w2, b2, out, zq1, x2, s1, s2, kept_zq1, kept_zq2,
    num_heads, num_batches, first, last, start, num_units,
    EPS: tl.constexpr, KEEP: tl.constexpr, K: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """What a block's frames read: out."""
    row = tl.program_id(0).to(tl.int64)
    m, f, h = tl.arange(0, M), tl.arange(0, F), tl.arange(0, TILE)
    frames, hidden = m[:, None] * F + f[None, :], m[:, None] * D + h[None, :]
    here = (row * num_batches + start) * K
    there = _place(row, first, last, start, M, K)
    real = m < (last - start) * K
    w2 += row * F * D + h[:, None] * F + f[None, :]
    zq1, x2, s1 = zq1 + row * M * D, x2 + row * M * D, s1 + row * M * D
    read = _read_scale(token_scale, M, K)
    products = tl.zeros((M, M), tl.float32) + 1
    query_terms = _terms(_frames(q + here * F, frames, real), SPLIT)
    key_terms = _terms(_frames(k + here * F, frames, real), SPLIT)
    steps = _terms(-read * _plus(products, query_terms, _flip(key_terms)), SPLIT)
    found2 = tl.broadcast_to(tl.load(b2 + row * F + f)[None, :], (M, F))
    for j in range(0, num_units, TILE):
        s1_terms = _terms(tl.load(s1 + j + hidden), SPLIT)
        found1 = _plus(tl.load(zq1 + j + hidden), steps, s1_terms)
        if KEEP:
            tl.store(kept_zq1 + there * D + j + hidden, found1)
        xq2_terms = _terms(found1 * _gate(found1), SPLIT)
        products = _plus(products, xq2_terms, _flip(_terms(tl.load(x2 + j + hidden), SPLIT)))
        found2 = _plus(found2, xq2_terms, _terms(tl.load(w2 + j * F), SPLIT))
    s2_terms = _terms(tl.load(s2 + row * M * F + frames), SPLIT)
    found2 = _plus(found2, _terms(-read * products, SPLIT), s2_terms)
    if KEEP:
        tl.store(kept_zq2 + there * F + frames, found2)
    normed, _rstd = _normed(found2, EPS, F)
    norm_w = tl.load(norm_weight + row % num_heads * F + f)
    norm_b = tl.load(norm_bias + row % num_heads * F + f)
    found = _frames(q + here * F, frames, real).to(tl.float32)
    found += normed * norm_w[None, :] + norm_b[None, :]
    tl.store(out + here * F + frames, found.to(out.dtype.element_ty), mask=real[:, None])
