"""The definitions: slow, frame by frame, and nothing else to believe in.

The In-Place operators of `ttt.ops` stand here with the same signatures; those of TTT-Linear and
TTT-MLP in `inner_loop`. The fast forms are tested against these, values and gradients.
"""

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
) -> Tensor:
    """See `ttt.ops.in_place_ttt`."""
    batch, num_frames, hidden = z.shape
    rows = []
    for b in range(batch):
        outputs = []
        for t in range(num_frames):
            if t == 0 or _new_document(documents, b, t):
                change = z.new_zeros(v.shape[-1], hidden)
                delta = torch.zeros_like(change)
                frames_in_chunk = 0
            outputs.append(change @ z[b, t])
            delta = delta + torch.outer(v[b, t], z[b, t])
            frames_in_chunk += 1
            if frames_in_chunk == chunk_size:
                norm = delta.norm()
                if max_delta_norm is not None and norm > max_delta_norm:
                    delta = delta * (max_delta_norm / norm)
                change = decay * change + lr * delta
                delta = torch.zeros_like(change)
                frames_in_chunk = 0
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def in_place_delta(
    z: Tensor,
    v: Tensor,
    *,
    beta: Tensor | float,
    chunk_size: int,
    decay: float = 1.0,
    documents: Tensor | None = None,
) -> Tensor:
    """See `ttt.ops.in_place_delta`."""
    batch, num_frames, hidden = z.shape
    rows = []
    for b in range(batch):
        outputs = []
        for t in range(num_frames):
            if t == 0 or _new_document(documents, b, t):
                change = z.new_zeros(v.shape[-1], hidden)
                start = t
            outputs.append(change @ z[b, t])
            if t + 1 - start == chunk_size:
                z_i, v_i = z[b, start : t + 1], v[b, start : t + 1]
                strength = z_i.square().sum(1).mean() / beta
                if strength > 0:
                    matrix = z_i @ z_i.T + strength * torch.eye(chunk_size, dtype=z.dtype)
                    errors = torch.linalg.solve(matrix, v_i - z_i @ change.T)
                    change = decay * change + errors.T @ z_i
                else:
                    change = decay * change
                start = t + 1
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
