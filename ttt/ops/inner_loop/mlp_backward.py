"""The backward kernels of TTT-MLP; `mlp_blocks` says what they compute and names the shapes.

d_x is the gradient of x. Of a block all is made at once that does not wait for other mini-batches,
then the rest from its last mini-batch to its first, and then what all of it goes into.
"""

import triton
import triton.language as tl

from ttt.ops.inner_loop.kernels import _add_to, _gradient, _normed, _project
from ttt.ops.inner_loop.mlp_pieces import (
    COUNTS,
    _before,
    _block,
    _flip,
    _frames,
    _gate,
    _gelu,
    _load_some,
    _load_terms,
    _own,
    _plus,
    _read_scale,
    _store_terms,
    _sum_terms,
    _terms,
    _writes,
)


@triton.jit(do_not_specialize=COUNTS)
def mlp_back_frames(
    q, k, v, eta, norm_weight, norm_bias, kept_z2, kept_zq2,
    d_out, d_norm_weight, d_norm_bias,
    s2, d_zq2, queries_keys, keys_keys, s2_s2, d_zq2_s2,
    num_heads, num_batches, num_kept, first, last, start,
    EPS: tl.constexpr, K: tl.constexpr, F: tl.constexpr, M: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Make what takes no weights: s2, d_zq2, and products of a block's frames with each other."""
    row = tl.program_id(0).to(tl.int64)
    m, f = tl.arange(0, M), tl.arange(0, F)
    frames, square = m[:, None] * F + f[None, :], row * M * M + m[:, None] * M + m[None, :]
    here = (row * num_batches + start) * K
    kept_frames = _block(row, first, start, num_kept, M, K) * M * F + frames
    own = row * (1 + SPLIT) * M * F
    real = m < (last - start) * K
    norm_w = tl.load(norm_weight + row % num_heads * F + f)
    norm_b = tl.load(norm_bias + row % num_heads * F + f)
    ones = tl.zeros((M, M), tl.float32) + 1
    key = _frames(k + here * F, frames, real)
    key_turned = _flip(_terms(key, SPLIT))
    tl.store(keys_keys + square, _plus(ones, _terms(key, SPLIT), key_turned))
    query_terms = _terms(_frames(q + here * F, frames, real), SPLIT)
    tl.store(queries_keys + square, _plus(ones, query_terms, key_turned))
    target = _frames(v + here * F, frames, real).to(tl.float32) - key.to(tl.float32)
    written = _gradient(tl.load(kept_z2 + kept_frames), target, norm_w, norm_b, EPS, F)
    written *= tl.load(eta + here + m, mask=real, other=0.0)[:, None]
    s2_terms = _terms(written, SPLIT)
    _store_terms(s2 + own, frames, s2_terms, M * F)
    s2_turned = _flip(s2_terms)
    tl.store(s2_s2 + square, _plus(ones - 1, s2_terms, s2_turned))
    d_found = _frames(d_out + here * F, frames, real).to(tl.float32)
    normed, rstd = _normed(tl.load(kept_zq2 + kept_frames), EPS, F)
    _add_to(d_norm_weight + row * F + f, tl.sum(d_found * normed, 0))
    _add_to(d_norm_bias + row * F + f, tl.sum(d_found, 0))
    d_zq2_terms = _terms(rstd * _project(d_found * norm_w[None, :], normed, F), SPLIT)
    _store_terms(d_zq2 + own, frames, d_zq2_terms, M * F)
    tl.store(d_zq2_s2 + square, _plus(ones - 1, d_zq2_terms, s2_turned))


@triton.jit(do_not_specialize=COUNTS)
def mlp_back_first(
    q, k, token_scale, w1, b1, s1, queries_keys, keys_keys, z1, x2, xq2, slope,
    num_batches, num_writes, num_kept, first, last, start,
    K: tl.constexpr, F: tl.constexpr, D: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """A tile of the first layer of the block's start, from that of its end, and what it gave: z1,
    x2, xq2; slope is gelu'(zq1)."""
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE
    m, f, h = tl.arange(0, M), tl.arange(0, F), tl.arange(0, TILE)
    frames, hidden = m[:, None] * F + f[None, :], j + m[:, None] * D + h[None, :]
    square = row * M * M + m[:, None] * M + m[None, :]
    here = (row * num_batches + start) * K
    own = row * (1 + SPLIT) * M * D
    w1, b1 = w1 + row * F * D + j + f[:, None] * D + h[None, :], b1 + row * D + j + h
    s1 += _block(row, first, start, num_kept, M, K) * (1 + SPLIT) * M * D
    real = m < (last - start) * K
    scale = tl.load(token_scale + K - 1)
    key_terms = _terms(_frames(k + here * F, frames, real), SPLIT)
    writes = _writes(start, num_writes, M, K) & real
    written_terms = _load_some(s1, hidden, writes, M * D, SPLIT)
    written = _plus(tl.zeros((F, TILE), tl.float32), _flip(key_terms), written_terms)
    weight = tl.load(w1) + scale * written
    tl.store(w1, weight)
    bias = tl.load(b1) + scale * tl.sum(_sum_terms(written_terms), 0)
    tl.store(b1, bias)
    weight_terms = _terms(weight, SPLIT)
    given = tl.broadcast_to(bias[None, :], (M, TILE))
    s1_terms = _load_terms(s1, hidden, M * D, SPLIT)
    steps = tl.where(_before(M, K), -scale, 0.0) * tl.load(keys_keys + square)
    found = _plus(given, key_terms, weight_terms)
    found = _plus(found, _terms(steps, SPLIT), s1_terms)
    tl.store(z1 + row * M * D + hidden, found)
    _store_terms(x2 + own, hidden, _terms(found * _gate(found), SPLIT), M * D)
    steps = -_read_scale(token_scale, M, K) * tl.load(queries_keys + square)
    query_terms = _terms(_frames(q + here * F, frames, real), SPLIT)
    found = _plus(given, query_terms, weight_terms)
    found = _plus(found, _terms(steps, SPLIT), s1_terms)
    gelu, own_slope = _gelu(found)
    _store_terms(xq2 + own, hidden, _terms(gelu, SPLIT), M * D)
    tl.store(slope + row * M * D + hidden, own_slope)


@triton.jit(do_not_specialize=COUNTS)
def mlp_back_second(
    token_scale, w2, w2_terms, s2, d_zq2, s2_s2, d_zq2_s2, x2, slope, u, d_zq1,
    num_writes, last, start,
    K: tl.constexpr, F: tl.constexpr, D: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """A tile of the second layer of the block's start, from that of its end, and what it hands
    back: u, d_zq1."""
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE
    m, f, h = tl.arange(0, M), tl.arange(0, F), tl.arange(0, TILE)
    frames, hidden = m[:, None] * F + f[None, :], j + m[:, None] * D + h[None, :]
    square = row * M * M + m[:, None] * M + m[None, :]
    own = row * (1 + SPLIT) * M
    rows2 = (j + h[:, None]) * F + f[None, :]
    w2 += row * F * D + rows2
    scale = tl.load(token_scale + K - 1)
    x2_terms = _load_terms(x2 + own * D, hidden, M * D, SPLIT)
    writes = _writes(start, num_writes, M, K) & (m < (last - start) * K)
    written_terms = _load_some(s2 + own * F, frames, writes, M * F, SPLIT)
    written = _plus(tl.zeros((TILE, F), tl.float32), _flip(x2_terms), written_terms)
    weight = tl.load(w2) + scale * written
    tl.store(w2, weight)
    weight_terms = _terms(weight, SPLIT)
    _store_terms(w2_terms + row * (1 + SPLIT) * F * D, rows2, weight_terms, F * D)
    weight_turned = _flip(weight_terms)
    steps = tl.where(_before(M, K), -scale, 0.0) * tl.load(s2_s2 + square)
    found = _plus(tl.zeros((M, TILE), tl.float32), _terms(steps, SPLIT), x2_terms)
    s2_terms = _load_terms(s2 + own * F, frames, M * F, SPLIT)
    hidden_alone = row * M * D + hidden
    tl.store(u + hidden_alone, _plus(found, s2_terms, weight_turned))
    steps = -_read_scale(token_scale, M, K) * tl.load(d_zq2_s2 + square)
    found = _plus(tl.zeros((M, TILE), tl.float32), _terms(steps, SPLIT), x2_terms)
    d_zq2_terms = _load_terms(d_zq2 + own * F, frames, M * F, SPLIT)
    found = _plus(found, d_zq2_terms, weight_turned) * tl.load(slope + hidden_alone)
    _store_terms(d_zq1 + own * D, hidden, _terms(found, SPLIT), M * D)


@triton.jit(do_not_specialize=COUNTS)
def mlp_back_ends(
    k, token_scale, d_w1, d_b1, d_w2, s2, queries_keys, d_zq2_s2, xq2, s1, d_zq1, d_s1, d_x2,
    d_scales,
    num_batches, num_writes, num_kept, first, last, start,
    K: tl.constexpr, F: tl.constexpr, D: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Make d_s1 and d_x2 of a tile of hidden units, but for what mini-batches add to those before
    them: of what the weights of the block's end take, and of what the block's queries read."""
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE
    m, f, h = tl.arange(0, M), tl.arange(0, F), tl.arange(0, TILE)
    frames, hidden = m[:, None] * F + f[None, :], j + m[:, None] * D + h[None, :]
    square = row * M * M + m[:, None] * M + m[None, :]
    here = (row * num_batches + start) * K
    own = row * (1 + SPLIT) * M
    xq2, d_zq1 = xq2 + own * D, d_zq1 + own * D
    s1 += _block(row, first, start, num_kept, M, K) * (1 + SPLIT) * M * D
    rows1, rows2 = j + f[:, None] * D + h[None, :], (j + h[:, None]) * F + f[None, :]
    writes = _writes(start, num_writes, M, K) & (m < (last - start) * K)
    scale = tl.load(token_scale + K - 1)
    key_terms = _terms(_frames(k + here * F, frames, writes), SPLIT)
    taken = tl.broadcast_to(tl.load(d_b1 + row * D + j + h)[None, :], (M, TILE))
    taken = _plus(taken, key_terms, _terms(tl.load(d_w1 + row * F * D + rows1), SPLIT))
    taken = tl.where(writes[:, None], taken, 0.0)
    own_s1 = _sum_terms(_load_terms(s1, hidden, M * D, SPLIT))
    tl.store(d_scales + row * M + tl.program_id(1), -tl.sum(tl.sum(own_s1 * taken, 1), 0))
    read = -_read_scale(token_scale, M, K)
    steps = _flip(_terms(read * tl.load(queries_keys + square), SPLIT))
    d_zq1_terms = _load_terms(d_zq1, hidden, M * D, SPLIT)
    tl.store(d_s1 + row * M * D + hidden, _plus(-scale * taken, steps, d_zq1_terms))
    s2_terms = _load_some(s2 + own * F, frames, writes, M * F, SPLIT)
    weight_turned = _flip(_terms(tl.load(d_w2 + row * F * D + rows2), SPLIT))
    taken = _plus(tl.zeros((M, TILE), tl.float32), s2_terms, weight_turned)
    d_read = _flip(_terms(read * tl.load(d_zq2_s2 + square), SPLIT))
    xq2_terms = _load_terms(xq2, hidden, M * D, SPLIT)
    tl.store(d_x2 + row * M * D + hidden, _plus(-scale * taken, d_read, xq2_terms))


@triton.jit(do_not_specialize=COUNTS)
def mlp_back_units(
    token_scale, d_w2, d_b2, d_token_scale,
    s2, d_zq2, queries_keys, d_zq2_s2, x2, xq2, s1, d_zq1, d_s2, x2_x2, d_zq1_s1, d_scales,
    num_writes, num_kept, first, last, start, num_units,
    K: tl.constexpr, F: tl.constexpr, D: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr, NUM_SCALES: tl.constexpr,
):  # fmt: skip
    """Sums over hidden units: d_s2, but for what mini-batches add to those before them; products of
    a block's frames with each other."""
    row = tl.program_id(0).to(tl.int64)
    m, f, h = tl.arange(0, M), tl.arange(0, F), tl.arange(0, TILE)
    frames, hidden = m[:, None] * F + f[None, :], m[:, None] * D + h[None, :]
    square = row * M * M + m[:, None] * M + m[None, :]
    own = row * (1 + SPLIT) * M
    d_w2 += row * F * D + h[:, None] * F + f[None, :]
    x2, xq2, d_zq1 = x2 + own * D, xq2 + own * D, d_zq1 + own * D
    s1 += _block(row, first, start, num_kept, M, K) * (1 + SPLIT) * M * D
    nothing = tl.zeros((M, M), tl.float32)
    found_x2_x2, found_xq2_x2, found_d_zq1_s1 = nothing + 1, nothing + 1, nothing
    taken = tl.broadcast_to(tl.load(d_b2 + row * F + f)[None, :], (M, F))
    for j in range(0, num_units, TILE):
        x2_terms = _load_terms(x2, j + hidden, M * D, SPLIT)
        found_x2_x2 = _plus(found_x2_x2, x2_terms, _flip(x2_terms))
        xq2_terms = _load_terms(xq2, j + hidden, M * D, SPLIT)
        found_xq2_x2 = _plus(found_xq2_x2, xq2_terms, _flip(x2_terms))
        taken = _plus(taken, x2_terms, _terms(tl.load(d_w2 + j * F), SPLIT))
        d_zq1_terms = _load_terms(d_zq1, j + hidden, M * D, SPLIT)
        s1_turned = _flip(_load_terms(s1, j + hidden, M * D, SPLIT))
        found_d_zq1_s1 = _plus(found_d_zq1_s1, d_zq1_terms, s1_turned)
    tl.store(x2_x2 + square, found_x2_x2)
    tl.store(d_zq1_s1 + square, found_d_zq1_s1)
    writes = _writes(start, num_writes, M, K) & (m < (last - start) * K)
    taken = tl.where(writes[:, None], taken, 0.0)
    # By frame, the gradients to `token_scale` where it scales a read or a write.
    read = found_d_zq1_s1 * tl.load(queries_keys + square)
    read += tl.load(d_zq2_s2 + square) * found_xq2_x2
    by_write = -tl.sum(tl.sum(tl.where(_before(M, K), read, 0.0), 1), 0)
    own_s2 = _sum_terms(_load_terms(s2 + own * F, frames, M * F, SPLIT))
    by_write -= tl.sum(tl.sum(own_s2 * taken, 1), 0)
    by_write += tl.sum(tl.load(d_scales + row * M + tl.arange(0, NUM_SCALES)), 0)
    by_frame = tl.sum(tl.where(_own(M, K), read, 0.0), 1)
    t = tl.arange(0, K)
    by_frame = tl.sum(tl.where(m[None, :] % K == t[:, None], by_frame[None, :], 0.0), 1)
    _add_to(d_token_scale + row * K + t, tl.where(t == K - 1, by_write, 0.0) - by_frame)
    steps = _flip(_terms(-_read_scale(token_scale, M, K) * found_xq2_x2, SPLIT))
    d_zq2_terms = _load_terms(d_zq2 + own * F, frames, M * F, SPLIT)
    found = _plus(-tl.load(token_scale + K - 1) * taken, steps, d_zq2_terms)
    tl.store(d_s2 + row * M * F + frames, found)


@triton.jit(do_not_specialize=COUNTS)
def mlp_back_inputs(
    q, k, token_scale, w1, d_w1, d_out, d_q, d_k, d_token_scale,
    keys_keys, s1, d_zq1, d_zq1_s1, d_z1, d_target,
    num_batches, num_writes, num_kept, first, last, start, num_units,
    K: tl.constexpr, F: tl.constexpr, D: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """d_q and d_k."""
    row = tl.program_id(0).to(tl.int64)
    m, f, h = tl.arange(0, M), tl.arange(0, F), tl.arange(0, TILE)
    frames, hidden = m[:, None] * F + f[None, :], m[:, None] * D + h[None, :]
    square = row * M * M + m[:, None] * M + m[None, :]
    here = (row * num_batches + start) * K
    real = m < (last - start) * K
    rows1 = row * F * D + f[:, None] * D + h[None, :]
    own = row * (1 + SPLIT) * M * D
    d_zq1, d_z1 = d_zq1 + own, d_z1 + own
    s1 += _block(row, first, start, num_kept, M, K) * (1 + SPLIT) * M * D
    writes = _writes(start, num_writes, M, K) & real
    scale = tl.load(token_scale + K - 1)
    # What the block writes into weights that later blocks read.
    d_key = tl.zeros((M, F), tl.float32)
    for j in range(0, num_units, TILE):
        weight_turned = _flip(_terms(tl.load(d_w1 + j + rows1), SPLIT))
        d_key = _plus(d_key, _load_terms(s1, j + hidden, M * D, SPLIT), weight_turned)
    d_key = tl.where(writes[:, None], -scale * d_key, 0.0)
    d_query = tl.zeros((M, F), tl.float32)
    products = tl.zeros((M, M), tl.float32)
    for j in range(0, num_units, TILE):
        weight_turned = _flip(_terms(tl.load(w1 + j + rows1), SPLIT))
        d_query = _plus(d_query, _load_terms(d_zq1, j + hidden, M * D, SPLIT), weight_turned)
        d_z1_terms = _load_terms(d_z1, j + hidden, M * D, SPLIT)
        d_key = _plus(d_key, d_z1_terms, weight_turned)
        s1_turned = _flip(_load_terms(s1, j + hidden, M * D, SPLIT))
        products = _plus(products, d_z1_terms, s1_turned)
    products = tl.where(_before(M, K), products, 0.0)
    d_scale = -tl.sum(tl.sum(products * tl.load(keys_keys + square), 1), 0)
    t = tl.arange(0, K)
    _add_to(d_token_scale + row * K + t, tl.where(t == K - 1, d_scale, 0.0))
    products_terms = _terms(-scale * (products + tl.trans(products)), SPLIT)
    steps = _terms(-_read_scale(token_scale, M, K) * tl.load(d_zq1_s1 + square), SPLIT)
    key_terms = _terms(_frames(k + here * F, frames, real), SPLIT)
    d_query = _plus(d_query, steps, key_terms)
    d_query += _frames(d_out + here * F, frames, real).to(tl.float32)
    tl.store(d_q + here * F + frames, d_query.to(d_q.dtype.element_ty), mask=real[:, None])
    d_key = _plus(d_key, products_terms, key_terms)
    query_terms = _terms(_frames(q + here * F, frames, real), SPLIT)
    d_key = _plus(d_key, _flip(steps), query_terms) - tl.load(d_target + row * M * F + frames)
    tl.store(d_k + here * F + frames, d_key.to(d_k.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=COUNTS)
def mlp_grad_first(
    q, k, d_w1, d_b1, d_zq1, d_z1,
    num_batches, last, start,
    K: tl.constexpr, F: tl.constexpr, D: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """The gradients to a tile of the first layer, from those of the block's end to those of its
    start."""
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE
    m, f, h = tl.arange(0, M), tl.arange(0, F), tl.arange(0, TILE)
    frames, hidden = m[:, None] * F + f[None, :], j + m[:, None] * D + h[None, :]
    here = (row * num_batches + start) * K
    own = row * (1 + SPLIT) * M * D
    real = m < (last - start) * K
    rows = row * F * D + j + f[:, None] * D + h[None, :]
    d_z1_terms = _load_terms(d_z1 + own, hidden, M * D, SPLIT)
    key_turned = _flip(_terms(_frames(k + here * F, frames, real), SPLIT))
    d_weight = _plus(tl.load(d_w1 + rows), key_turned, d_z1_terms)
    d_zq1_terms = _load_terms(d_zq1 + own, hidden, M * D, SPLIT)
    query_turned = _flip(_terms(_frames(q + here * F, frames, real), SPLIT))
    tl.store(d_w1 + rows, _plus(d_weight, query_turned, d_zq1_terms))
    _add_to(d_b1 + row * D + j + h, tl.sum(_sum_terms(d_z1_terms) + _sum_terms(d_zq1_terms), 0))


@triton.jit(do_not_specialize=COUNTS)
def mlp_grad_second(
    d_w2, d_b2, s2, d_zq2, x2, xq2, d_u, d_z2,
    F: tl.constexpr, D: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The gradients to a tile of the second layer, likewise."""
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE
    m, f, h = tl.arange(0, M), tl.arange(0, F), tl.arange(0, TILE)
    frames, hidden = m[:, None] * F + f[None, :], j + m[:, None] * D + h[None, :]
    own = row * (1 + SPLIT) * M
    rows = row * F * D + (j + h[:, None]) * F + f[None, :]
    d_z2_terms = _load_terms(d_z2 + own * F, frames, M * F, SPLIT)
    x2_turned = _flip(_load_terms(x2 + own * D, hidden, M * D, SPLIT))
    d_weight = _plus(tl.load(d_w2 + rows), x2_turned, d_z2_terms)
    d_zq2_terms = _load_terms(d_zq2 + own * F, frames, M * F, SPLIT)
    xq2_turned = _flip(_load_terms(xq2 + own * D, hidden, M * D, SPLIT))
    d_weight = _plus(d_weight, xq2_turned, d_zq2_terms)
    d_u_turned = _flip(_load_terms(d_u + own * D, hidden, M * D, SPLIT))
    s2_terms = _load_terms(s2 + own * F, frames, M * F, SPLIT)
    tl.store(d_w2 + rows, _plus(d_weight, d_u_turned, s2_terms))
    if j == 0:
        given = _sum_terms(d_z2_terms) + _sum_terms(d_zq2_terms)
        _add_to(d_b2 + row * F + f, tl.sum(given, 0))
