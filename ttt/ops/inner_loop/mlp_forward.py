"""The forward kernels of TTT-MLP; `mlp_blocks` says what they compute and names the shapes."""

import triton
import triton.language as tl

from ttt.ops.inner_loop.kernels import _gradient, _normed
from ttt.ops.inner_loop.mlp_pieces import (
    COUNTS,
    _block,
    _flip,
    _frames,
    _gate,
    _gelu,
    _load_some,
    _load_terms,
    _plus,
    _read_scale,
    _store_terms,
    _sum_terms,
    _terms,
    _writes,
)


@triton.jit(do_not_specialize=COUNTS)
def mlp_first(
    q, k, token_scale, w1, b1, z1, zq1, s1,
    num_batches, num_writes, num_kept, first, last, start,
    K: tl.constexpr, F: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A tile of the first layer takes what the block before has written, and is read by the
    block's keys and queries: z1, zq1."""
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE
    m, f, h = tl.arange(0, M), tl.arange(0, F), tl.arange(0, TILE)
    frames, hidden = m[:, None] * F + f[None, :], j + m[:, None] * D + h[None, :]
    here = (row * num_batches + start) * K
    w1 += row * F * D + j + f[:, None] * D + h[None, :]
    b1 += row * D + j + h
    s1 += _block(row, first, start - M // K, num_kept, M, K) * (1 + SPLIT) * M * D
    scale = tl.load(token_scale + K - 1)
    was = _writes(start - M // K, num_writes, M, K)
    was = was & (start > first) & (m < (last - start) * K + M)
    s1_terms = _load_some(s1, hidden, was, M * D, SPLIT)
    key_turned = _flip(_terms(_frames(k + here * F - M * F, frames, was), SPLIT))
    written = _plus(tl.zeros((F, TILE), tl.float32), key_turned, s1_terms)
    weight = tl.load(w1) - scale * written
    tl.store(w1, weight)
    bias = tl.load(b1) - scale * tl.sum(_sum_terms(s1_terms), 0)
    tl.store(b1, bias)
    weight_terms = _terms(weight, SPLIT)
    given = tl.broadcast_to(bias[None, :], (M, TILE))
    real = m < (last - start) * K
    hidden += row * M * D
    key_terms = _terms(_frames(k + here * F, frames, real), SPLIT)
    tl.store(z1 + hidden, _plus(given, key_terms, weight_terms))
    query_terms = _terms(_frames(q + here * F, frames, real), SPLIT)
    tl.store(zq1 + hidden, _plus(given, query_terms, weight_terms))


@triton.jit(do_not_specialize=COUNTS)
def mlp_second(
    token_scale, w2, b2, w2_terms, x2, s2,
    num_writes, first, last, start,
    K: tl.constexpr, F: tl.constexpr, D: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """A tile of the second layer takes what the block before has written."""
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE
    m, f, h = tl.arange(0, M), tl.arange(0, F), tl.arange(0, TILE)
    frames, hidden = m[:, None] * F + f[None, :], j + m[:, None] * D + h[None, :]
    rows2 = (j + h[:, None]) * F + f[None, :]
    w2, b2 = w2 + row * F * D + rows2, b2 + row * F + f
    own = row * (1 + SPLIT) * M
    scale = tl.load(token_scale + K - 1)
    was = _writes(start - M // K, num_writes, M, K)
    was = was & (start > first) & (m < (last - start) * K + M)
    x2_turned = _flip(_load_some(x2 + own * D, hidden, was, M * D, SPLIT))
    s2_terms = _load_some(s2 + own * F, frames, was, M * F, SPLIT)
    written = _plus(tl.zeros((TILE, F), tl.float32), x2_turned, s2_terms)
    weight = tl.load(w2) - scale * written
    tl.store(w2, weight)
    _store_terms(w2_terms + row * (1 + SPLIT) * F * D, rows2, _terms(weight, SPLIT), F * D)
    if j == 0:
        tl.store(b2, tl.load(b2) - scale * tl.sum(_sum_terms(s2_terms), 0))


@triton.jit
def _write(
    k, v, eta, norm_w, norm_b, w2_terms, bias2, write_scale, z1, x2, slope, s1, s2, kept_z2,
    count, num_units,
    N: tl.constexpr, PAST: tl.constexpr, SEEN: tl.constexpr, EPS: tl.constexpr,
    K: tl.constexpr, F: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Pass over the second layer's weights once: for s1 of mini-batch N, if there is one, and then
    x2 and s2 of the next, if there is one.

    Args:
        k, v, eta: pointers to the block's frames, of which `count` are real.
        PAST, SEEN: how many frames are looked at for those of the mini-batches before N, and for
            those up to N: N · K and N · K + K, or more."""
    NEXT: tl.constexpr = N + 1
    t, f, h = tl.arange(0, K), tl.arange(0, F), tl.arange(0, TILE)
    rows2 = h[:, None] * F + f[None, :]
    p, m = tl.arange(0, PAST if PAST > 0 else K), tl.arange(0, SEEN if SEEN > 0 else K)
    past, seen = p < N * K, m < NEXT * K
    past_hidden, past_frames = p[:, None] * D + h[None, :], p[:, None] * F + f[None, :]
    seen_hidden, seen_frames = m[:, None] * D + h[None, :], m[:, None] * F + f[None, :]
    own, own_frames = N * K + t, (N * K + t[:, None]) * F + f[None, :]
    own_hidden = (N * K + t[:, None]) * D + h[None, :]
    next_frames = (NEXT * K + t[:, None]) * F + f[None, :]
    next_hidden = (NEXT * K + t[:, None]) * D + h[None, :]
    real, next_real = own < count, NEXT * K + t < count
    if N >= 0:
        # What frames of mini-batch N read of those before: of those the coefficients are zero where
        # there are none.
        s2_terms = _load_terms(s2, own_frames, M * F, SPLIT)
        seen_s2_terms = _load_some(s2, seen_frames, m < N * K, M * F, SPLIT)
        steps2 = _plus(tl.zeros((K, SEEN), tl.float32), s2_terms, _flip(seen_s2_terms))
        steps2_terms = _terms(-write_scale * steps2, SPLIT)
    if N >= 0 and NEXT * K < M:
        key_terms = _terms(_frames(k, own_frames, real), SPLIT)
        next_key_terms = _terms(_frames(k, next_frames, next_real), SPLIT)
        ones = tl.zeros((K, K), tl.float32) + 1
        steps1 = -write_scale * _plus(ones, next_key_terms, _flip(key_terms))
        own_steps1_terms = _terms(steps1, SPLIT)
        products = tl.zeros((K, SEEN), tl.float32) + 1
    if N > 0 and NEXT * K < M:
        past_key_terms = _terms(_frames(k, past_frames, past & (p < count)), SPLIT)
        ones = tl.zeros((K, PAST), tl.float32) + 1
        steps1 = _plus(ones, next_key_terms, _flip(past_key_terms))
        steps1_terms = _terms(tl.where(past, -write_scale, 0.0)[None, :] * steps1, SPLIT)
    found2 = tl.broadcast_to(bias2[None, :], (K, F))
    for j in range(0, num_units, TILE):
        weight_terms = _load_terms(w2_terms, j * F + rows2, F * D, SPLIT)
        if N >= 0:
            seen_x2_terms = _load_some(x2, j + seen_hidden, seen, M * D, SPLIT)
            u = _plus(tl.zeros((K, TILE), tl.float32), steps2_terms, seen_x2_terms)
            u = _plus(u, s2_terms, _flip(weight_terms))
            s1_terms = _terms(tl.load(slope + j + own_hidden) * u, SPLIT)
            _store_terms(s1, j + own_hidden, s1_terms, M * D)
        if NEXT * K < M:
            found1 = tl.load(z1 + j + next_hidden)
            if N >= 0:
                found1 = _plus(found1, own_steps1_terms, s1_terms)
            if N > 0:
                past_s1_terms = _load_some(s1, j + past_hidden, past, M * D, SPLIT)
                found1 = _plus(found1, steps1_terms, past_s1_terms)
            next_x2, next_slope = _gelu(found1)
            x2_terms = _terms(next_x2, SPLIT)
            _store_terms(x2, j + next_hidden, x2_terms, M * D)
            tl.store(slope + j + next_hidden, next_slope)
            if N >= 0:
                products = _plus(products, x2_terms, _flip(seen_x2_terms))
            found2 = _plus(found2, x2_terms, weight_terms)
    if NEXT * K < M:
        if N >= 0:
            seen_s2_terms = _load_some(s2, seen_frames, seen, M * F, SPLIT)
            products = tl.where(seen, -write_scale, 0.0)[None, :] * products
            found2 = _plus(found2, _terms(products, SPLIT), seen_s2_terms)
        tl.store(kept_z2 + next_frames, found2)
        target = _frames(v, next_frames, next_real).to(tl.float32)
        target -= _frames(k, next_frames, next_real).to(tl.float32)
        rate = tl.load(eta + NEXT * K + t, mask=next_real, other=0.0)
        next_s2 = rate[:, None] * _gradient(found2, target, norm_w, norm_b, EPS, F)
        _store_terms(s2, next_frames, _terms(next_s2, SPLIT), M * F)
        # The next pass reads what other threads have stored.
        tl.debug_barrier()


@triton.jit(do_not_specialize=COUNTS)
def mlp_writes(
    k, v, eta, token_scale, norm_weight, norm_bias, w2_terms, b2, z1, x2, slope, s1, s2, kept_z2,
    num_heads, num_batches, num_kept, first, last, start, num_units,
    EPS: tl.constexpr, K: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Make what a block's mini-batches write, one after the other: x2 and s2, s1; slope is
    gelu'(z1)."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, F)
    here = (row * num_batches + start) * K
    block = _block(row, first, start, num_kept, M, K)
    own = row * (1 + SPLIT)
    norm_w = tl.load(norm_weight + row % num_heads * F + f)
    norm_b = tl.load(norm_bias + row % num_heads * F + f)
    bias2 = tl.load(b2 + row * F + f)
    write_scale = tl.load(token_scale + K - 1)
    for i in tl.static_range(0, M // K + 1):
        _write(
            k + here * F, v + here * F, eta + here, norm_w, norm_b, w2_terms + own * F * D, bias2,
            write_scale, z1 + row * M * D, x2 + own * M * D, slope + row * M * D,
            s1 + block * (1 + SPLIT) * M * D, s2 + own * M * F, kept_z2 + block * M * F,
            (last - start) * K, num_units,
            # Frames are looked at by powers of two.
            i - 1, 0 if i <= 1 else ((i - 1) * K if i <= 3 else M), i * K if i <= 2 else M,
            EPS, K, F, D, M, TILE, SPLIT,
        )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def mlp_reads(
    q, k, token_scale, norm_weight, norm_bias, w2_terms, b2, out, zq1, x2, s1, s2, kept_zq2,
    num_heads, num_batches, num_kept, first, last, start, num_units,
    EPS: tl.constexpr, K: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Make what a block's frames read: out."""
    row = tl.program_id(0).to(tl.int64)
    m, f, h = tl.arange(0, M), tl.arange(0, F), tl.arange(0, TILE)
    frames, hidden = m[:, None] * F + f[None, :], m[:, None] * D + h[None, :]
    here = (row * num_batches + start) * K
    block = _block(row, first, start, num_kept, M, K)
    real = m < (last - start) * K
    rows2 = h[:, None] * F + f[None, :]
    w2_terms += row * (1 + SPLIT) * F * D
    own = row * (1 + SPLIT) * M
    zq1, x2, s1 = zq1 + row * M * D, x2 + own * D, s1 + block * (1 + SPLIT) * M * D
    read = _read_scale(token_scale, M, K)
    products = tl.zeros((M, M), tl.float32) + 1
    query_terms = _terms(_frames(q + here * F, frames, real), SPLIT)
    key_terms = _terms(_frames(k + here * F, frames, real), SPLIT)
    steps = _terms(-read * _plus(products, query_terms, _flip(key_terms)), SPLIT)
    found2 = tl.broadcast_to(tl.load(b2 + row * F + f)[None, :], (M, F))
    for j in range(0, num_units, TILE):
        s1_terms = _load_terms(s1, j + hidden, M * D, SPLIT)
        found1 = _plus(tl.load(zq1 + j + hidden), steps, s1_terms)
        xq2_terms = _terms(found1 * _gate(found1), SPLIT)
        x2_turned = _flip(_load_terms(x2, j + hidden, M * D, SPLIT))
        products = _plus(products, xq2_terms, x2_turned)
        weight_terms = _load_terms(w2_terms, j * F + rows2, F * D, SPLIT)
        found2 = _plus(found2, xq2_terms, weight_terms)
    s2_terms = _load_terms(s2 + own * F, frames, M * F, SPLIT)
    found2 = _plus(found2, _terms(-read * products, SPLIT), s2_terms)
    tl.store(kept_zq2 + block * M * F + frames, found2)
    normed, _rstd = _normed(found2, EPS, F)
    norm_w = tl.load(norm_weight + row % num_heads * F + f)
    norm_b = tl.load(norm_bias + row % num_heads * F + f)
    found = _frames(q + here * F, frames, real).to(tl.float32)
    found += normed * norm_w[None, :] + norm_b[None, :]
    tl.store(out + here * F + frames, found.to(out.dtype.element_ty), mask=real[:, None])
