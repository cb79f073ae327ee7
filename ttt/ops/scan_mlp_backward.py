"""The backward kernel of TTT-MLP; `ttt.ops.scan_kernels` says how to read it.

The weights and their gradients, 1 MB a program, go through the registers in tiles of hidden units,
and this is what takes time. Of a mini-batch only d_z2 needs all tiles at once. So there are two
passes over them: one for all that d_z2 is made of, and one for all that it goes into.
"""

import triton
import triton.language as tl

from ttt.ops.scan_kernels import (
    COUNTS,
    _add_to,
    _gelu,
    _gelu_curvature,
    _gelu_slope,
    _gradient,
    _gradient_backward,
    _normed,
    _project,
    _steps,
)


@triton.jit
def _terms(x, mask, SPLIT: tl.constexpr):
    """What X is multiplied as: its terms; see `ttt.ops.scan.SPLIT_TYPES`.

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
def _put(pointer, offsets, x, mask, SIZE: tl.constexpr, SPLIT: tl.constexpr):
    """The terms of a factor of all tiles, into the place of `SIZE` floats."""
    if SPLIT:
        pointer = pointer.to(tl.pointer_type(tl.bfloat16), bitcast=True)
    terms = _terms(x, mask, SPLIT)
    tl.store(pointer + offsets, terms[0])
    if SPLIT:
        tl.store(pointer + SIZE + offsets, terms[1])


@triton.jit
def _get(pointer, offsets, SIZE: tl.constexpr, SPLIT: tl.constexpr):
    """What `_put` has put there."""
    if SPLIT:
        pointer = pointer.to(tl.pointer_type(tl.bfloat16), bitcast=True)
        return tl.load(pointer + offsets), tl.load(pointer + SIZE + offsets)
    else:
        return (tl.load(pointer + offsets),)


@triton.jit
def _prefetch(pointers):
    """The lines of 128 bytes at `pointers`, into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def mlp_backward(
    q, k, v, eta, token_scale, norm_weight, norm_bias, w1, b1, w2, b2, scratch,
    kept_z1, kept_zq1, kept_u, kept_z2, kept_zq2, kept_products2,
    d_out, d_q, d_k, d_v, d_eta, d_token_scale, d_norm_weight, d_norm_bias,
    d_w1, d_b1, d_w2, d_b2,
    num_heads, num_batches, num_writes, first, last, num_units,
    EPS: tl.constexpr, K: tl.constexpr, F: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """w1 and d_w1 are transposed, so that a tile of theirs is in one piece. Each tile of weights is
    loaded where it is needed, and its terms go to shared memory at once: all together would fill
    the registers."""
    row = tl.program_id(0).to(tl.int64)
    mask = tl.where(num_units > 0, -65536, 0)
    t, f, h = tl.arange(0, K), tl.arange(0, F), tl.arange(0, TILE)
    frames, square = t[:, None] * F + f[None, :], t[:, None] * K + t[None, :]
    units = t[:, None] * D + h[None, :]
    tile = row * F * D + h[:, None] * F + f[None, :]
    lines = row * F * D + tl.arange(0, TILE * F // 32) * 32
    own = scratch + row * K * (5 * D + 2 * F)
    own_d_zq1, own_d_s1 = own + units, own + K * D + units
    own_s2, own_d_zq2 = own + 2 * K * D, own + 2 * K * D + K * F
    own_d_z2 = own_d_zq2 + K * F
    norm_w = tl.load(norm_weight + row % num_heads * F + f)
    norm_b = tl.load(norm_bias + row % num_heads * F + f)
    scale, causal, write_scale = _steps(token_scale, K)
    d_bias2 = tl.load(d_b2 + row * F + f)
    d_norm_w, d_norm_b = tl.zeros((F,), tl.float32), tl.zeros((F,), tl.float32)
    d_scale = tl.zeros((K,), tl.float32)
    squares = tl.zeros((K, K), tl.float32)
    narrow, wide = tl.zeros((K, TILE), tl.float32), tl.zeros((K, F), tl.float32)
    whole = tl.zeros((TILE, F), tl.float32)
    for i in range(0, last - first):
        n = last - 1 - i
        here = (row * num_batches + n) * K
        there = (row * (last - first) + n - first) * K
        z1, zq1 = kept_z1 + there * D + units, kept_zq1 + there * D + units
        back1 = kept_u + there * D + units
        written = tl.where(n < num_writes, write_scale, 0.0)
        # What the second layer gave to read, and what it wrote.
        d_found = tl.load(d_out + here * F + frames).to(tl.float32)
        normed, rstd = _normed(tl.load(kept_zq2 + there * F + frames), EPS, F)
        d_norm_w += tl.sum(d_found * normed, 0)
        d_norm_b += tl.sum(d_found, 0)
        d_zq2 = rstd * _project(d_found * norm_w[None, :], normed, F)
        _put(own_d_zq2, frames, d_zq2, mask, K * F, SPLIT)
        d_bias2_read = tl.sum(d_zq2, 0)
        query, key = tl.load(q + here * F + frames), tl.load(k + here * F + frames)
        target = tl.load(v + here * F + frames).to(tl.float32) - key.to(tl.float32)
        s2 = _gradient(tl.load(kept_z2 + there * F + frames), target, norm_w, norm_b, EPS, F)
        s2 *= tl.load(eta + here + t)[:, None]
        _put(own_s2, frames, s2, mask, K * F, SPLIT)
        products1 = 1 + _plus(squares, _terms(query, mask, SPLIT), _flip(_terms(key, mask, SPLIT)))
        steps1 = products1 * scale
        products2 = tl.load(kept_products2 + there * K + square)
        d_zq2_terms = _terms(d_zq2, mask, SPLIT)
        d_steps2 = -_plus(squares, d_zq2_terms, _flip(_terms(s2, mask, SPLIT)))
        d_products2 = d_steps2 * scale
        # The second layer's errors were read and written, and handed back.
        d_s2 = _plus(wide, _flip(_terms(-products2 * scale, mask, SPLIT)), d_zq2_terms)
        d_s2 -= written * d_bias2[None, :]
        d_written = -tl.sum(tl.sum(s2, 0) * d_bias2, 0)
        # Summed over tiles: −d_steps1, and of −d_written each unit's part.
        steps_sum, written_sum = squares, narrow
        tl.debug_barrier()
        for j in range(0, num_units, TILE):
            if SPLIT:
                ahead = (j + TILE) % num_units
                _prefetch(d_w1 + lines + ahead * F)
                _prefetch(d_w2 + lines + ahead * F)
                _prefetch(w2 + lines + ahead * F)
            z, u, zq = tl.load(z1 + j), tl.load(back1 + j), tl.load(zq1 + j)
            d_bias1 = tl.load(d_b1 + row * D + j + h)
            # The weights of this mini-batch's start, from those of its end.
            weight2 = tl.load(w2 + tile + j * F)
            s2_terms = _get(own_s2, frames, K * F, SPLIT)
            write2_terms = _terms(-written * _gelu(z), mask, SPLIT)
            weight2 -= _plus(whole, _flip(write2_terms), s2_terms)
            tl.store(w2 + tile + j * F, weight2)
            weight2_terms = _terms(weight2, mask, SPLIT)
            d_xq2 = _plus(narrow, _terms(d_products2, mask, SPLIT), _terms(_gelu(z), mask, SPLIT))
            d_zq2_all = _get(own_d_zq2, frames, K * F, SPLIT)
            d_xq2 = _plus(d_xq2, d_zq2_all, _flip(weight2_terms))
            d_weight1 = tl.load(d_w1 + tile + j * F)
            d_zq1 = _gelu_slope(zq) * d_xq2
            tl.store(own_d_zq1 + j, d_zq1)
            # What the first layer gave to read, and wrote.
            d_zq1_terms = _terms(d_zq1, mask, SPLIT)
            s1 = _gelu_slope(z) * u
            d_weight2 = tl.load(d_w2 + tile + j * F)
            steps_sum = _plus(steps_sum, d_zq1_terms, _flip(_terms(s1, mask, SPLIT)))
            key_terms = _terms(tl.load(k + here * F + frames), mask, SPLIT)
            taken = _plus(narrow, key_terms, _flip(_terms(d_weight1, mask, SPLIT)))
            taken += d_bias1[None, :]
            written_sum += s1 * taken
            d_s1 = _plus(narrow, _flip(_terms(-steps1, mask, SPLIT)), d_zq1_terms)
            d_s1 -= written * taken
            tl.store(own_d_s1 + j, d_s1)
            d_s2 = _plus(d_s2, _terms(_gelu_slope(z) * d_s1, mask, SPLIT), weight2_terms)
            d_s2 = _plus(d_s2, write2_terms, _terms(d_weight2, mask, SPLIT))
        d_scale += tl.sum(causal * (d_steps2 * products2 - steps_sum * products1), 1)
        d_products1 = -steps_sum * scale
        key = tl.load(k + here * F + frames)
        target = tl.load(v + here * F + frames).to(tl.float32) - key.to(tl.float32)
        z2, rate = tl.load(kept_z2 + there * F + frames), tl.load(eta + here + t)
        g = _gradient(z2, target, norm_w, norm_b, EPS, F)
        tl.store(d_eta + here + t, tl.sum(d_s2 * g, 1))
        d_z2, d_target, d_nw, d_nb = _gradient_backward(
            rate[:, None] * d_s2, z2, target, norm_w, norm_b, EPS, F
        )
        d_norm_w += d_nw
        d_norm_b += d_nb
        d_bias2 += d_bias2_read + tl.sum(d_z2, 0)
        _put(own_d_z2, frames, d_z2, mask, K * F, SPLIT)
        tl.store(d_v + here * F + frames, d_target.to(d_v.dtype.element_ty))
        d_query, d_key = wide, -d_target
        tl.debug_barrier()
        for j in range(0, num_units, TILE):
            if SPLIT:
                ahead = (j + TILE) % num_units
                _prefetch(w2 + lines + ahead * F)
                _prefetch(d_w2 + lines + ahead * F)
                _prefetch(w1 + lines + ahead * F)
                _prefetch(d_w1 + lines + ahead * F)
            z, u, zq = tl.load(z1 + j), tl.load(back1 + j), tl.load(zq1 + j)
            d_s1, d_zq1 = tl.load(own_d_s1 + j), tl.load(own_d_zq1 + j)
            d_bias1 = tl.load(d_b1 + row * D + j + h)
            x2, slope = _gelu(z), _gelu_slope(z)
            xq2_terms = _terms(_gelu(zq), mask, SPLIT)
            weight2 = tl.load(w2 + tile + j * F)
            s2_terms = _get(own_s2, frames, K * F, SPLIT)
            d_z2_terms = _get(own_d_z2, frames, K * F, SPLIT)
            d_x2 = _plus(narrow, _flip(_terms(d_products2, mask, SPLIT)), xq2_terms)
            d_x2 = _plus(d_x2, d_z2_terms, _flip(_terms(weight2, mask, SPLIT)))
            d_weight2 = tl.load(d_w2 + tile + j * F)
            taken = _plus(narrow, s2_terms, _flip(_terms(d_weight2, mask, SPLIT)))
            written_sum += x2 * taken
            d_x2 -= written * taken
            d_zq2_all = _get(own_d_zq2, frames, K * F, SPLIT)
            change = _plus(whole, _flip(_terms(x2, mask, SPLIT)), d_z2_terms)
            change = _plus(change, _flip(xq2_terms), d_zq2_all)
            change = _plus(change, _flip(_terms(slope * d_s1, mask, SPLIT)), s2_terms)
            tl.store(d_w2 + tile + j * F, d_weight2 + change)
            d_z1 = _gelu_curvature(z) * u * d_s1 + slope * d_x2
            tl.store(d_b1 + row * D + j + h, d_bias1 + tl.sum(d_z1 + d_zq1, 0))
            d_z1_terms, d_zq1_terms = _terms(d_z1, mask, SPLIT), _terms(d_zq1, mask, SPLIT)
            key_terms = _terms(tl.load(k + here * F + frames), mask, SPLIT)
            weight1 = tl.load(w1 + tile + j * F)
            write1_terms = _terms(-written * slope * u, mask, SPLIT)
            weight1 -= _plus(whole, _flip(write1_terms), key_terms)
            tl.store(w1 + tile + j * F, weight1)
            weight1_terms = _terms(weight1, mask, SPLIT)
            d_query = _plus(d_query, d_zq1_terms, weight1_terms)
            d_key = _plus(d_key, d_z1_terms, weight1_terms)
            d_weight1 = tl.load(d_w1 + tile + j * F)
            d_key = _plus(d_key, write1_terms, _terms(d_weight1, mask, SPLIT))
            query_terms = _terms(tl.load(q + here * F + frames), mask, SPLIT)
            change = _plus(whole, _flip(d_z1_terms), key_terms)
            change = _plus(change, _flip(d_zq1_terms), query_terms)
            tl.store(d_w1 + tile + j * F, d_weight1 + change)
        d_written -= tl.sum(tl.sum(written_sum, 1), 0)
        d_scale += tl.where((t == K - 1) & (n < num_writes), d_written, 0.0)
        query, key = tl.load(q + here * F + frames), tl.load(k + here * F + frames)
        d_query = _plus(d_query, _terms(d_products1, mask, SPLIT), _terms(key, mask, SPLIT))
        d_query += tl.load(d_out + here * F + frames).to(tl.float32)
        tl.store(d_q + here * F + frames, d_query.to(d_q.dtype.element_ty))
        d_key = _plus(d_key, _flip(_terms(d_products1, mask, SPLIT)), _terms(query, mask, SPLIT))
        tl.store(d_k + here * F + frames, d_key.to(d_k.dtype.element_ty))
        tl.debug_barrier()
    tl.store(d_b2 + row * F + f, d_bias2)
    _add_to(d_norm_weight + row * F + f, d_norm_w)
    _add_to(d_norm_bias + row * F + f, d_norm_b)
    _add_to(d_token_scale + row * K + t, d_scale)
