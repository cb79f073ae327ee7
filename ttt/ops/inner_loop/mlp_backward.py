"""The backward kernel of TTT-MLP, where each warp has columns of its own of the head's width, as in
`ttt.ops.inner_loop.kernels.mlp_forward`, which says what that is good for.

Two passes over tiles of hidden units: one for all that d_z2 is made of, and one for all that it
goes into. In each the warps meet once a tile, to add what they have for hidden units. The first
leaves to the second what it knows of them: of the second layer's input all but d_z2's part.
"""

import triton
import triton.language as tl

from ttt.ops.inner_loop.kernels import (
    COUNTS,
    _add_three,
    _add_to,
    _add_two,
    _all,
    _gate,
    _gradient,
    _gradient_backward,
    _line,
    _normed,
    _project,
    _steps,
    _swap,
    _tile,
    _turned_term,
)


@triton.jit
def _terms(x, mask, SPLIT: tl.constexpr):
    """Return what X is multiplied as: its terms; see `ttt.ops.inner_loop.scan_triton.SPLIT_TYPES`.

    Args:
        mask: -65536, but not as a constant: of what comes from loads and constants alone, Triton
            makes a copy for every product, in that product's layout."""
    if not SPLIT:
        return (x.to(tl.float32),)
    elif x.dtype == tl.bfloat16:
        return (x,)
    else:
        x = x.to(tl.float32)
        bits = x.to(tl.int32, bitcast=True) & mask
        low = x - bits.to(tl.float32, bitcast=True)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), low.to(tl.bfloat16)


@triton.jit
def _flip(x):
    """Xᵀ of each part, of terms; as a right factor it is in the threads that have X."""
    if len(x) == 1:
        return (_swap(x[0]),)
    else:
        return _swap(x[0]), _swap(x[1])


@triton.jit
def _plus(total, x, y):
    """total + X Y in float32, of terms."""
    if len(y) == 2:
        total = tl.dot(x[0], y[1], total)
    if len(x) == 2:
        total = tl.dot(x[1], y[0], total)
    return tl.dot(x[0], y[0], total, input_precision="tf32x3")


@triton.jit
def _turned(x, SPLIT: tl.constexpr):
    """Xᵀ of each part, of terms. X must come from `_tile` or a product."""
    if not SPLIT:
        return (_swap(x[0]),)
    else:
        return _turned_term(x[0]), _turned_term(x[1])


@triton.jit
def _hidden(z1, zq1, back1, own_x2, own_xq2, own_s1, own_slope, own_read_slope, own_bend):
    """Return what a tile needs that takes no product, each thread for itself: of a tile's numbers
    all parts have all."""
    z, zq, u = tl.load(z1), tl.load(zq1), tl.load(back1)
    gate = _gate(z)
    inner = 1.5957691216057308 + 0.2140644488 * z * z
    x2, rest = z * gate, 1 - gate
    slope = gate + x2 * rest * inner
    bend = 2 * inner + z * (0.4281288976 * z + (rest - gate) * inner * inner)
    tl.store(own_x2, x2)
    tl.store(own_slope, slope)
    tl.store(own_s1, slope * u)
    tl.store(own_bend, gate * rest * bend * u)
    gate = _gate(zq)
    xq2 = zq * gate
    slope = gate + xq2 * (1 - gate) * (1.5957691216057308 + 0.2140644488 * zq * zq)
    tl.store(own_xq2, xq2)
    tl.store(own_read_slope, slope)


