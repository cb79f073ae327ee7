"""The backward kernels of TTT-MLP; `mlp_blocks` says what they compute and names the shapes.

d_x is the gradient of x. Of a block all is made at once that does not wait for other mini-batches,
then the rest from its last mini-batch to its first, and then what all of it goes into.
"""

import triton
import triton.language as tl

from ttt.ops.inner_loop.kernels import (
    _add_to,
    _gate,
    _gradient,
    _gradient_backward,
    _normed,
    _project,
)
from ttt.ops.inner_loop.mlp_pieces import (
    COUNTS,
    _before,
    _flip,
    _frames,
    _gelu,
    _own,
    _place,
    _plus,
    _read_scale,
    _terms,
    _write_scale,
    _writes,
)


@triton.jit(do_not_specialize=COUNTS)
def mlp_back_frames(
    q, k, v, eta, norm_weight, norm_bias, kept_z2, kept_zq2, d_out, d_norm_weight, d_norm_bias,
    s2, d_zq2, queries_keys, keys_keys, s2_s2, d_zq2_s2,
    num_heads, num_batches, first, last, start,
    EPS: tl.constexpr, K: tl.constexpr, F: tl.constexpr, M: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """What takes no weights: s2, d_zq2, and products of a block's frames with each other."""
    row = tl.program_id(0).to(tl.int64)
    m, f = tl.arange(0, M), tl.arange(0, F)
    frames, square = m[:, None] * F + f[None, :], row * M * M + m[:, None] * M + m[None, :]
    here = (row * num_batches + start) * K
    there = _place(row, first, last, start, M, K)
    real = m < (last - start) * K
    norm_w = tl.load(norm_weight + row % num_heads * F + f)
    norm_b = tl.load(norm_bias + row % num_heads * F + f)
    ones = tl.zeros((M, M), tl.float32) + 1
    query_terms = _terms(_frames(q + here * F, frames, real), SPLIT)
    key = _frames(k + here * F, frames, real)
    turned = _flip(_terms(key, SPLIT))
    tl.store(queries_keys + square, _plus(ones, query_terms, turned))
    tl.store(keys_keys + square, _plus(ones, _terms(key, SPLIT), turned))
    d_found = _frames(d_out + here * F, frames, real).to(tl.float32)
    normed, rstd = _normed(tl.load(kept_zq2 + there * F + frames), EPS, F)
    _add_to(d_norm_weight + row * F + f, tl.sum(d_found * normed, 0))
    _add_to(d_norm_bias + row * F + f, tl.sum(d_found, 0))
    given = rstd * _project(d_found * norm_w[None, :], normed, F)
    tl.store(d_zq2 + row * M * F + frames, given)
    target = _frames(v + here * F, frames, real).to(tl.float32) - key.to(tl.float32)
    written = _gradient(tl.load(kept_z2 + there * F + frames), target, norm_w, norm_b, EPS, F)
    written *= tl.load(eta + here + m, mask=real, other=0.0)[:, None]
    tl.store(s2 + row * M * F + frames, written)
    s2_terms = _terms(written, SPLIT)
    turned = _flip(s2_terms)
    tl.store(s2_s2 + square, _plus(ones - 1, s2_terms, turned))
    tl.store(d_zq2_s2 + square, _plus(ones - 1, _terms(given, SPLIT), turned))


@triton.jit(do_not_specialize=COUNTS)
def mlp_back_tiles(
    q, k, token_scale, w1, w2, d_w1, d_b1, d_w2, kept_z1, kept_zq1, kept_u,
    s2, d_zq2, queries_keys, d_zq2_s2, x2, d_zq1, d_s1, d_x2, d_scales,
    num_batches, num_writes, first, last, start,
    K: tl.constexpr, F: tl.constexpr, D: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Of a tile of hidden units: the weights of the block's start, from those of its end; d_zq1;
    d_s1 and d_x2, without what mini-batches add to those before them."""
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE
    m, f, h = tl.arange(0, M), tl.arange(0, F), tl.arange(0, TILE)
    frames, hidden = m[:, None] * F + f[None, :], j + m[:, None] * D + h[None, :]
    square, turned_square = m[:, None] * M + m[None, :], m[None, :] * M + m[:, None]
    here = (row * num_batches + start) * K
    there = _place(row, first, last, start, M, K) * D + hidden
    hidden += row * M * D
    rows1 = row * F * D + j + f[:, None] * D + h[None, :]
    rows2 = row * F * D + (j + h[:, None]) * F + f[None, :]
    real = m < (last - start) * K
    written = _write_scale(token_scale, start, num_writes, M, K)
    key_terms = _terms(_frames(k + here * F, frames, real), SPLIT)
    z = tl.load(kept_z1 + there)
    own_x2, slope = _gelu(z, _gate(z))
    tl.store(x2 + hidden, own_x2)
    s1 = slope * tl.load(kept_u + there)
    weight1 = _plus(tl.load(w1 + rows1), _flip(key_terms), _terms(written * s1, SPLIT))
    tl.store(w1 + rows1, weight1)
    # What the layers read of the weights of the block's end: d_w1, d_w2.
    taken = tl.broadcast_to(tl.load(d_b1 + row * D + j + h)[None, :], (M, TILE))
    taken = _plus(taken, key_terms, _terms(tl.load(d_w1 + rows1), SPLIT))
    tl.store(
        d_scales + row * M + tl.program_id(1),
        -tl.sum(tl.sum(tl.where(_writes(start, num_writes, M, K), s1 * taken, 0.0), 1), 0),
    )
    x2_terms = _terms(own_x2, SPLIT)
    own_s2 = written * tl.load(s2 + row * M * F + frames)
    s2_terms = _terms(own_s2, SPLIT)
    weight2 = _plus(tl.load(w2 + rows2), _flip(x2_terms), s2_terms)
    tl.store(w2 + rows2, weight2)
    zq = tl.load(kept_zq1 + there)
    xq2, slope = _gelu(zq, _gate(zq))
    read = -_read_scale(token_scale, M, K)
    steps = _terms(read * tl.load(d_zq2_s2 + row * M * M + square), SPLIT)
    d_zq2_terms = _terms(tl.load(d_zq2 + row * M * F + frames), SPLIT)
    d_xq2 = _plus(tl.zeros((M, TILE), tl.float32), steps, x2_terms)
    d_xq2 = _plus(d_xq2, d_zq2_terms, _flip(_terms(weight2, SPLIT)))
    own_d_zq1 = slope * d_xq2
    tl.store(d_zq1 + hidden, own_d_zq1)
    found = _plus(tl.zeros((M, TILE), tl.float32), _flip(steps), _terms(xq2, SPLIT))
    weight2_turned = _flip(_terms(tl.load(d_w2 + rows2), SPLIT))
    tl.store(d_x2 + hidden, found - _plus(tl.zeros((M, TILE), tl.float32), s2_terms, weight2_turned))
    steps = _flip(_terms(read * tl.load(queries_keys + row * M * M + square), SPLIT))
    tl.store(d_s1 + hidden, _plus(-written * taken, steps, _terms(own_d_zq1, SPLIT)))


@triton.jit(do_not_specialize=COUNTS)
def mlp_back_units(
    token_scale, d_w2, d_b2, d_token_scale, kept_z1, kept_zq1, kept_u,
    s2, d_zq2, queries_keys, d_zq2_s2, x2, d_zq1, d_s2, x2_x2, d_zq1_s1, d_scales,
    num_writes, first, last, start, num_units,
    K: tl.constexpr, F: tl.constexpr, D: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr, NUM_TILES: tl.constexpr,
):  # fmt: skip
    """Sums over hidden units: d_s2, without what mini-batches add to those before them; products of
    a block's frames with each other."""
    row = tl.program_id(0).to(tl.int64)
    m, f, h = tl.arange(0, M), tl.arange(0, F), tl.arange(0, TILE)
    frames, hidden = row * M * F + m[:, None] * F + f[None, :], m[:, None] * D + h[None, :]
    square = row * M * M + m[:, None] * M + m[None, :]
    there = _place(row, first, last, start, M, K) * D
    d_w2 += row * F * D + h[:, None] * F + f[None, :]
    x2, d_zq1 = x2 + row * M * D, d_zq1 + row * M * D
    nothing = tl.zeros((M, M), tl.float32)
    found_x2_x2, found_xq2_x2, found_d_zq1_s1 = nothing + 1, nothing + 1, nothing
    taken = tl.broadcast_to(tl.load(d_b2 + row * F + f)[None, :], (M, F))
    for j in range(0, num_units, TILE):
        x2_terms = _terms(tl.load(x2 + j + hidden), SPLIT)
        found_x2_x2 = _plus(found_x2_x2, x2_terms, _flip(x2_terms))
        zq = tl.load(kept_zq1 + there + j + hidden)
        found_xq2_x2 = _plus(found_xq2_x2, _terms(zq * _gate(zq), SPLIT), _flip(x2_terms))
        taken = _plus(taken, x2_terms, _terms(tl.load(d_w2 + j * F), SPLIT))
        z = tl.load(kept_z1 + there + j + hidden)
        _x2, slope = _gelu(z, _gate(z))
        turned = _flip(_terms(slope * tl.load(kept_u + there + j + hidden), SPLIT))
        d_zq1_terms = _terms(tl.load(d_zq1 + j + hidden), SPLIT)
        found_d_zq1_s1 = _plus(found_d_zq1_s1, d_zq1_terms, turned)
    tl.store(x2_x2 + square, found_x2_x2)
    tl.store(d_zq1_s1 + square, found_d_zq1_s1)
    written = _write_scale(token_scale, start, num_writes, M, K)
    steps = _flip(_terms(-_read_scale(token_scale, M, K) * found_xq2_x2, SPLIT))
    found = _plus(-written * taken, steps, _terms(tl.load(d_zq2 + frames), SPLIT))
    tl.store(d_s2 + frames, found)
    # By frame, the gradients to `token_scale` where it scales a read or a write.
    read = found_d_zq1_s1 * tl.load(queries_keys + square)
    read += tl.load(d_zq2_s2 + square) * found_xq2_x2
    by_write = -tl.sum(tl.sum(tl.where(_before(M, K), read, 0.0), 1), 0)
    kept = tl.where(_writes(start, num_writes, M, K), tl.load(s2 + frames) * taken, 0.0)
    by_write -= tl.sum(tl.sum(kept, 1), 0)
    tiles = tl.arange(0, NUM_TILES)
    by_write += tl.sum(tl.load(d_scales + row * M + tiles), 0)
    own = tl.sum(tl.where(_own(M, K), read, 0.0), 1)
    t = tl.arange(0, K)
    own = tl.sum(tl.where(m[None, :] % K == t[:, None], own[None, :], 0.0), 1)
    _add_to(d_token_scale + row * K + t, tl.where(t == K - 1, by_write, 0.0) - own)


@triton.jit(do_not_specialize=COUNTS)
def mlp_back_writes(
    k, v, eta, token_scale, norm_weight, norm_bias, w2, kept_z1, kept_u, kept_z2,
    d_v, d_eta, d_token_scale, d_norm_weight, d_norm_bias,
    s2, keys_keys, s2_s2, x2, d_s1, d_x2, d_s2, x2_x2, d_u, d_z1, d_z2, d_target, d_u_x2, d_z2_s2,
    num_heads, num_batches, first, last, start, num_units,
    EPS: tl.constexpr, K: tl.constexpr, F: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A block's mini-batches from the last to the first: d_u, d_z2, d_z1, and of what frames were
    given d_eta and d_v; d_target is d_v in float32."""
    row = tl.program_id(0).to(tl.int64)
    m, t, f, h = tl.arange(0, M), tl.arange(0, K), tl.arange(0, F), tl.arange(0, TILE)
    frames, own_frames = m[:, None] * F + f[None, :], t[:, None] * F + f[None, :]
    hidden, own_hidden = m[:, None] * D + h[None, :], t[:, None] * D + h[None, :]
    own_square, own_turned = t[:, None] * M + m[None, :], m[None, :] * M + t[:, None]
    here = (row * num_batches + start) * K
    there = _place(row, first, last, start, M, K)
    w2 += row * F * D + h[:, None] * F + f[None, :]
    x2, d_s1, d_x2 = x2 + row * M * D, d_s1 + row * M * D, d_x2 + row * M * D
    d_u, d_z1 = d_u + row * M * D, d_z1 + row * M * D
    s2, d_s2, d_z2 = s2 + row * M * F, d_s2 + row * M * F, d_z2 + row * M * F
    keys_keys, s2_s2, x2_x2 = keys_keys + row * M * M, s2_s2 + row * M * M, x2_x2 + row * M * M
    d_u_x2, d_z2_s2 = d_u_x2 + row * M * M, d_z2_s2 + row * M * M
    norm_w = tl.load(norm_weight + row % num_heads * F + f)
    norm_b = tl.load(norm_bias + row % num_heads * F + f)
    d_norm_w, d_norm_b = tl.zeros((F,), tl.float32), tl.zeros((F,), tl.float32)
    write_scale = tl.load(token_scale + K - 1)
    d_scale = tl.zeros((K,), tl.float32)
    narrow = tl.zeros((K, M), tl.float32)
    for back in range(0, M // K):
        n = M // K - 1 - back
        past, later, now = m < n * K, m >= n * K + K, n * K + t
        real = now < (last - start) * K
        squares = n * K * M + own_square
        is_past, is_later = tl.broadcast_to(past[None, :], (K, M)), later[None, :]
        steps = tl.load(keys_keys + squares) * tl.where(is_later, -write_scale, 0.0)
        steps_terms = _terms(steps, SPLIT)
        products = narrow
        found2 = tl.load(d_s2 + n * K * F + own_frames)
        for j in range(0, num_units, TILE):
            place = n * K * D + j + own_hidden
            d_z1_terms = _terms(_frames(d_z1, j + hidden, later), SPLIT)
            own_d_s1 = _plus(tl.load(d_s1 + place), steps_terms, d_z1_terms)
            z = tl.load(kept_z1 + there * D + place)
            gate = _gate(z)
            inner = 1.5957691216057308 + 0.2140644488 * z * z
            rest = 1 - gate
            own_d_u = (gate + z * gate * rest * inner) * own_d_s1
            bend = 2 * inner + z * (0.4281288976 * z + (rest - gate) * inner * inner)
            bend *= gate * rest * tl.load(kept_u + there * D + place)
            # From here on the part of d_z1.
            tl.store(d_s1 + place, bend * own_d_s1)
            tl.store(d_u + place, own_d_u)
            d_u_terms = _terms(own_d_u, SPLIT)
            past_x2_terms = _terms(_frames(x2, j + hidden, past), SPLIT)
            products = _plus(products, d_u_terms, _flip(past_x2_terms))
            found2 = _plus(found2, d_u_terms, _terms(tl.load(w2 + j * F), SPLIT))
        tl.store(d_u_x2 + squares, products)
        own_s2_s2, own_x2_x2 = tl.load(s2_s2 + squares), tl.load(x2_x2 + squares)
        d_scale -= tl.sum(products * own_s2_s2, 1)
        products += tl.load(d_u_x2 + n * K + own_turned, mask=is_later, other=0.0)
        s2_terms = _terms(tl.load(s2 + frames), SPLIT)
        found2 = _plus(found2, _terms(-write_scale * products, SPLIT), s2_terms)
        steps = _terms(tl.where(is_later, -write_scale * own_x2_x2, 0.0), SPLIT)
        found2 = _plus(found2, steps, _terms(_frames(d_z2, frames, later), SPLIT))
        target = _frames(v + (here + n * K) * F, own_frames, real).to(tl.float32)
        target -= _frames(k + (here + n * K) * F, own_frames, real).to(tl.float32)
        z2 = tl.load(kept_z2 + (there + n * K) * F + own_frames)
        g = _gradient(z2, target, norm_w, norm_b, EPS, F)
        tl.store(d_eta + here + now, tl.sum(found2 * g, 1), mask=real)
        rate = tl.load(eta + here + now, mask=real, other=0.0)[:, None]
        own_d_z2, own_d_target, d_nw, d_nb = _gradient_backward(
            rate * found2, z2, target, norm_w, norm_b, EPS, F
        )
        d_norm_w += d_nw
        d_norm_b += d_nb
        given = own_d_target.to(d_v.dtype.element_ty)
        tl.store(d_v + (here + n * K) * F + own_frames, given, mask=real[:, None])
        tl.store(d_target + (row * M + n * K) * F + own_frames, own_d_target)
        tl.store(d_z2 + n * K * F + own_frames, own_d_z2)
        d_z2_terms = _terms(own_d_z2, SPLIT)
        products = tl.where(is_past, _plus(narrow, d_z2_terms, _flip(s2_terms)), 0.0)
        tl.store(d_z2_s2 + squares, products)
        d_scale -= tl.sum(products * own_x2_x2, 1)
        products += tl.load(d_z2_s2 + n * K + own_turned, mask=is_later, other=0.0)
        read_terms = _terms(-write_scale * products, SPLIT)
        steps_terms = _terms(tl.where(is_later, -write_scale * own_s2_s2, 0.0), SPLIT)
        for j in range(0, num_units, TILE):
            place = n * K * D + j + own_hidden
            found = _plus(tl.load(d_x2 + place), read_terms, _terms(tl.load(x2 + j + hidden), SPLIT))
            found = _plus(found, steps_terms, _terms(_frames(d_u, j + hidden, later), SPLIT))
            found = _plus(found, d_z2_terms, _flip(_terms(tl.load(w2 + j * F), SPLIT)))
            z = tl.load(kept_z1 + there * D + place)
            _x2, slope = _gelu(z, _gate(z))
            tl.store(d_z1 + place, tl.load(d_s1 + place) + slope * found)
        # The next mini-batch reads what other threads have stored.
        tl.debug_barrier()
    _add_to(d_norm_weight + row * F + f, d_norm_w)
    _add_to(d_norm_bias + row * F + f, d_norm_b)
    last_frame = t == K - 1
    _add_to(d_token_scale + row * K + t, tl.where(last_frame, tl.sum(d_scale, 0), 0.0))


@triton.jit(do_not_specialize=COUNTS)
def mlp_back_inputs(
    q, k, token_scale, w1, d_w1, d_out, d_q, d_k, d_token_scale, kept_z1, kept_u,
    keys_keys, d_zq1, d_zq1_s1, d_z1, d_target,
    num_batches, num_writes, first, last, start, num_units,
    K: tl.constexpr, F: tl.constexpr, D: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """d_q and d_k."""
    row = tl.program_id(0).to(tl.int64)
    m, f, h = tl.arange(0, M), tl.arange(0, F), tl.arange(0, TILE)
    frames, hidden = m[:, None] * F + f[None, :], m[:, None] * D + h[None, :]
    square = row * M * M + m[:, None] * M + m[None, :]
    here = (row * num_batches + start) * K
    there = _place(row, first, last, start, M, K) * D
    real = m < (last - start) * K
    rows1 = row * F * D + f[:, None] * D + h[None, :]
    d_zq1, d_z1 = d_zq1 + row * M * D, d_z1 + row * M * D
    written = _write_scale(token_scale, start, num_writes, M, K)
    d_query, d_key = tl.zeros((M, F), tl.float32), tl.zeros((M, F), tl.float32)
    products = tl.zeros((M, M), tl.float32)
    for j in range(0, num_units, TILE):
        z = tl.load(kept_z1 + there + j + hidden)
        _x2, slope = _gelu(z, _gate(z))
        s1 = slope * tl.load(kept_u + there + j + hidden)
        weight_turned = _flip(_terms(tl.load(d_w1 + j + rows1), SPLIT))
        d_key = _plus(d_key, _terms(-written * s1, SPLIT), weight_turned)
        weight_turned = _flip(_terms(tl.load(w1 + j + rows1), SPLIT))
        d_query = _plus(d_query, _terms(tl.load(d_zq1 + j + hidden), SPLIT), weight_turned)
        d_z1_terms = _terms(tl.load(d_z1 + j + hidden), SPLIT)
        d_key = _plus(d_key, d_z1_terms, weight_turned)
        products = _plus(products, d_z1_terms, _flip(_terms(s1, SPLIT)))
    products = tl.where(_before(M, K), products, 0.0)
    d_scale = -tl.sum(tl.sum(products * tl.load(keys_keys + square), 1), 0)
    t = tl.arange(0, K)
    _add_to(d_token_scale + row * K + t, tl.where(t == K - 1, d_scale, 0.0))
    products = _terms(-tl.load(token_scale + K - 1) * (products + tl.trans(products)), SPLIT)
    steps = _terms(-_read_scale(token_scale, M, K) * tl.load(d_zq1_s1 + square), SPLIT)
    key_terms = _terms(_frames(k + here * F, frames, real), SPLIT)
    d_query = _plus(d_query, steps, key_terms)
    d_query += _frames(d_out + here * F, frames, real).to(tl.float32)
    tl.store(d_q + here * F + frames, d_query.to(d_q.dtype.element_ty), mask=real[:, None])
    d_key = _plus(d_key, products, key_terms)
    query_terms = _terms(_frames(q + here * F, frames, real), SPLIT)
    d_key = _plus(d_key, _flip(steps), query_terms) - tl.load(d_target + row * M * F + frames)
    tl.store(d_k + here * F + frames, d_key.to(d_k.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=COUNTS)
def mlp_back_weights(
    q, k, d_w1, d_b1, d_w2, d_b2, kept_zq1,
    s2, d_zq2, x2, d_zq1, d_u, d_z1, d_z2,
    num_batches, first, last, start,
    K: tl.constexpr, F: tl.constexpr, D: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """The gradients to a tile of the weights, from those of the block's end to those of its start."""
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE
    m, f, h = tl.arange(0, M), tl.arange(0, F), tl.arange(0, TILE)
    frames, hidden = m[:, None] * F + f[None, :], j + m[:, None] * D + h[None, :]
    here = (row * num_batches + start) * K
    there = _place(row, first, last, start, M, K) * D + hidden
    hidden += row * M * D
    real = m < (last - start) * K
    rows1 = row * F * D + j + f[:, None] * D + h[None, :]
    rows2 = row * F * D + (j + h[:, None]) * F + f[None, :]
    given, read = tl.load(d_z1 + hidden), tl.load(d_zq1 + hidden)
    key_turned = _flip(_terms(_frames(k + here * F, frames, real), SPLIT))
    d_weight = _plus(tl.load(d_w1 + rows1), key_turned, _terms(given, SPLIT))
    query_turned = _flip(_terms(_frames(q + here * F, frames, real), SPLIT))
    tl.store(d_w1 + rows1, _plus(d_weight, query_turned, _terms(read, SPLIT)))
    _add_to(d_b1 + row * D + j + h, tl.sum(given + read, 0))
    frames += row * M * F
    given, read = tl.load(d_z2 + frames), tl.load(d_zq2 + frames)
    x2_turned = _flip(_terms(tl.load(x2 + hidden), SPLIT))
    d_weight = _plus(tl.load(d_w2 + rows2), x2_turned, _terms(given, SPLIT))
    zq = tl.load(kept_zq1 + there)
    xq2_turned = _flip(_terms(zq * _gate(zq), SPLIT))
    d_weight = _plus(d_weight, xq2_turned, _terms(read, SPLIT))
    d_u_turned = _flip(_terms(tl.load(d_u + hidden), SPLIT))
    d_weight = _plus(d_weight, d_u_turned, _terms(tl.load(s2 + frames), SPLIT))
    tl.store(d_w2 + rows2, d_weight)
    if j == 0:
        _add_to(d_b2 + row * F + f, tl.sum(given + read, 0))
