"""In-Place TTT, `write: delta`: a chunk writes what the memory does not know yet.

    E_i     = (Z_i Z_iᵀ + λ_i I)⁻¹ (V_i − Z_i S_iᵀ)        λ_i = mean_t ‖z_t‖² / β
    S_{i+1} = γ S_i + E_iᵀ Z_i,    o_t = S_{chunk(t)} z_t

Regularised least squares on the residual: what a chunk has in common with those before it is not
written again, so the state stays bounded however long the stream. Only complete chunks write, and
a chunk of zeros, where λ = 0, writes nothing.

Reading is as for `sum`, with E in place of V (`in_place.chunks`), so no state is kept per chunk
either. With K_i = Z_i Z_iᵀ + λ_i I, whose inverses depend on no state and are all made at once,
and O_i and G_i what the frames of chunk i read and its errors receive from later chunks,

    forward, first chunk to last:     O_i = Σ_{j<i} γ^… (Z_i Z_jᵀ) E_j,   E_i = K_i⁻¹ (V_i − O_i)
    backward, last chunk to first:    G_i = Σ_{j>i} γ^… (Z_i Z_jᵀ) Y_j,   X_i = K_i⁻¹ G_i,
                                      Y_i = dO_i − X_i
    dV = X,  dK_i = −X_i E_iᵀ,  dZ as for `sum` with Y in place of dO, and by dK_i.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ttt.ops.in_place import chunks


@torch.compiler.disable
def in_place_delta(
    z: Tensor,
    v: Tensor,
    *,
    beta: Tensor | float,
    chunk_size: int,
    decay: float = 1.0,
    documents: Tensor | None = None,
) -> Tensor:
    """What the fast weights add to the output of the projection that they change.

    The inverses are made in float32 whatever the inputs, in float64 for float64: accurate while β
    stays below some 1e4.

    Args:
        z: [B, T, h], the projection's inputs: keys when written, queries when read.
        v: [B, T, d], the targets.
        beta: β > 0, a number or a tensor of one element: how nearly a chunk's targets are met.
        chunk_size: frames per chunk, counted from the start of each document.
        decay: γ, how much of the state outlives each later chunk, 0 to 1.
        documents: [B, T] integers; a new document begins wherever the number changes, and nothing
            passes from one to the next. None: every row is one document.

    Returns:
        [B, T, d]. Zero within the first chunk of each document.
    """
    if documents is not None:
        lengths = chunks.split_documents(documents)
        parts = [
            in_place_delta(
                z_part.unsqueeze(0),
                v_part.unsqueeze(0),
                beta=beta,
                chunk_size=chunk_size,
                decay=decay,
            )
            for z_part, v_part in zip(
                z.flatten(0, 1).split(lengths), v.flatten(0, 1).split(lengths), strict=True
            )
        ]
        return torch.cat(parts, dim=1).view(v.shape)
    beta = torch.as_tensor(beta, dtype=chunks.accumulating_dtype(z.dtype), device=z.device)
    cut = chunks.cut(z.shape[1], chunk_size, v.shape[2], z.shape[2], decay)
    return _Delta.apply(z.contiguous(), v.contiguous(), beta.reshape(()), cut)


def chunk_errors(z: Tensor, residual: Tensor, beta: Tensor | float) -> Tensor:
    """E of one chunk, as streaming writes it.

    Args:
        z: [B, C, h].
        residual: [B, C, d], V − Z Sᵀ.
        beta: see `in_place_delta`.

    Returns:
        [B, C, d], at least in float32.
    """
    inverse, _ = _inverse(chunks.gram(z), beta)
    return inverse @ residual.to(inverse.dtype)


def _inverse(gram: Tensor, beta: Tensor | float) -> tuple[Tensor, Tensor]:
    """(Z Zᵀ + λ I)⁻¹ [..., C, C], zero where λ is, and λ [...], of Z Zᵀ."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    strength = gram.diagonal(dim1=-2, dim2=-1).mean(-1) / beta
    scale = strength[..., None, None]
    # In units of λ, where all eigenvalues lie between 1 and 1 + C β, however small the frames.
    is_silent = scale == 0
    matrix = gram / torch.where(is_silent, 1.0, scale) + eye
    # Unlike `cholesky`, this does not ask the device whether it went well: it does, by λ.
    factor = torch.linalg.cholesky_ex(matrix).L
    half = torch.linalg.solve_triangular(factor, eye, upper=False)
    inverse = half.transpose(-2, -1) @ half
    return torch.where(is_silent, 0.0, inverse / torch.where(is_silent, 1.0, scale)), strength


