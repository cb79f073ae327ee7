"""The Triton kernels of `scan_triton`, which says what they are for and names the shapes.

A program takes one head of one row through mini-batches `first` to `last - 1`, forwards or
backwards. All arithmetic is in float32. Names are those of `ttt_linear_mlp`: z what a layer gives
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
    """A B in float32; SPLIT: see `ttt.ops.inner_loop.scan_triton.SPLIT_TYPES`."""
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
    """Return what a layer norm scales, and 1 / standard deviation."""
    centered = z - _mean(z, F)
    rstd = tl.rsqrt(_mean(centered * centered, F) + EPS)
    return centered * rstd, rstd


@triton.jit
def _project(x, normed, F: tl.constexpr):
    """Return a vector without its mean and its part along `normed`: a layer norm's gradient, but
    for 1/std."""
    return x - _mean(x, F) - normed * _mean(x * normed, F)


@triton.jit
def _gradient(z, target, weight, bias, EPS: tl.constexpr, F: tl.constexpr):
    """∂/∂z of ½ ‖LN(z) − target‖²."""
    normed, rstd = _normed(z, EPS, F)
    missed = normed * weight[None, :] + bias[None, :] - target
    return rstd * _project(missed * weight[None, :], normed, F)


@triton.jit
def _gradient_backward(d_g, z, target, weight, bias, EPS: tl.constexpr, F: tl.constexpr):
    """Return the gradients of `_gradient` to z, target, weight, bias."""
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


# TTT-MLP, forwards. The fast weights are larger than a multiprocessor's memory, so they stream
# through, once a mini-batch: a tile of hidden units takes what mini-batch n writes, and at once
# gives its part of what n reads and of what n + 1 gives for its keys, to both of which the old
# weights and the steps since lead as well as the new ones do.
#
# Each warp has columns of its own of the head's width, PARTS of them, as the first dimension of all
# that is multiplied. Triton gives the warps that dimension, so they meet only where they add what
# they have for hidden units, once a tile. What is loaded and stored in the loop over tiles lies in
# memory in the order in which the threads hold a product, `_line`; any other order would go through
# shared memory, and all warps would wait for each other, twice for each tensor. -------------------


@triton.jit
def _add_dot(a, b, sum, SPLIT: tl.constexpr):
    """A B + sum; see `_dot`."""
    if not SPLIT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum, input_precision="tf32x3")
    elif a.dtype == tl.bfloat16 and b.dtype == tl.bfloat16:
        return tl.dot(a, b, sum)
    elif a.dtype == tl.bfloat16:
        b_high, b_low = _halves(b.to(tl.float32))
        return tl.dot(a, b_high, tl.dot(a, b_low, sum))
    elif b.dtype == tl.bfloat16:
        a_high, a_low = _halves(a.to(tl.float32))
        return tl.dot(a_high, b, tl.dot(a_low, b, sum))
    else:
        a_high, a_low = _halves(a.to(tl.float32))
        b_high, b_low = _halves(b.to(tl.float32))
        return tl.dot(a_high, b_high, tl.dot(a_high, b_low, tl.dot(a_low, b_high, sum)))


@triton.jit
def _tile(line, PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """[PARTS, M, N] of its numbers in the order of `_line`."""
    x = tl.reshape(line, (M // 16, N // 8, PARTS, 8, 4, 2, 2))
    return tl.reshape(tl.permute(x, (2, 0, 5, 3, 1, 4, 6)), (PARTS, M, N))


@triton.jit
def _line(x, PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """[PARTS · M · N] in the order in which threads hold a product's 16 x 8 pieces: of four numbers
    in turn, two neighbors of row g and the same two of row g + 8."""
    x = tl.reshape(x, (PARTS, M // 16, 2, 8, N // 8, 4, 2))
    return tl.reshape(tl.permute(x, (1, 4, 0, 3, 5, 2, 6)), (PARTS * M * N,))


@triton.jit
def _all(x, PARTS: tl.constexpr):
    """x [M, N] for all parts."""
    return tl.broadcast_to(x[None], (PARTS, x.shape[0], x.shape[1]))


@triton.jit
def _swap(x):
    return tl.permute(x, (0, 2, 1))


@triton.jit
def _turned_term(x):
    """Xᵀ of each part of what threads have in the order of `_line`, in that order again: pieces of
    8 x 8 are turned, each by one instruction, and change places."""
    x = tl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x],
        dtype=tl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip
    P: tl.constexpr = x.shape[0]
    M: tl.constexpr = x.shape[1]
    N: tl.constexpr = x.shape[2]
    x = tl.reshape(x, (P, M // 8, 8, N // 8, 8))
    return tl.reshape(tl.permute(x, (0, 3, 2, 1, 4)), (P, N, M))


@triton.jit
def _add_turned(a, b, sum, SPLIT: tl.constexpr):
    """Aᵀ B + sum."""
    if not SPLIT:
        return _add_dot(_swap(a), b, sum, SPLIT)
    else:
        a_high, a_low = _halves(a)
        a_high, a_low = _turned_term(a_high), _turned_term(a_low)
        if b.dtype == tl.bfloat16:
            return tl.dot(a_high, b, tl.dot(a_low, b, sum))
        else:
            b_high, b_low = _halves(b)
            return tl.dot(a_high, b_high, tl.dot(a_high, b_low, tl.dot(a_low, b_high, sum)))


@triton.jit
def _add_turning(a, b, sum, SPLIT: tl.constexpr):
    """A B + sum, B from a product or `_tile`."""
    if not SPLIT:
        return _add_dot(a, b, sum, SPLIT)
    else:
        b_high, b_low = _halves(b)
        b_high, b_low = _swap(_turned_term(b_high)), _swap(_turned_term(b_low))
        a_high, a_low = _halves(a)
        return tl.dot(a_high, b_high, tl.dot(a_high, b_low, tl.dot(a_low, b_high, sum)))


@triton.jit
def _add_two(a, b, x, y):
    return a + x, b + y


@triton.jit
def _add_three(a, b, c, x, y, z):
    return a + x, b + y, c + z


@triton.jit
def _gate(x):
    """Return what the tanh-GELU multiplies x by, by instructions that take no care of tiny
    numbers."""
    root = tl.rsqrt(1 + tl.exp2(x * (-2.302208198 - 0.1029432396 * x * x)))
    return root * root


@triton.jit(do_not_specialize=COUNTS)
def mlp_forward(
    q, k, v, eta, token_scale, norm_weight, norm_bias, w1, b1, w2, b2, out, scratch,
    kept_z1, kept_zq1, kept_u, kept_z2, kept_zq2, kept_products2,
    num_heads, num_batches, num_writes, first, last, num_units,
    EPS: tl.constexpr, KEEP: tl.constexpr, K: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """w1 and w2 are in the order of `scan_triton.in_lines`; the scratch begins with zeros."""
    C: tl.constexpr = F // PARTS
    row = tl.program_id(0).to(tl.int64)
    t, f, h = tl.arange(0, K), tl.arange(0, F), tl.arange(0, TILE)
    p, c = tl.arange(0, PARTS)[:, None, None], tl.arange(0, C)[None, None, :]
    frames, parts = t[:, None] * F + f[None, :], p * C + t[None, :, None] * F + c
    squares = p * 0 + t[None, :, None] * K + t[None, None, :]
    line = row * F * D + tl.arange(0, TILE * F)
    # The order of units in a product; that in memory is natural, with four of a thread together.
    units = (
        row * D + p * 0 + (h // 16 * 16 + h // 2 % 4 * 4 + h // 8 % 2 * 2 + h % 2)[None, None, :]
    )
    # Of each frame and hidden unit, the same for all parts.
    i = tl.arange(0, PARTS * K * TILE)
    shared, own_line = (
        i // (128 * PARTS) * 128 + i % 128,
        i // (128 * PARTS) % PARTS == i // 128 % PARTS,
    )
    own = scratch + row * K * (2 * D + 3 * F)
    own_x2, own_slope = own + shared, own + K * D + shared
    own_s2, own_zq2, own_z2 = own + 2 * K * D, own + 2 * K * D + K * F, own + 2 * K * D + 2 * K * F
    norm_w = tl.load(norm_weight + row % num_heads * F + f)
    norm_b = tl.load(norm_bias + row % num_heads * F + f)
    scale, _causal, write_scale = _steps(token_scale, K)
    bias2 = tl.load(b2 + row * F + f)
    tl.store(own_s2 + frames, tl.zeros((K, F), tl.float32))
    tl.debug_barrier()
    # Before the first mini-batch there is one that neither reads nor writes.
    for n in range(first - 1, last):
        real, more = n >= first, n + 1 < last
        here = (row * num_batches + tl.maximum(n, first)) * K
        after = (row * num_batches + tl.minimum(n + 1, last - 1)) * K
        there = (row * (last - first) + n - first) * K
        written = tl.where(real & (n < num_writes), write_scale, 0.0)
        query, key = tl.load(q + here * F + parts), tl.load(k + here * F + parts)
        next_key, s2 = tl.load(k + after * F + parts), tl.load(own_s2 + parts)
        nothing = tl.zeros((PARTS, K, K), tl.float32)
        steps1 = _add_dot(query, _swap(key), nothing, SPLIT)
        next_steps1 = _add_dot(next_key, _swap(key), nothing, SPLIT)
        steps1, next_steps1 = tl.reduce((steps1, next_steps1), 0, _add_two)
        steps1 = _all(-scale * (steps1 + 1), PARTS)
        next_steps1 = _all(-written * (next_steps1 + 1), PARTS)
        products2 = tl.zeros((PARTS, K, K), tl.float32) + 1
        zq2 = tl.zeros((PARTS, K, C), tl.float32)
        z2 = tl.zeros((PARTS, K, C), tl.float32)
        for j in range(0, num_units, TILE):
            weight2 = _tile(tl.load(w2 + line + j * F), PARTS, TILE, C)
            weight1 = _tile(tl.load(w1 + line + j * F), PARTS, TILE, C)
            x2 = _tile(tl.load(own_x2 + j * K), PARTS, K, TILE)
            slope = _tile(tl.load(own_slope + j * K), PARTS, K, TILE)
            bias1 = tl.load(b1 + units + j)
            # By each part: sums below.
            u = tl.zeros((PARTS, K, TILE), tl.float32)
            u = _add_dot(s2, _swap(weight2), u, SPLIT)
            share = tl.broadcast_to(bias1 * (1 / PARTS), (PARTS, K, TILE))
            zq1 = _add_dot(query, _swap(weight1), share, SPLIT)
            z1 = _add_dot(next_key, _swap(weight1), share, SPLIT)
            s1 = slope * u
            zq1 = _add_turning(steps1, s1, zq1, SPLIT)
            z1 = _add_turning(next_steps1, s1, z1, SPLIT)
            weight2 = _add_turned(x2, -written * s2, weight2, SPLIT)
            tl.store(w2 + line + j * F, _line(weight2, PARTS, TILE, C))
            u, zq1, z1 = tl.reduce((u, zq1, z1), 0, _add_three)
            # What is stored from here on, all warps have loaded.
            tl.debug_barrier()
            u, zq1, z1 = _all(u, PARTS), _all(zq1, PARTS), _all(z1, PARTS)
            s1 = -written * slope * u
            weight1 = _add_turned(s1, key, weight1, SPLIT)
            tl.store(w1 + line + j * F, _line(weight1, PARTS, TILE, C))
            tl.store(b1 + units + j, bias1 + tl.sum(s1, 1, keep_dims=True))
            xq2 = zq1 * _gate(zq1)
            gate = _gate(z1)
            next_x2 = z1 * gate
            slope = gate + next_x2 * (1 - gate) * (1.5957691216057308 + 0.2140644488 * z1 * z1)
            tl.store(own_x2 + j * K, _line(next_x2, PARTS, K, TILE), mask=own_line)
            tl.store(own_slope + j * K, _line(slope, PARTS, K, TILE), mask=own_line)
            zq2 = _add_turning(xq2, weight2, zq2, SPLIT)
            z2 = _add_turning(next_x2, weight2, z2, SPLIT)
            products2 = _add_dot(xq2, _swap(x2), products2, SPLIT)
            if KEEP:
                place = there * D + j * K + shared
                tl.store(kept_zq1 + place, _line(zq1, PARTS, K, TILE), mask=own_line & real)
                tl.store(kept_u + place, _line(u, PARTS, K, TILE), mask=own_line & real)
                place += K * D
                tl.store(kept_z1 + place, _line(z1, PARTS, K, TILE), mask=own_line & more)
        # The weights have already taken the whole step.
        steps2 = (products2 - 1) * written - products2 * scale[None]
        tl.store(own_zq2 + parts, _add_dot(steps2, s2, zq2, SPLIT))
        tl.store(own_z2 + parts, z2)
        if KEEP:
            tl.store(kept_products2 + there * K + squares, products2, mask=real)
        tl.debug_barrier()
        z = tl.load(own_zq2 + frames) + bias2[None, :]
        if KEEP:
            tl.store(kept_zq2 + there * F + frames, z, mask=real)
        normed, _rstd = _normed(z, EPS, F)
        found = tl.load(q + here * F + frames).to(tl.float32)
        found += normed * norm_w[None, :] + norm_b[None, :]
        tl.store(out + here * F + frames, found.to(out.dtype.element_ty), mask=real)
        bias2 -= written * tl.sum(tl.load(own_s2 + frames), 0)
        z = tl.load(own_z2 + frames) + bias2[None, :]
        if KEEP:
            tl.store(kept_z2 + (there + K) * F + frames, z, mask=more)
        target = tl.load(v + after * F + frames).to(tl.float32)
        target -= tl.load(k + after * F + frames).to(tl.float32)
        rate = tl.load(eta + after + t)[:, None]
        s = rate * _gradient(z, target, norm_w, norm_b, EPS, F)
        tl.debug_barrier()
        tl.store(own_s2 + frames, s)
        tl.debug_barrier()
    tl.store(b2 + row * F + f, bias2)
