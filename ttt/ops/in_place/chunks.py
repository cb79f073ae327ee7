"""Chunks, super-chunks, and the products that both In-Place rules are made of.

Both rules read `O = (M ⊙ Z Zᵀ) E`, where E is what the chunks write and

    M[t, s] = γ^(chunk(t) − 1 − chunk(s))   where frame s lies in an earlier chunk than t, else 0.

This dual form builds no weight, and its cost grows with T². So a long sequence is cut into
super-chunks: the dual form inside, and between them one state S [d, h] in float32. With i(t) the
number of t's chunk inside its super-chunk, and m chunks in each,

    O_k += γ^i ⊙ (Z_k S_kᵀ),   S_{k+1} = γ^m S_k + (γ^(m−1−i) ⊙ E_k)ᵀ Z_k.

Forward and backward take seven products of d × h a frame for the state (it is made a second time in
the backward pass, as keeping it would take d h for every super-chunk), which is 14 d h operations,
and 3 (d + h) T in the dual form: up to T = 14 d h / 3 (d + h), 14,000 frames at d = 4096 and
h = 11264, the dual form alone is faster. The two T × T matrices of its backward pass would by then
take twice the memory of z, so the limit is set at 3 d h / (d + h), 9,000 frames.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SUPER_CHUNK_FRAMES = 2048
"""About the length of a super-chunk. Shorter, reading and writing S takes longer than computing it;
longer, the dual form costs more than it saves."""
BLOCK_FRAMES = 256
"""At least this many frames at once in the dual form, for products that fill a GPU."""
_ROW_MULTIPLE = 8
"""Of 16-bit numbers in a row of scores; see `scores`."""


@dataclass(frozen=True)
class Cut:
    """How sequences of one shape are cut into chunks, blocks of rows, and super-chunks."""

    num_frames: int
    chunk_size: int
    super_chunk: int
    """Frames in a super-chunk: a multiple of the chunk size, or the whole sequence."""
    block: int
    """Rows at once in the dual form: a multiple of the chunk size."""
    decay: float

    @property
    def is_whole(self) -> bool:
        """Whether there is a single super-chunk, and no state."""
        return self.super_chunk >= self.num_frames

    @property
    def carried(self) -> float:
        """γ^m: how much of the state outlives a super-chunk."""
        return self.decay ** (self.super_chunk // self.chunk_size)

    def blocks(self, length: int) -> Iterator[tuple[int, int, int]]:
        """Blocks of rows of a super-chunk of `length` frames: first row a, end of the columns that
        they read e, last row + 1 b. With one chunk a block, e = a."""
        for a in range(0, length, self.block):
            b = min(a + self.block, length)
            yield a, a + (b - a - 1) // self.chunk_size * self.chunk_size, b

    def groups(self, *tensors: Tensor) -> Iterator[list[tuple[Tensor, ...]]]:
        """The super-chunks of [B, T, ·] tensors, as views: groups that know nothing of each other.

        A group is a list of batches of equal length, `[n, length, ·]` of every tensor. If the
        sequence is whole, that is all rows at once; else a row is a group, so that there is one
        state at a time, of its full super-chunks and what remains.
        """
        if self.is_whole:
            yield [tensors]
            return
        full = self.num_frames // self.super_chunk
        end = full * self.super_chunk
        for row in zip(*tensors, strict=True):
            group = [tuple(x[:end].view(full, self.super_chunk, -1) for x in row)]
            if end < self.num_frames:
                group.append(tuple(x[end:].unsqueeze(0) for x in row))
            yield group


def cut(num_frames: int, chunk_size: int, width: int, hidden: int, decay: float) -> Cut:
    """The fastest cut that keeps memory in bounds; see this module's text."""
    limit = max(SUPER_CHUNK_FRAMES, 3 * width * hidden // (width + hidden))
    super_chunk = chunk_size * max(1, round(SUPER_CHUNK_FRAMES / chunk_size))
    block = chunk_size * max(1, BLOCK_FRAMES // chunk_size)
    return Cut(
        num_frames, chunk_size, num_frames if num_frames <= limit else super_chunk, block, decay
    )


def split_documents(documents: Tensor) -> list[int]:
    """Lengths of the documents in [B, T] numbers, row after row. Asks the device."""
    starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True).flatten()
    edges = [*starts.nonzero().flatten().tolist(), documents.numel()]
    return [b - a for a, b in itertools.pairwise(edges)]


def number_chunks(
    num_frames: int, chunk_size: int, documents: Tensor | None, device: torch.device
) -> Tensor:
    """The number of each frame's chunk, counted through the row: [1, T], or [B, T] with documents.

    A chunk never reaches over the end of a document.
    """
    frames = torch.arange(num_frames, device=device).unsqueeze(0)
    if documents is None:
        return frames // chunk_size
    is_start = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    starts = torch.where(is_start, frames, 0).cummax(1).values
    return (((frames - starts) % chunk_size == 0).cumsum(1)) - 1


# The dual form, inside super-chunks ------------------------------------------------------------


def scores(x: Tensor, y: Tensor, cut: Cut) -> Tensor:
    """M ⊙ X Yᵀ, [N, L, L] of [N, L, ·]. Columns that no chunk of a block of rows reads are left
    unwritten beyond the block, and zero within it."""
    length = x.shape[1]
    # Rows start at multiples of 16 bytes: cuBLAS is several times slower where they do not.
    stride = -(-length // _ROW_MULTIPLE) * _ROW_MULTIPLE
    out = x.new_empty(x.shape[0], length, stride)[:, :, :length]
    chunk = torch.arange(length, device=x.device) // cut.chunk_size
    for a, e, b in cut.blocks(length):
        torch.bmm(x[:, a:b], y[:, :e].transpose(1, 2), out=out[:, a:b, :e])
        # Without decay only the block on the diagonal needs weights.
        first = 0 if cut.decay != 1 else a
        if first < e:
            age = chunk[a:b, None] - 1 - chunk[first:e]
            powers = torch.pow(cut.decay, age.clamp(min=0).to(accumulating_dtype(x.dtype)))
            out[:, a:b, first:e].mul_(torch.where(age >= 0, powers, 0.0))
        out[:, a:b, e:b] = 0
    return out


def symmetrize(d_scores: Tensor, cut: Cut) -> Tensor:
    """D + Dᵀ in place, where D is as from `scores`: the gradient of Z Zᵀ turned to that of Z."""
    for a, _, b in cut.blocks(d_scores.shape[1]):
        d_scores[:, :a, a:b] = d_scores[:, a:b, :a].transpose(1, 2)
        diagonal = d_scores[:, a:b, a:b]
        diagonal += diagonal.transpose(1, 2).clone()
    return d_scores


def weighted_frames(
    weights: Tensor, x: Tensor, out: Tensor, *, alpha: float = 1.0, beta: float = 0.0
) -> None:
    """OUT = beta · OUT + alpha · WEIGHTS X, of [N, L, L] and [N, L, ·]."""
    length = x.shape[1]
    even = length // _ROW_MULTIPLE * _ROW_MULTIPLE or length
    out.baddbmm_(weights[:, :, :even], x[:, :even], beta=beta, alpha=alpha)
    if even < length:
        # cuBLAS has fast kernels only for sums over a multiple of 8.
        out.baddbmm_(weights[:, :, even:], x[:, even:], alpha=alpha)


# The state, between super-chunks ---------------------------------------------------------------


def accumulating_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def product(a: Tensor, b: Tensor) -> Tensor:
    """A B of matrices or batches of them, in float32 (float64 for float64)."""
    dtype = accumulating_dtype(a.dtype)
    if dtype == a.dtype:
        return a @ b
    if not a.is_cuda:
        return a.to(dtype) @ b.to(dtype)
    return (torch.bmm if a.ndim == 3 else torch.mm)(a, b, out_dtype=dtype)


def gram(x: Tensor) -> Tensor:
    """X Xᵀ, [B, C, C] of [B, C, ·], in float32 (float64 for float64); differentiable."""
    return _Gram.apply(x)


class _Gram(torch.autograd.Function):
    """PyTorch has no derivative for a product with another dtype than its factors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return product(x, x.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        (grad,) = grads
        return (grad + grad.transpose(1, 2)).to(x.dtype) @ x


class State:
    """Σ γ^… eᵀ z over all frames written so far: [d, h] in float32, and a copy to multiply with.

    Reads and writes take [L, ·] of one super-chunk; `reverse` swaps the two weightings, for the
    state that the backward pass carries from the end to the start.
    """

    def __init__(self, cut: Cut, *, reverse: bool = False):
        self.cut = cut
        self.value: Tensor | None = None
        self.reverse = reverse
        self._low: Tensor | None = None

    def write(self, e: Tensor, z: Tensor) -> None:
        """S = γ^m S + (weight ⊙ E)ᵀ Z."""
        self._low = None
        e = self._weighted(e, to_end=not self.reverse)
        if self.value is None:
            self.value = product(e.T, z)
        elif z.is_cuda and self.value.dtype != z.dtype and torch.__version__ >= "2.10":
            # One pass over the state instead of three.
            state, kept = self.value, self.cut.carried
            torch.addmm(state, e.T, z, beta=kept, out_dtype=state.dtype, out=state)
        else:
            self.value.mul_(self.cut.carried).add_(product(e.T, z))

    def read(self, z: Tensor, out: Tensor, alpha: float) -> None:
        """OUT += alpha · weight ⊙ (Z Sᵀ), for OUT [L, d]."""
        if self.value is None:
            return
        low = self._as(z.dtype)
        if self.cut.decay == 1:
            out.addmm_(z, low.T, alpha=alpha)
        else:
            out.add_(self._weighted(z @ low.T, to_end=self.reverse), alpha=alpha)

    def read_transposed(self, e: Tensor, out: Tensor, alpha: float) -> None:
        """OUT += alpha · (weight ⊙ E) S, for OUT [L, h]."""
        if self.value is not None:
            weighted = self._weighted(e, to_end=self.reverse)
            out.addmm_(weighted, self._as(e.dtype), alpha=alpha)

    def _as(self, dtype: torch.dtype) -> Tensor:
        """The state to multiply with, made once between writes."""
        assert self.value is not None
        if self._low is None:
            self._low = self.value.to(dtype)
        return self._low

    def _weighted(self, x: Tensor, *, to_end: bool) -> Tensor:
        """x with γ^i (from the super-chunk's start to the frame's chunk) or γ^(m−1−i) (to its
        end)."""
        if self.cut.decay == 1:
            return x
        chunk = torch.arange(len(x), device=x.device) // self.cut.chunk_size
        if to_end:
            chunk = self.cut.super_chunk // self.cut.chunk_size - 1 - chunk
        weight = torch.pow(self.cut.decay, chunk.to(accumulating_dtype(x.dtype)))
        return (x * weight.unsqueeze(1)).to(x.dtype)


def super_chunks(group: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """The super-chunks of a group in order of time, `[length, ·]` of every tensor."""
    return [tuple(x[k] for x in part) for part in group for k in range(len(part[0]))]


def add_gradient_of_reads(parts: list[tuple[Tensor, ...]], alpha: float, cut: Cut) -> None:
    """dZ += alpha dY S for (z, e, dy, dz) of every super-chunk: makes the state once more."""
    state = State(cut)
    for k, (z, e, d_y, d_z) in enumerate(parts):
        state.read_transposed(d_y, d_z, alpha)
        if k + 1 < len(parts):
            state.write(e, z)