def _inverses(z: Tensor, beta: Tensor, cut: chunks.Cut) -> tuple[Tensor, Tensor]:
    """`_inverse` of the complete chunks of [N, L, h], for `_solve`, and λ [N, n].

    The inverses are [N, n, C, C]; for 16-bit z they are two terms of its type side by side,
    [N, n, C, 2C], which sum to them as exactly as 16 bits of mantissa can, for products that run on
    tensor cores."""
    size = cut.chunk_size
    count = z.shape[1] // size
    grams = z.new_empty(len(z), count, size, size, dtype=chunks.accumulating_dtype(z.dtype))
    for i in range(count):
        grams[:, i] = chunks.gram(z[:, i * size : (i + 1) * size])
    inverses, strengths = _inverse(grams, beta)
    if inverses.dtype != z.dtype:
        high = inverses.to(z.dtype)
        inverses = torch.cat([high, (inverses - high).to(z.dtype)], dim=-1)
    return inverses, strengths


def _solve(inverse: Tensor, x: Tensor, out: Tensor, *, minus: Tensor | None = None) -> None:
    """OUT = K⁻¹ (X − minus) of [N, C, d]; `inverse` as from `_inverses`.

    One product with everything side by side, so that all differences are taken in its float32
    accumulator: that of X and `minus` is not exact in 16 bits, and K⁻¹ enlarges what is rounded.
    """
    terms = [x] * (inverse.shape[-1] // inverse.shape[-2])
    if minus is not None:
        inverse = torch.cat([inverse, -inverse], dim=-1)
        terms += [minus] * len(terms)
    torch.bmm(inverse, terms[0] if len(terms) == 1 else torch.cat(terms, dim=1), out=out)


def _write(
    weights: Tensor, inverses: Tensor, v: Tensor, out: Tensor, e: Tensor, cut: chunks.Cut
) -> None:
    """One super-chunk, chunk by chunk: adds to OUT what its chunks read of each other, makes E.

    Args:
        weights: [N, L, L], the scores.
        inverses: see `_inverses`.
        v, out, e: [N, L, d]; `out` holds what is read of earlier super-chunks.
    """
    for a, b, start, stop in _steps(v.shape[1], cut):
        if start == a and a > 0:
            out[:, a:b].baddbmm_(weights[:, a:b, :a], e[:, :a])
        if start > a:
            out[:, start:stop].baddbmm_(weights[:, start:stop, a:start], e[:, a:start])
        if stop - start < cut.chunk_size:
            e[:, start:stop] = 0
            continue
        here = slice(start, stop)
        inverse = inverses[:, start // cut.chunk_size]
        _solve(inverse, v[:, here], e[:, here], minus=out[:, here])


def _write_backward(
    weights: Tensor, inverses: Tensor, d_out: Tensor, x: Tensor, y: Tensor, cut: chunks.Cut
) -> None:
    """The adjoint, last chunk first: `x` [N, L, d] holds what E receives from later super-chunks
    and becomes dV; makes `y`."""
    length = x.shape[1]
    for a, b, start, stop in reversed(list(_steps(length, cut))):
        if stop == b < length:
            x[:, a:b].baddbmm_(weights[:, b:, a:b].transpose(1, 2), y[:, b:])
        if stop < b:
            later = weights[:, stop:b, start:stop].transpose(1, 2)
            x[:, start:stop].baddbmm_(later, y[:, stop:b])
        if stop - start < cut.chunk_size:
            x[:, start:stop] = 0
            y[:, start:stop] = d_out[:, start:stop]
            continue
        here = slice(start, stop)
        # Through y: a product cannot overwrite its factor.
        _solve(inverses[:, start // cut.chunk_size], x[:, here], y[:, here])
        x[:, here] = y[:, here]
        torch.sub(d_out[:, here], x[:, here], out=y[:, here])


def _steps(length: int, cut: chunks.Cut) -> Iterator[tuple[int, int, int, int]]:
    """The chunks of a super-chunk, each as (block's start, block's end, start, end)."""
    for a, _, b in cut.blocks(length):
        for start in range(a, b, cut.chunk_size):
            yield a, b, start, min(start + cut.chunk_size, b)


def _with(
    group: Sequence[tuple[Tensor, ...]], made: Sequence[tuple[Tensor, ...]]
) -> list[tuple[Tensor, ...]]:
    """The group with the scores and inverses of every batch of super-chunks."""
    return [(*part, *m[:2]) for part, m in zip(group, made, strict=True)]


class _Delta(torch.autograd.Function):
    """Keeps z, E, the scores and the inverses for the backward pass; v is not needed."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, v: Tensor, beta: Tensor, cut: chunks.Cut) -> Tensor:
        out, e = torch.zeros_like(v), torch.empty_like(v)
        kept = []
        for group in cut.groups(z, v, out, e):
            made = []
            for z_part, *_ in group:
                inverses, strengths = _inverses(z_part, beta, cut)
                made.append((chunks.scores(z_part, z_part, cut), inverses, strengths))
            kept.extend(made)
            if cut.is_whole:
                _, v_part, out_part, e_part = group[0]
                _write(*made[0][:2], v_part, out_part, e_part, cut)
                continue
            state = chunks.State(cut)
            parts = chunks.super_chunks(_with(group, made))
            for k, (z_k, v_k, out_k, e_k, weights, inverses) in enumerate(parts):
                state.read(z_k, out_k, 1.0)
                _write(weights[None], inverses[None], v_k[None], out_k[None], e_k[None], cut)
                if k + 1 < len(parts):
                    state.write(e_k, z_k)
        ctx.save_for_backward(z, e, beta, *[x for m in kept for x in m])
        ctx.cut = cut
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, e, beta, *flat = ctx.saved_tensors
        cut = ctx.cut
        kept = zip(flat[::3], flat[1::3], flat[2::3], strict=True)
        d_out = grads[0].contiguous()
        d_z, x, y = torch.zeros_like(z), torch.zeros_like(e), torch.empty_like(e)
        d_beta = torch.zeros_like(beta)
        for group in cut.groups(z, e, d_out, d_z, x, y):
            made = [next(kept) for _ in group]
            if cut.is_whole:
                _, _, d_out_part, _, x_part, y_part = group[0]
                _write_backward(*made[0][:2], d_out_part, x_part, y_part, cut)
            else:
                parts = chunks.super_chunks(_with(group, made))
                later = chunks.State(cut, reverse=True)
                for k, (z_k, e_k, d_out_k, d_z_k, x_k, y_k, weights, inverses) in reversed(
                    list(enumerate(parts))
                ):
                    later.read(z_k, x_k, 1.0)
                    _write_backward(
                        weights[None], inverses[None], d_out_k[None], x_k[None], y_k[None], cut
                    )
                    later.read_transposed(e_k, d_z_k, 1.0)
                    if k > 0:
                        later.write(y_k, z_k)
                del later
                chunks.add_gradient_of_reads([(p[0], p[1], p[5], p[3]) for p in parts], 1.0, cut)
            for (z_part, e_part, _, d_z_part, x_part, y_part), (_, _, strengths) in zip(
                group, made, strict=True
            ):
                d_scores = chunks.scores(y_part, e_part, cut)
                d_strengths = _add_gradient_of_inverses(d_scores, x_part, e_part, beta, cut)
                d_beta -= (d_strengths * strengths).sum() / beta
                weights = chunks.symmetrize(d_scores, cut)
                chunks.weighted_frames(weights, z_part, d_z_part, beta=1.0)
        return d_z, x, d_beta, None


def _add_gradient_of_inverses(
    d_scores: Tensor, x: Tensor, e: Tensor, beta: Tensor, cut: chunks.Cut
) -> Tensor:
    """Adds dK_i, and what λ_i hands on to ‖z_t‖², to the diagonal of `d_scores`; dλ, [N, n]."""
    size = cut.chunk_size
    d_strengths = []
    for i in range(x.shape[1] // size):
        here = slice(i * size, (i + 1) * size)
        d_matrix = chunks.product(x[:, here], e[:, here].transpose(1, 2)).neg_()
        d_strength = d_matrix.diagonal(dim1=1, dim2=2).sum(1)
        d_matrix.diagonal(dim1=1, dim2=2).add_((d_strength / (size * beta)).unsqueeze(1))
        d_scores[:, here, here] += d_matrix.to(d_scores.dtype)
        d_strengths.append(d_strength)
    if not d_strengths:
        return x.new_zeros(len(x), 0, dtype=beta.dtype)
    return torch.stack(d_strengths, dim=1)
