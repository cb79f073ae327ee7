"""Chunks, super-chunks, and the products that both In-Place rules are made of.

At frame u a pair is complete: the target v_u, and the key that it belongs to, k_u = z_{u − lag}. A
chunk, when it has ended, writes its pairs, and every later frame reads them with its own z. Both
rules read `O = (M ⊙ Z Kᵀ) E`, where E is what the chunks write and

    M[t, u] = γ^(chunk(t) − 1 − chunk(u))   where pair u is of an earlier chunk than t, else 0.

This dual form builds no weight, and its cost grows with T². So a long sequence is cut into
super-chunks: the dual form inside, and between them one state S [d, h] in float32. With i(t) the
number of t's chunk inside its super-chunk, and m chunks in each,

    O_k += γ^i ⊙ (Z_k S_kᵀ),   S_{k+1} = γ^m S_k + (γ^(m−1−i) ⊙ E_k)ᵀ K_k.

Forward and backward take seven products of d × h a frame for the state (it is made a second time in
the backward pass, as keeping it would take d h for every super-chunk), which is 14 d h operations,
and 3 (d + h) T in the dual form: up to T = 14 d h / 3 (d + h), 14,000 frames at d = 4096 and
h = 11264, the dual form alone is faster. The two T × T matrices of its backward pass would by then
take twice the memory of z, so the limit is set at 3 d h / (d + h), 9,000 frames. In small layers
time goes into starting kernels, and a super-chunk starts them for each row: they stay whole for
longer, as far as memory is of no concern.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt.ops.autocast import without_autocast
from ttt.ops.in_place import terms
from ttt.ops.in_place.terms import accumulating_dtype

SUPER_CHUNK_FRAMES = 2048
"""About the length of a super-chunk. Shorter, reading and writing S takes longer than computing it;
longer, the dual form costs more than it saves."""
WHOLE_FRAMES = 4096
"""Sequences up to this length are not cut, if `WHOLE_PRODUCTS` allows it."""
WHOLE_PRODUCTS = 2**27
"""The most numbers in a T × T matrix of all rows, for this: 0.25 GB in 16 bits."""
BLOCK_FRAMES = 256
"""At least this many frames at once in the dual form, for products that fill a GPU."""
ROW_MULTIPLE = 8
"""Rows of matrices start at multiples of as many 16-bit numbers, which are 16 bytes: cuBLAS is
several times slower where they do not."""


@dataclass(frozen=True)
class Window:
    """A super-chunk of one row, or a whole sequence of all rows, and the frames that it needs."""

    rows: slice
    start: int
    """First frame that reads."""
    stop: int
    lead: int
    """Frames before `start` whose pairs are complete in this window: 0 at a sequence's start, else
    the lag."""

    @property
    def length(self) -> int:
        """Frames that read."""
        return self.stop - self.start

    def frames(self, x: Tensor) -> Tensor:
        """Return the frames of x [B, T, ·] that read or are keys: [N, lead + length, ·]."""
        return x[self.rows, self.start - self.lead : self.stop]

    def own(self, x: Tensor) -> Tensor:
        """Return the frames of x [B, T, ·] from `start` to `stop`: [N, length, ·]."""
        return x[self.rows, self.start : self.stop]


@dataclass(frozen=True)
class Cut:
    """A cut divides sequences of one shape into chunks, blocks of rows, and super-chunks."""

    num_frames: int
    chunk_size: int
    super_chunk: int
    """Frames in a super-chunk: a multiple of the chunk size, or the whole sequence."""
    block: int
    """Rows at once in the dual form: a multiple of the chunk size."""
    decay: float
    lag: int = 0
    """How many frames earlier than its target a key was read: 0 to the chunk size − 1."""

    @property
    def is_whole(self) -> bool:
        """Return whether there is a single super-chunk, and no state."""
        return self.super_chunk >= self.num_frames

    @property
    def carried(self) -> float:
        """γ^m: how much of the state outlives a super-chunk."""
        return self.decay ** (self.super_chunk // self.chunk_size)

    def windows(self, batch: int) -> Iterator[list[Window]]:
        """Yield lists of windows in order of time, which share a state. If the sequence is whole,
        that is one of all rows; else a list for each row, so that there is one state at a time."""
        if self.is_whole:
            yield [Window(slice(None), 0, self.num_frames, 0)]
            return
        for row in range(batch):
            yield [
                Window(
                    slice(row, row + 1),
                    start,
                    min(start + self.super_chunk, self.num_frames),
                    self.lag if start else 0,
                )
                for start in range(0, self.num_frames, self.super_chunk)
            ]

    def blocks(self, length: int) -> Iterator[tuple[int, int, int]]:
        """Yield the blocks of rows of a window of `length` frames: first row a, end of the pairs
        that they read e, last row + 1 b. With one chunk a block, e = a."""
        for a in range(0, length, self.block):
            b = min(a + self.block, length)
            yield a, a + (b - a - 1) // self.chunk_size * self.chunk_size, b

    def offset(self, window: Window) -> int:
        """Return the place of pair 0's key among the window's `frames`: the lag's negative where
        the window has no lead, and there is no such key; else 0."""
        return window.lead - self.lag


def cut(
    num_frames: int,
    chunk_size: int,
    width: int,
    hidden: int,
    decay: float,
    lag: int = 0,
    *,
    batch: int,
) -> Cut:
    """Return the fastest cut of `batch` rows that keeps memory in bounds: see the module's text."""
    # A chunk that the sequence does not fill writes nothing, and is as good as one a frame longer.
    chunk_size = min(chunk_size, max(num_frames, lag) + 1)
    limit = max(SUPER_CHUNK_FRAMES, 3 * width * hidden // (width + hidden))
    super_chunk = chunk_size * max(1, round(SUPER_CHUNK_FRAMES / chunk_size))
    block = chunk_size * max(1, BLOCK_FRAMES // chunk_size)
    is_small = num_frames <= WHOLE_FRAMES and batch * num_frames**2 <= WHOLE_PRODUCTS
    whole = num_frames <= limit or is_small
    return Cut(num_frames, chunk_size, num_frames if whole else super_chunk, block, decay, lag)


def split_documents(documents: Tensor) -> list[int]:
    """Return the lengths of the documents in [B, T] numbers, row after row. Asks the device."""
    starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True).flatten()
    edges = [*starts.nonzero().flatten().tolist(), documents.numel()]
    return [b - a for a, b in itertools.pairwise(edges)]


def number_chunks(
    num_frames: int, chunk_size: int, documents: Tensor | None, device: torch.device
) -> Tensor:
    """Return the number of each frame's chunk, counted through the row: [1, T], or [B, T] with
    documents. A chunk never reaches over the end of a document."""
    frames = torch.arange(num_frames, device=device).unsqueeze(0)
    if documents is None:
        return frames // chunk_size
    is_start = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    starts = torch.where(is_start, frames, 0).cummax(1).values
    return (((frames - starts) % chunk_size == 0).cumsum(1)) - 1


# The dual form, inside super-chunks ------------------------------------------------------------


def aligned(like: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    """Return a new tensor of `shape` whose rows start at multiples of 16 bytes."""
    stride = -(-shape[-1] // ROW_MULTIPLE) * ROW_MULTIPLE
    return like.new_empty(*shape[:-1], stride, dtype=dtype)[..., : shape[-1]]


def weights_by_age(a: int, b: int, first: int, stop: int, cut: Cut, like: Tensor) -> Tensor:
    """Return M[t, u] for rows a ≤ t < b and pairs first ≤ u < stop: [b − a, stop − first]."""
    chunk = torch.arange(max(b, stop), device=like.device) // cut.chunk_size
    age = chunk[a:b, None] - 1 - chunk[first:stop]
    powers = torch.pow(cut.decay, age.clamp(min=0).to(accumulating_dtype(like.dtype)))
    return torch.where(age >= 0, powers, 0.0)


def gradient_of_products(d_scores: Tensor, window: Window, cut: Cut) -> Tensor:
    """Return D + Dᵀ [N, F, F], F = lead + length, for dZ = (D + Dᵀ) Z of the window's frames.

    Args:
        d_scores: [N, L, L], the gradient of z_t · k_u, zero where no frame of a block reads.
            Without a lag it is overwritten.
    """
    length, offset = window.length, cut.offset(window)
    if cut.lag == 0:
        for a, _, b in cut.blocks(length):
            d_scores[:, :a, a:b] = d_scores[:, a:b, :a].transpose(1, 2)
            diagonal = d_scores[:, a:b, a:b]
            diagonal += diagonal.transpose(1, 2).clone()
        return d_scores
    frames = window.lead + length
    out = aligned(d_scores, len(d_scores), frames, frames, dtype=d_scores.dtype).zero_()
    for a, e, b in cut.blocks(length):
        first = max(0, -offset)
        if first < e:
            part = d_scores[:, a:b, first:e]
            rows = slice(window.lead + a, window.lead + b)
            keys = slice(first + offset, e + offset)
            # No other block of rows has been here; only a block's own D and Dᵀ overlap.
            out[:, rows, keys] = part
            if keys.stop > rows.start:
                out[:, keys, rows] += part.transpose(1, 2)
            else:
                out[:, keys, rows] = part.transpose(1, 2)
    return out


def weighted_frames(
    parts: Sequence[Tensor], x: Tensor, out: Tensor, *, alpha: float = 1.0, beta: float = 0.0
) -> None:
    """OUT = beta · OUT + alpha · Σ PARTS X, of symmetric [N, F, F] and [N, F, ·]; for `out` with
    fewer frames, of the first ones alone.

    Columns are taken for rows: along rows, cuBLAS sums fast only where 8 divides how many numbers
    there are; along columns, only where 8 divides how many columns.
    """
    length = out.shape[1]
    even = length // ROW_MULTIPLE * ROW_MULTIPLE
    if even < length:
        missing = even + ROW_MULTIPLE - length
        weights = [F.pad(part[:, :, even:length], (0, missing)).mT for part in parts]
        found = [terms.product(part, x)[:, : length - even] for part in weights]
        rest, last = alpha * torch.stack(found).sum(0), out[:, even:]
        last.copy_(rest if beta == 0 else rest.add_(last, alpha=beta))
    for part in parts if even else ():
        out[:, :even].baddbmm_(part[:, :, :even].mT, x, beta=beta, alpha=alpha)
        beta = 1.0


def gram(x: Tensor) -> Tensor:
    """Return X Xᵀ, [B, C, C] of [B, C, ·], in float32 (float64 for float64); differentiable."""
    return _Gram.apply(x)


class _Gram(torch.autograd.Function):
    """PyTorch has no derivative for a product with another dtype than its factors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return terms.product(x, x.transpose(1, 2))

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        (grad,) = grads
        return (grad + grad.transpose(1, 2)).to(x.dtype) @ x


# The state, between super-chunks ---------------------------------------------------------------


class State:
    """Σ γ^… eᵀ z over all pairs written so far: [d, h] in float32.

    Reads and writes take [L, ·] of one super-chunk. `reverse` swaps the two weightings, for the
    state that the backward pass carries from the end to the start. What is multiplied with 16-bit
    frames has `precise` two terms, else one.
    """

    def __init__(self, cut: Cut, *, reverse: bool = False, precise: bool = False):
        self.cut = cut
        self.value: Tensor | None = None
        self.reverse = reverse
        self.precise = precise
        self._low: tuple[Tensor, ...] = ()

    def add(self, e: Tensor, z: Tensor, *, first: int = 0) -> None:
        """S = γ^m S + (weight ⊙ E)ᵀ Z, at the end of a super-chunk.

        Args:
            e: [L, d], in z's type or the accumulating one; only rows from `first` on are written.
            z: [L − first, h].
        """
        self._low = ()
        e = self._weighted(e, to_end=not self.reverse)[first:]
        keep = self.cut.carried
        for part in terms.split(e, z.dtype) if e.dtype != z.dtype else (e,):
            self._add(part, z, keep)
            keep = 1.0

    def add_halo(self, e: Tensor, z: Tensor) -> None:
        """S += Eᵀ Z, without weights or decay: pairs that stand at a super-chunk's very edge."""
        self._low = ()
        for part in terms.split(e, z.dtype) if e.dtype != z.dtype else (e,):
            self._add(part, z, 1.0)

    def _add(self, e: Tensor, z: Tensor, keep: float) -> None:
        if self.value is None:
            self.value = terms.product(e.T[None], z[None])[0]
        else:
            terms.product(e.T[None], z[None], out=self.value[None], keep=keep)

    def read(self, z: Tensor, out: Tensor, alpha: float = 1.0, *, weighted: bool = True) -> None:
        """OUT += alpha · weight ⊙ (Z Sᵀ), for OUT [L, d] in z's type or the accumulating one."""
        if self.value is None:
            return
        weighted = weighted and self.cut.decay != 1
        for low in self._as(z.dtype):
            if weighted or out.dtype != z.dtype:
                found = terms.product(z[None], low.T[None])[0]
                found = self._weighted(found, to_end=self.reverse) if weighted else found
                out.add_(found, alpha=alpha)
            else:
                out.addmm_(z, low.T, alpha=alpha)

    def read_transposed(
        self,
        e: Tensor,
        out: Tensor,
        alpha: float = 1.0,
        *,
        weighted: bool = True,
        first: int = 0,
    ) -> None:
        """OUT += alpha · (weight ⊙ E) S, for rows of E from `first` on, and OUT [L − first, h]."""
        if self.value is None:
            return
        if weighted:
            e = self._weighted(e, to_end=self.reverse)
        out.addmm_(e[first:].to(out.dtype), self._as(out.dtype)[0], alpha=alpha)

    def _as(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The state to multiply with, made once between writes."""
        assert self.value is not None
        if not self._low:
            is_split = self.precise and self.value.dtype != dtype
            self._low = terms.split(self.value, dtype) if is_split else (self.value.to(dtype),)
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
