"""The kernel of TTT-MLP that goes backwards through what a block's mini-batches write, one after
the other; `mlp_backward` has the rest, and `mlp_blocks` says what they compute."""

import triton
import triton.language as tl

from ttt.ops.inner_loop.kernels import _add_to, _gradient, _gradient_backward
from ttt.ops.inner_loop.mlp_pieces import (
    COUNTS,
    _block,
    _flip,
    _frames,
    _gelu,
    _gelu_derivatives,
    _load_some,
    _load_terms,
    _plus,
    _store_terms,
    _terms,
)


@triton.jit
def _errors_backward(
    k, v, eta, norm_w, norm_b, write_scale, kept_z2, d_v, d_eta, s2, s2_s2, x2_x2, d_z2, d_target,
    d_u_x2, d_z2_s2, count, found2, products,
    N: tl.constexpr, EPS: tl.constexpr, K: tl.constexpr, F: tl.constexpr, M: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Go backwards through the errors of mini-batch N, for d_z2, d_eta, d_v and d_target.

    Args:
        found2: what is known of d_s2 [K, F]: what comes through hidden units is missing.
        products: d_u X2ᵀ [K, M].

    Returns:
        As `_write_backward` does."""
    NEXT: tl.constexpr = N + 1
    t, f, m = tl.arange(0, K), tl.arange(0, F), tl.arange(0, M)
    own_frames = (N * K + t[:, None]) * F + f[None, :]
    own_square = (N * K + t[:, None]) * M + m[None, :]
    own_turned = m[None, :] * M + N * K + t[:, None]
    frames = m[:, None] * F + f[None, :]
    real = N * K + t < count
    is_past, is_after = (m < N * K)[None, :], (m >= NEXT * K)[None, :]
    own_s2_s2, own_x2_x2 = tl.load(s2_s2 + own_square), tl.load(x2_x2 + own_square)
    s2_terms = _load_terms(s2, frames, M * F, SPLIT)
    products = tl.where(is_past, products, 0.0)
    tl.store(d_u_x2 + own_square, products)
    d_scale = -tl.sum(products * own_s2_s2, 1)
    products += tl.load(d_u_x2 + own_turned, mask=is_after, other=0.0)
    found2 = _plus(found2, _terms(-write_scale * products, SPLIT), s2_terms)
    if NEXT * K < M:
        steps = tl.where(is_after, -write_scale * own_x2_x2, 0.0)
        after_d_z2_terms = _load_some(d_z2, frames, m >= NEXT * K, M * F, SPLIT)
        found2 = _plus(found2, _terms(steps, SPLIT), after_d_z2_terms)
    target = _frames(v, own_frames, real).to(tl.float32)
    target -= _frames(k, own_frames, real).to(tl.float32)
    z2 = tl.load(kept_z2 + own_frames)
    g = _gradient(z2, target, norm_w, norm_b, EPS, F)
    tl.store(d_eta + N * K + t, tl.sum(found2 * g, 1), mask=real)
    rate = tl.load(eta + N * K + t, mask=real, other=0.0)[:, None]
    own_d_z2, own_d_target, d_norm_w, d_norm_b = _gradient_backward(
        rate * found2, z2, target, norm_w, norm_b, EPS, F
    )
    tl.store(d_v + own_frames, own_d_target.to(d_v.dtype.element_ty), mask=real[:, None])
    tl.store(d_target + own_frames, own_d_target)
    d_z2_terms = _terms(own_d_z2, SPLIT)
    _store_terms(d_z2, own_frames, d_z2_terms, M * F)
    if N > 0:
        products = _plus(tl.zeros((K, M), tl.float32), d_z2_terms, _flip(s2_terms))
        products = tl.where(is_past, products, 0.0)
        tl.store(d_z2_s2 + own_square, products)
        d_scale -= tl.sum(products * own_x2_x2, 1)
    # The next pass reads what other threads have stored.
    tl.debug_barrier()
    return d_scale, d_norm_w, d_norm_b


@triton.jit
def _write_backward(
    k, v, eta, norm_w, norm_b, w2_terms, write_scale, kept_z2, d_v, d_eta,
    s2, keys_keys, s2_s2, z1, u, x2, d_s1, d_x2, d_s2, x2_x2, d_u, d_z1, d_z2, d_target, d_u_x2,
    d_z2_s2, count, num_units,
    N: tl.constexpr, LATER: tl.constexpr, EPS: tl.constexpr, K: tl.constexpr,
    F: tl.constexpr, D: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Pass over the second layer's weights once: for d_z1 of mini-batch N + 1, if there is one,
    and then d_u and d_z2 of mini-batch N, if there is one.

    Args:
        k, v, eta, d_v, d_eta: pointers to the block's frames, of which `count` are real.
        LATER: how many of the block's last frames are looked at for those after N + 1.

    Returns:
        Gradients: by frame to the scale of writes [K], to the norm's weight and bias [F]."""
    NEXT: tl.constexpr = N + 1
    t, f, h, m = tl.arange(0, K), tl.arange(0, F), tl.arange(0, TILE), tl.arange(0, M)
    rows2 = h[:, None] * F + f[None, :]
    own_frames = (N * K + t[:, None]) * F + f[None, :]
    own_hidden = (N * K + t[:, None]) * D + h[None, :]
    next_hidden = (NEXT * K + t[:, None]) * D + h[None, :]
    hidden = m[:, None] * D + h[None, :]
    next_square = (NEXT * K + t[:, None]) * M + m[None, :]
    next_turned = m[None, :] * M + NEXT * K + t[:, None]
    # The frames after N + 1.
    a = M - (LATER if LATER > 0 else K) + tl.arange(0, LATER if LATER > 0 else K)
    later = a >= NEXT * K + K
    later_hidden = a[:, None] * D + h[None, :]
    if NEXT * K < M:
        d_z2_terms = _load_terms(d_z2, (NEXT * K + t[:, None]) * F + f[None, :], M * F, SPLIT)
        read = tl.load(d_z2_s2 + next_square, mask=(m < NEXT * K)[None, :], other=0.0)
        is_later = (m >= NEXT * K + K)[None, :]
        read += tl.load(d_z2_s2 + next_turned, mask=is_later, other=0.0)
        read_terms = _terms(-write_scale * read, SPLIT)
    if LATER > 0:
        steps = tl.load(s2_s2 + (NEXT * K + t[:, None]) * M + a[None, :])
        later_scale = tl.where(later, -write_scale, 0.0)[None, :]
        steps2_terms = _terms(later_scale * steps, SPLIT)
    if NEXT * K < M and N >= 0:
        # What comes from N + 1, and what from later ones.
        next_keys = tl.load(keys_keys + (N * K + t[:, None]) * M + NEXT * K + t[None, :])
        next_steps_terms = _terms(-write_scale * next_keys, SPLIT)
        if LATER > 0:
            keys = later_scale * tl.load(keys_keys + (N * K + t[:, None]) * M + a[None, :])
            steps1_terms = _terms(keys, SPLIT)
    if N >= 0:
        found2 = tl.load(d_s2 + own_frames)
        products = tl.zeros((K, M), tl.float32)
    for j in range(0, num_units, TILE):
        weight_terms = _load_terms(w2_terms, j * F + rows2, F * D, SPLIT)
        x2_terms = _load_terms(x2, j + hidden, M * D, SPLIT)
        if NEXT * K < M:
            found = _plus(tl.load(d_x2 + j + next_hidden), read_terms, x2_terms)
            if LATER > 0:
                later_d_u_terms = _load_some(d_u, j + later_hidden, later, M * D, SPLIT)
                found = _plus(found, steps2_terms, later_d_u_terms)
            found = _plus(found, d_z2_terms, _flip(weight_terms))
            z = tl.load(z1 + j + next_hidden)
            _x2, slope = _gelu(z)
            next_d_z1 = tl.load(d_s1 + j + next_hidden) + slope * found
            next_d_z1_terms = _terms(next_d_z1, SPLIT)
            _store_terms(d_z1, j + next_hidden, next_d_z1_terms, M * D)
        if N >= 0:
            own_d_s1 = tl.load(d_s1 + j + own_hidden)
            if NEXT * K < M:
                own_d_s1 = _plus(own_d_s1, next_steps_terms, next_d_z1_terms)
            if LATER > 0:
                later_d_z1_terms = _load_some(d_z1, j + later_hidden, later, M * D, SPLIT)
                own_d_s1 = _plus(own_d_s1, steps1_terms, later_d_z1_terms)
            z = tl.load(z1 + j + own_hidden)
            slope, bend = _gelu_derivatives(z, tl.load(u + j + own_hidden))
            # From here on the part of d_z1 that comes through gelu'.
            tl.store(d_s1 + j + own_hidden, bend * own_d_s1)
            d_u_terms = _terms(slope * own_d_s1, SPLIT)
            _store_terms(d_u, j + own_hidden, d_u_terms, M * D)
            if N > 0:
                products = _plus(products, d_u_terms, _flip(x2_terms))
            found2 = _plus(found2, d_u_terms, weight_terms)
    if N >= 0:
        return _errors_backward(
            k, v, eta, norm_w, norm_b, write_scale, kept_z2, d_v, d_eta, s2, s2_s2, x2_x2, d_z2,
            d_target, d_u_x2, d_z2_s2, count, found2, products, N, EPS, K, F, M, SPLIT,
        )  # fmt: skip
    else:
        nothing = tl.zeros((F,), tl.float32)
        return tl.zeros((K,), tl.float32), nothing, nothing


@triton.jit(do_not_specialize=COUNTS)
def mlp_back_writes(
    k, v, eta, token_scale, norm_weight, norm_bias, w2_terms, kept_z2,
    d_v, d_eta, d_token_scale, d_norm_weight, d_norm_bias,
    s2, keys_keys, s2_s2, z1, u, x2, d_s1, d_x2, d_s2, x2_x2, d_u, d_z1, d_z2, d_target, d_u_x2,
    d_z2_s2,
    num_heads, num_batches, num_kept, first, last, start, num_units,
    EPS: tl.constexpr, K: tl.constexpr, F: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Go through a block's mini-batches from the last to the first, for d_u, d_z2, d_z1, and of
    what frames were given d_eta and d_v; d_target is d_v in float32."""
    row = tl.program_id(0).to(tl.int64)
    t, f = tl.arange(0, K), tl.arange(0, F)
    here = (row * num_batches + start) * K
    block = _block(row, first, start, num_kept, M, K)
    own, square = row * (1 + SPLIT), row * M * M
    norm_w = tl.load(norm_weight + row % num_heads * F + f)
    norm_b = tl.load(norm_bias + row % num_heads * F + f)
    write_scale = tl.load(token_scale + K - 1)
    d_norm_w, d_norm_b = tl.zeros((F,), tl.float32), tl.zeros((F,), tl.float32)
    d_scale = tl.zeros((K,), tl.float32)
    for i in tl.static_range(0, M // K + 1):
        own_d_scale, own_d_norm_w, own_d_norm_b = _write_backward(
            k + here * F, v + here * F, eta + here, norm_w, norm_b, w2_terms + own * F * D,
            write_scale, kept_z2 + block * M * F, d_v + here * F, d_eta + here,
            s2 + own * M * F, keys_keys + square, s2_s2 + square,
            z1 + row * M * D, u + row * M * D, x2 + own * M * D, d_s1 + row * M * D,
            d_x2 + row * M * D, d_s2 + row * M * F, x2_x2 + square,
            d_u + own * M * D, d_z1 + own * M * D, d_z2 + own * M * F, d_target + row * M * F,
            d_u_x2 + square, d_z2_s2 + square, (last - start) * K, num_units,
            # Frames are looked at by powers of two.
            M // K - 1 - i, 0 if i <= 1 else ((i - 1) * K if i <= 3 else M),
            EPS, K, F, D, M, TILE, SPLIT,
        )  # fmt: skip
        d_scale += own_d_scale
        d_norm_w += own_d_norm_w
        d_norm_b += own_d_norm_b
    _add_to(d_norm_weight + row * F + f, d_norm_w)
    _add_to(d_norm_bias + row * F + f, d_norm_b)
    _add_to(d_token_scale + row * K + t, tl.where(t == K - 1, tl.sum(d_scale, 0), 0.0))