@triton.jit(do_not_specialize=COUNTS)
def mlp_backward(
    q, k, v, eta, token_scale, norm_weight, norm_bias, w1, b1, w2, b2, scratch,
    kept_z1, kept_zq1, kept_u, kept_z2, kept_zq2, kept_products2,
    d_out, d_q, d_k, d_v, d_eta, d_token_scale, d_norm_weight, d_norm_bias,
    d_w1, d_b1, d_w2, d_b2,
    num_heads, num_batches, num_writes, first, last, num_units,
    EPS: tl.constexpr, K: tl.constexpr, F: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The weights and their gradients are in the order of `scan_triton.in_lines`; what was kept of
    hidden units is in that of `_line`."""
    C: tl.constexpr = F // PARTS
    row = tl.program_id(0).to(tl.int64)
    mask = tl.where(num_units > 0, -65536, 0)
    t, f, h = tl.arange(0, K), tl.arange(0, F), tl.arange(0, TILE)
    p, c = tl.arange(0, PARTS)[:, None, None], tl.arange(0, C)[None, None, :]
    frames, parts = t[:, None] * F + f[None, :], p * C + t[None, :, None] * F + c
    square = t[:, None] * K + t[None, :]
    line = row * F * D + tl.arange(0, TILE * F)
    # The order of units in a product.
    units = (
        row * D + p * 0 + (h // 16 * 16 + h // 2 % 4 * 4 + h // 8 % 2 * 2 + h % 2)[None, None, :]
    )
    # Of each frame and hidden unit, the same for all parts.
    i = tl.arange(0, PARTS * K * TILE)
    shared, own_line = (
        i // (128 * PARTS) * 128 + i % 128,
        i // (128 * PARTS) % PARTS == i // 128 % PARTS,
    )
    # And without any order.
    flat = tl.arange(0, K * TILE)
    own = scratch + row * K * (9 * D + 5 * F)
    own_x2, own_xq2, own_s1 = own, own + K * D, own + 2 * K * D
    own_slope, own_back = own + 3 * K * D, own + 4 * K * D
    own_d_zq1, own_d_z1 = own + 5 * K * D, own + 6 * K * D
    # Of two tiles, in turn.
    own_read_slope, own_bend = own + 7 * K * D, own + 8 * K * D
    own_s2, own_d_zq2 = own + 9 * K * D, own + 9 * K * D + K * F
    own_d_s2, own_d_z2 = own_d_zq2 + K * F, own_d_zq2 + 2 * K * F
    own_d_target = own_d_zq2 + 3 * K * F
    norm_w = tl.load(norm_weight + row % num_heads * F + f)
    norm_b = tl.load(norm_bias + row % num_heads * F + f)
    scale, causal, write_scale = _steps(token_scale, K)
    d_bias2 = tl.load(d_b2 + row * F + f)
    d_norm_w, d_norm_b = tl.zeros((F,), tl.float32), tl.zeros((F,), tl.float32)
    d_scale = tl.zeros((K,), tl.float32)
    nothing = tl.zeros((PARTS, K, K), tl.float32)
    narrow = tl.zeros((PARTS, K, TILE), tl.float32)
    wide = tl.zeros((PARTS, K, C), tl.float32)
    whole = tl.zeros((PARTS, TILE, C), tl.float32)
    for step in range(0, last - first):
        n = last - 1 - step
        here = (row * num_batches + n) * K
        there = (row * (last - first) + n - first) * K
        written = tl.where(n < num_writes, write_scale, 0.0)
        # What the second layer gave to read, and what it wrote.
        d_found = tl.load(d_out + here * F + frames).to(tl.float32)
        normed, rstd = _normed(tl.load(kept_zq2 + there * F + frames), EPS, F)
        d_norm_w += tl.sum(d_found * normed, 0)
        d_norm_b += tl.sum(d_found, 0)
        d_zq2 = rstd * _project(d_found * norm_w[None, :], normed, F)
        tl.store(own_d_zq2 + frames, d_zq2)
        d_bias2_read = tl.sum(d_zq2, 0)
        target = tl.load(v + here * F + frames).to(tl.float32)
        target -= tl.load(k + here * F + frames).to(tl.float32)
        s2 = _gradient(tl.load(kept_z2 + there * F + frames), target, norm_w, norm_b, EPS, F)
        s2 *= tl.load(eta + here + t)[:, None]
        tl.store(own_s2 + frames, s2)
        d_written = -tl.sum(tl.sum(s2, 0) * d_bias2, 0)
        _hidden(
            kept_z1 + there * D + flat, kept_zq1 + there * D + flat, kept_u + there * D + flat,
            own_x2 + flat, own_xq2 + flat, own_s1 + flat, own_slope + flat,
            own_read_slope + flat, own_bend + flat,
        )  # fmt: skip
        tl.debug_barrier()
        s2, d_zq2 = tl.load(own_s2 + parts), tl.load(own_d_zq2 + parts)
        query, key = tl.load(q + here * F + parts), tl.load(k + here * F + parts)
        s2_terms, d_zq2_terms = _terms(s2, mask, SPLIT), _terms(d_zq2, mask, SPLIT)
        query_terms, key_terms = _terms(query, mask, SPLIT), _terms(key, mask, SPLIT)
        written_s2_terms = _terms(written * s2, mask, SPLIT)
        products1 = _plus(nothing, query_terms, _flip(key_terms))
        d_steps2 = _plus(nothing, d_zq2_terms, _flip(s2_terms))
        products1, d_steps2 = tl.reduce((products1, d_steps2), 0, _add_two)
        products1, d_steps2 = products1 + 1, -d_steps2
        products2 = tl.load(kept_products2 + there * K + square)
        d_products2 = d_steps2 * scale
        read1 = _terms(_all(tl.trans(-products1 * scale), PARTS), mask, SPLIT)
        read2 = _terms(_all(tl.trans(-products2 * scale), PARTS), mask, SPLIT)
        d_read2 = _terms(_all(d_products2 * (1 / PARTS), PARTS), mask, SPLIT)
        d_read2_turned = _terms(_all(tl.trans(d_products2), PARTS), mask, SPLIT)
        # The second layer's errors were read and written, and handed back.
        d_s2 = _plus(wide, read2, d_zq2_terms)
        # Summed over tiles: −d_steps1, and of −d_written each unit's part.
        steps_sum, written_sum = nothing, narrow
        for j in range(0, num_units, TILE):
            weight2 = _tile(tl.load(w2 + line + j * F), PARTS, TILE, C)
            d_weight1 = _tile(tl.load(d_w1 + line + j * F), PARTS, TILE, C)
            d_weight2 = _tile(tl.load(d_w2 + line + j * F), PARTS, TILE, C)
            x2 = _tile(tl.load(own_x2 + j * K + shared), PARTS, K, TILE)
            xq2 = _tile(tl.load(own_xq2 + j * K + shared), PARTS, K, TILE)
            s1 = _tile(tl.load(own_s1 + j * K + shared), PARTS, K, TILE)
            slope = _tile(tl.load(own_slope + j * K + shared), PARTS, K, TILE)
            turn = j // TILE % 2 * K * TILE
            read_slope = _tile(tl.load(own_read_slope + turn + shared), PARTS, K, TILE)
            bend = _tile(tl.load(own_bend + turn + shared), PARTS, K, TILE)
            d_bias1 = tl.load(d_b1 + units + j)
            # Of the next tile; of the last one again.
            after = tl.minimum(j + TILE, num_units - TILE) * K + flat
            later, turn = there * D + after, K * TILE - turn + flat
            _hidden(
                kept_z1 + later, kept_zq1 + later, kept_u + later,
                own_x2 + after, own_xq2 + after, own_s1 + after, own_slope + after,
                own_read_slope + turn, own_bend + turn,
            )  # fmt: skip
            # The weights of this mini-batch's start, from those of its end.
            x2_turned = _turned(_terms(x2, mask, SPLIT), SPLIT)
            weight2 = _plus(weight2, x2_turned, written_s2_terms)
            tl.store(w2 + line + j * F, _line(weight2, PARTS, TILE, C))
            weight2_terms = _terms(weight2, mask, SPLIT)
            d_weight2_terms = _terms(d_weight2, mask, SPLIT)
            # By each part: sums below.
            d_xq2 = _plus(narrow, d_read2, _flip(x2_turned))
            d_xq2 = _plus(d_xq2, d_zq2_terms, _flip(weight2_terms))
            taken = tl.broadcast_to(d_bias1 * (1 / PARTS), (PARTS, K, TILE))
            taken = _plus(taken, key_terms, _flip(_terms(d_weight1, mask, SPLIT)))
            taken2 = _plus(narrow, s2_terms, _flip(d_weight2_terms))
            d_xq2, taken, taken2 = tl.reduce((d_xq2, taken, taken2), 0, _add_three)
            # What is stored before this, all warps can load.
            tl.debug_barrier()
            d_xq2, taken, taken2 = _all(d_xq2, PARTS), _all(taken, PARTS), _all(taken2, PARTS)
            d_zq1 = read_slope * d_xq2
            d_zq1_terms = _terms(d_zq1, mask, SPLIT)
            written_sum += s1 * taken + x2 * taken2
            steps_sum = _plus(steps_sum, d_zq1_terms, _flip(_terms(s1, mask, SPLIT)))
            d_s1 = _plus(-written * taken, read1, _flip(_turned(d_zq1_terms, SPLIT)))
            xq2_turned = _turned(_terms(xq2, mask, SPLIT), SPLIT)
            d_x2 = _plus(-written * taken2, d_read2_turned, _flip(xq2_turned))
            back = slope * d_s1
            tl.store(own_back + j * K + shared, _line(back, PARTS, K, TILE), mask=own_line)
            tl.store(own_d_zq1 + j * K + shared, _line(d_zq1, PARTS, K, TILE), mask=own_line)
            # But for what d_z2 adds to d_x2.
            d_z1 = bend * d_s1 + slope * d_x2
            tl.store(own_d_z1 + j * K + shared, _line(d_z1, PARTS, K, TILE), mask=own_line)
            back_terms = _terms(back, mask, SPLIT)
            d_s2 = _plus(d_s2, back_terms, _flip(_turned(weight2_terms, SPLIT)))
            write2_terms = _terms(-written * x2, mask, SPLIT)
            d_s2 = _plus(d_s2, write2_terms, _flip(_turned(d_weight2_terms, SPLIT)))
        tl.store(own_d_s2 + parts, d_s2)
        # All parts have the same sums.
        d_written -= tl.sum(tl.sum(tl.sum(written_sum, 0), 1), 0) / PARTS
        steps_sum = tl.sum(steps_sum, 0) / PARTS
        d_scale += tl.sum(causal * (d_steps2 * products2 - steps_sum * products1), 1)
        d_scale += tl.where((t == K - 1) & (n < num_writes), d_written, 0.0)
        d_products1 = -steps_sum * scale
        tl.debug_barrier()
        d_s2 = tl.load(own_d_s2 + frames) - written * d_bias2[None, :]
        target = tl.load(v + here * F + frames).to(tl.float32)
        target -= tl.load(k + here * F + frames).to(tl.float32)
        z2, rate = tl.load(kept_z2 + there * F + frames), tl.load(eta + here + t)
        g = _gradient(z2, target, norm_w, norm_b, EPS, F)
        tl.store(d_eta + here + t, tl.sum(d_s2 * g, 1))
        d_z2, d_target, d_nw, d_nb = _gradient_backward(
            rate[:, None] * d_s2, z2, target, norm_w, norm_b, EPS, F
        )
        d_norm_w += d_nw
        d_norm_b += d_nb
        d_bias2 += d_bias2_read + tl.sum(d_z2, 0)
        tl.store(d_v + here * F + frames, d_target.to(d_v.dtype.element_ty))
        tl.store(own_d_z2 + frames, d_z2)
        tl.store(own_d_target + frames, d_target)
        tl.debug_barrier()
        s2_terms = _terms(tl.load(own_s2 + parts), mask, SPLIT)
        d_zq2_terms = _terms(tl.load(own_d_zq2 + parts), mask, SPLIT)
        d_z2_terms = _terms(tl.load(own_d_z2 + parts), mask, SPLIT)
        query_terms = _terms(tl.load(q + here * F + parts), mask, SPLIT)
        key_terms = _terms(tl.load(k + here * F + parts), mask, SPLIT)
        d_query, d_key = wide, wide
        # From the end: what the first pass came to last may still be in the cache.
        for back_j in range(0, num_units, TILE):
            j = num_units - TILE - back_j
            weight2 = _tile(tl.load(w2 + line + j * F), PARTS, TILE, C)
            weight1 = _tile(tl.load(w1 + line + j * F), PARTS, TILE, C)
            d_weight2 = _tile(tl.load(d_w2 + line + j * F), PARTS, TILE, C)
            d_weight1 = _tile(tl.load(d_w1 + line + j * F), PARTS, TILE, C)
            x2 = _tile(tl.load(own_x2 + j * K + shared), PARTS, K, TILE)
            xq2 = _tile(tl.load(own_xq2 + j * K + shared), PARTS, K, TILE)
            s1 = _tile(tl.load(own_s1 + j * K + shared), PARTS, K, TILE)
            slope = _tile(tl.load(own_slope + j * K + shared), PARTS, K, TILE)
            back = _tile(tl.load(own_back + j * K + shared), PARTS, K, TILE)
            d_zq1 = _tile(tl.load(own_d_zq1 + j * K + shared), PARTS, K, TILE)
            d_z1 = _tile(tl.load(own_d_z1 + j * K + shared), PARTS, K, TILE)
            # Only one part's to change.
            d_bias1 = tl.load(d_b1 + units + j, mask=p == 0, other=0.0)
            d_x2 = _plus(narrow, d_z2_terms, _flip(_terms(weight2, mask, SPLIT)))
            d_x2 = _all(tl.sum(d_x2, 0), PARTS)
            d_weight2 = _plus(d_weight2, _turned(_terms(x2, mask, SPLIT), SPLIT), d_z2_terms)
            d_weight2 = _plus(d_weight2, _turned(_terms(xq2, mask, SPLIT), SPLIT), d_zq2_terms)
            d_weight2 = _plus(d_weight2, _turned(_terms(back, mask, SPLIT), SPLIT), s2_terms)
            tl.store(d_w2 + line + j * F, _line(d_weight2, PARTS, TILE, C))
            write1_terms = _terms(-written * s1, mask, SPLIT)
            weight1 -= _plus(whole, _turned(write1_terms, SPLIT), key_terms)
            tl.store(w1 + line + j * F, _line(weight1, PARTS, TILE, C))
            weight1_turned = _flip(_turned(_terms(weight1, mask, SPLIT), SPLIT))
            d_zq1_terms = _terms(d_zq1, mask, SPLIT)
            d_query = _plus(d_query, d_zq1_terms, weight1_turned)
            d_weight1_turned = _flip(_turned(_terms(d_weight1, mask, SPLIT), SPLIT))
            d_key = _plus(d_key, write1_terms, d_weight1_turned)
            d_weight1 = _plus(d_weight1, _turned(d_zq1_terms, SPLIT), query_terms)
            d_z1 += slope * d_x2
            d_bias1 += tl.sum(d_z1 + d_zq1, 1, keep_dims=True)
            tl.store(d_b1 + units + j, d_bias1, mask=p == 0)
            d_z1_terms = _terms(d_z1, mask, SPLIT)
            d_key = _plus(d_key, d_z1_terms, weight1_turned)
            d_weight1 = _plus(d_weight1, _turned(d_z1_terms, SPLIT), key_terms)
            tl.store(d_w1 + line + j * F, _line(d_weight1, PARTS, TILE, C))
        d_query = _plus(d_query, _terms(_all(d_products1, PARTS), mask, SPLIT), key_terms)
        d_query += tl.load(d_out + here * F + parts).to(tl.float32)
        tl.store(d_q + here * F + parts, d_query.to(d_q.dtype.element_ty))
        d_products1 = _all(tl.trans(d_products1), PARTS)
        d_key = _plus(d_key, _terms(d_products1, mask, SPLIT), query_terms)
        d_key -= tl.load(own_d_target + parts)
        tl.store(d_k + here * F + parts, d_key.to(d_k.dtype.element_ty))
        tl.debug_barrier()
    tl.store(d_b2 + row * F + f, d_bias2)
    _add_to(d_norm_weight + row * F + f, d_norm_w)
    _add_to(d_norm_bias + row * F + f, d_norm_b)
    _add_to(d_token_scale + row * K + t, d_scale)
