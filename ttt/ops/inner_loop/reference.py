"""The definitions of TTT-Linear and TTT-MLP, and of the convolution before them: frame by frame,
every gradient by autograd.

Signatures are those of `ttt.ops`, less what only says how to compute.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = tuple[Tensor, ...]
Network = Callable[[Tensor, Weights], Tensor]


def ttt_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    w: Tensor,
    b: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    *,
    token_scale: Tensor,
    documents: Tensor | None = None,
) -> tuple[Tensor, Weights]:
    """See `ttt.ops.ttt_linear`."""

    def network(x: Tensor, weights: Weights) -> Tensor:
        w, b = weights
        return torch.einsum("hi,hio->ho", x, w) + b

    return _every_row(network, (q, k, v, eta), (w, b), ln_weight, ln_bias, token_scale, documents)


def ttt_mlp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    *,
    token_scale: Tensor,
    documents: Tensor | None = None,
) -> tuple[Tensor, Weights]:
    """See `ttt.ops.ttt_mlp`."""

    def network(x: Tensor, weights: Weights) -> Tensor:
        w1, b1, w2, b2 = weights
        hidden = F.gelu(torch.einsum("hi,hio->ho", x, w1) + b1, approximate="tanh")
        return torch.einsum("hi,hio->ho", hidden, w2) + b2

    weights = (w1, b1, w2, b2)
    return _every_row(network, (q, k, v, eta), weights, ln_weight, ln_bias, token_scale, documents)


def short_conv(x: Tensor, weight: Tensor, *, documents: Tensor | None = None) -> Tensor:
    """See `ttt.ops.short_conv`."""
    size = weight.shape[1]
    rows = []
    for row in range(x.shape[0]):
        outputs, first = [], 0
        for t in range(x.shape[1]):
            if documents is not None and t > 0 and documents[row, t] != documents[row, t - 1]:
                first = t
            terms = [weight[:, size - 1 - ago] * x[row, max(t - ago, first)] for ago in range(size)]
            outputs.append(torch.stack(terms).sum(0))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def _every_row(
    network: Network,
    frames: Weights,
    weights: Weights,
    ln_weight: Tensor,
    ln_bias: Tensor,
    token_scale: Tensor,
    documents: Tensor | None,
) -> tuple[Tensor, Weights]:
    batch, _, num_frames, _ = frames[0].shape
    rows, states = [], []
    for row in range(batch):
        # Biases have one dimension less than weights; either may come without a batch.
        own = tuple(x[row] if x.dim() == 4 - index % 2 else x for index, x in enumerate(weights))
        edges = [0, num_frames]
        if documents is not None:
            changes = (documents[row, 1:] != documents[row, :-1]).nonzero().flatten() + 1
            edges = [0, *changes.tolist(), num_frames]
        outputs = []
        for start, end in pairwise(edges):
            document = tuple(x[row, :, start:end] for x in frames)
            out, state = _document(network, document, own, ln_weight, ln_bias, token_scale)
            outputs.append(out)
        rows.append(torch.cat(outputs, dim=1))
        states.append(state)
    return torch.stack(rows), tuple(torch.stack(x) for x in zip(*states, strict=True))


def _document(
    network: Network,
    frames: Weights,
    weights: Weights,
    ln_weight: Tensor,
    ln_bias: Tensor,
    token_scale: Tensor,
) -> tuple[Tensor, Weights]:
    """Scan one document of one row; q, k, v are [H, T, f] and eta is [H, T]."""
    q, k, v, eta = frames

    def norm(z: Tensor) -> Tensor:
        return F.layer_norm(z, z.shape[-1:], eps=1e-6) * ln_weight + ln_bias

    def loss_by_head(t: int, weights: Weights) -> Tensor:
        error = norm(network(k[:, t], weights)) - (v[:, t] - k[:, t])
        return 0.5 * error.square().sum(-1)

    outputs = []
    for t in range(q.shape[1]):
        position = t % token_scale.shape[0]
        if position == 0:
            start = tuple(x if x.requires_grad else x.clone().requires_grad_() for x in weights)
            step = tuple(torch.zeros_like(x) for x in weights)
        # Each head's loss depends on its own weights alone, so the sum's gradient is everyone's.
        gradients = torch.autograd.grad(loss_by_head(t, start).sum(), start, create_graph=True)
        step = tuple(
            total + eta[:, t].view(-1, *(1 for _ in g.shape[1:])) * g
            for total, g in zip(step, gradients, strict=True)
        )
        now = tuple(x - token_scale[position] * total for x, total in zip(start, step, strict=True))
        outputs.append(q[:, t] + norm(network(q[:, t], now)))
        if position == token_scale.shape[0] - 1:
            weights = now
    return torch.stack(outputs, dim=1), weights
