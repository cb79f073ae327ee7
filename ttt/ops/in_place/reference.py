"""These reference implementations are the definitions: slow, simple, frame by frame.

The In-Place operators of `ttt.ops` stand here with the same signatures; those of TTT-Linear and
TTT-MLP in `inner_loop`. The fast forms are tested against these, values and gradients.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def in_place_ttt(
    z: Tensor,
    v: Tensor,
    *,
    lr: float,
    chunk_size: int,
    max_delta_norm: float | None = None,
    documents: Tensor | None = None,
    decay: float = 1.0,
    lag: int = 0,
) -> Tensor:
    """Return what the fast weights add, with `write: sum`, by its definition.

    For each chunk, with its keys K and targets V, S ← γ S + η clip(Vᵀ K). Arguments as for
    `ttt.ops.in_place_ttt`.
    """

    def write(change: Tensor, keys: Tensor, targets: Tensor) -> Tensor:
        delta = targets.T @ keys
        norm = delta.norm()
        if max_delta_norm is not None and norm > max_delta_norm:
            delta = delta * (max_delta_norm / norm)
        return decay * change + lr * delta

    return _read_and_write(z, v, write, chunk_size, documents, lag)


def in_place_delta(
    z: Tensor,
    v: Tensor,
    *,
    beta: Tensor | float,
    chunk_size: int,
    decay: float = 1.0,
    documents: Tensor | None = None,
    lag: int = 0,
    written: Tensor | None = None,
) -> Tensor:
    """Return what the fast weights add, with `write: delta`, by its definition.

    For each chunk, with the keys K and targets V of the pairs that are written and whose keys are
    not zero,

        E = (K Kᵀ + λ I)⁻¹ (V − K Sᵀ),   λ = mean ‖k‖² / β,   S ← γ S + Eᵀ K,

    and S ← γ S without any such pair. A key of zeros has no gradient by what it would write: it is
    not the limit of small keys, which count in the mean, so that the rule jumps there.
    Arguments as for `ttt.ops.in_place_delta`.
    """

    def write(change: Tensor, keys: Tensor, targets: Tensor) -> Tensor:
        is_key = (keys != 0).any(1)
        keys, targets = keys[is_key], targets[is_key]
        if len(keys) == 0:
            return decay * change
        strength = keys.square().sum(1).mean() / beta
        matrix = keys @ keys.T + strength * torch.eye(len(keys), dtype=z.dtype)
        errors = torch.linalg.solve(matrix, targets - keys @ change.T)
        return decay * change + errors.T @ keys

    return _read_and_write(z, v, write, chunk_size, documents, lag, written)


def _read_and_write(
    z: Tensor,
    v: Tensor,
    write: Callable[[Tensor, Tensor, Tensor], Tensor],
    chunk_size: int,
    documents: Tensor | None,
    lag: int,
    written: Tensor | None = None,
) -> Tensor:
    """Frame by frame: read with z_t; keep the pair that is complete at t, the key z_{t − lag} and
    the target v_t; and write the pairs of a chunk when it has ended."""
    batch, num_frames, hidden = z.shape
    rows = []
    for b in range(batch):
        outputs = []
        for t in range(num_frames):
            if t == 0 or _new_document(documents, b, t):
                change = z.new_zeros(v.shape[-1], hidden)
                start, pairs = t, []
            outputs.append(change @ z[b, t])
            if t - lag >= start and (written is None or written[b, t]):
                pairs.append((z[b, t - lag], v[b, t]))
            if (t + 1 - start) % chunk_size == 0:
                keys, targets = z.new_zeros(0, hidden), v.new_zeros(0, v.shape[-1])
                if pairs:
                    keys, targets = (torch.stack(x) for x in zip(*pairs, strict=True))
                change, pairs = write(change, keys, targets), []
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def causal_conv(x: Tensor, weight: Tensor, *, documents: Tensor | None = None) -> Tensor:
    """See `ttt.ops.causal_conv`."""
    batch, num_frames, _ = x.shape
    kernel_size = weight.shape[-1]
    rows = []
    for b in range(batch):
        outputs = []
        for t in range(num_frames):
            if t == 0 or _new_document(documents, b, t):
                start = t
            total = torch.zeros_like(x[b, t])
            for k in range(kernel_size):
                s = t - (kernel_size - 1) + k
                if s >= start:
                    total = total + weight[:, k] * x[b, s]
            outputs.append(total)
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def chunk_conv(
    x: Tensor,
    weight: Tensor,
    *,
    chunk_size: int,
    lookahead: int,
    documents: Tensor | None = None,
) -> Tensor:
    """See `ttt.ops.chunk_conv`."""
    batch, num_frames, _ = x.shape
    kernel_size = weight.shape[-1]
    rows = []
    for b in range(batch):
        chunk_of, chunk, frames_in_chunk = [], -1, chunk_size
        for t in range(num_frames):
            if frames_in_chunk == chunk_size or t == 0 or _new_document(documents, b, t):
                chunk, frames_in_chunk = chunk + 1, 0
            chunk_of.append(chunk)
            frames_in_chunk += 1
        outputs = []
        for t in range(num_frames):
            total = torch.zeros_like(x[b, t])
            for k in range(kernel_size):
                s = t - (kernel_size - 1 - lookahead) + k
                if 0 <= s < num_frames and chunk_of[s] == chunk_of[t]:
                    total = total + weight[:, k] * x[b, s]
            outputs.append(total)
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def _new_document(documents: Tensor | None, b: int, t: int) -> bool:
    return documents is not None and bool(documents[b, t] != documents[b, t - 1])
