"""Cross-entropy of a linear head without ever having all of its logits.

The logits of Moshi's text head are ten times what they are made of, and their loss is taken in
float32. Here a chunk of frames at a time goes through the head, forward and at once backward: what
is kept is the gradient, as large as the head's input, and nothing is computed twice.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ttt.layers import execution
from ttt.layers.blocks import Linear, project

CHUNK_LOGITS = 2**27
"""Logits at once, at most: 4096 frames of Moshi's text head, 0.3 GB in bfloat16."""


def chunked_cross_entropy(
    hidden: Tensor, head: Linear, targets: Tensor, weight: Tensor, *, compile: bool
) -> tuple[Tensor, Tensor]:
    """Σ w · CE of `project(hidden, head)`, with gradient, and CE [N] of every frame, without.

    Args:
        hidden: [N, C].
        targets: [N], classes.
        weight: [N].
        compile: the loss of a chunk, where it has a gradient: in evaluation lengths vary. It
            changes nothing but time and rounding.
    """
    if not torch.is_grad_enabled():
        nll = torch.cat(
            [
                _cross_entropy(project(x, head), target, w)[0]
                for x, target, w in _chunks(head, hidden, targets, weight)
            ]
        )
        return (nll * weight).sum(), nll
    nll, loss = _ChunkedLoss.apply(hidden, targets, weight, compile, head.scaling, *head[:4])
    return loss, nll


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        compile: bool,
        scaling: float,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        needed = ctx.needs_input_grad[5:]
        own = [
            None if p is None else p.detach().requires_grad_(need)
            for p, need in zip(parameters, needed, strict=True)
        ]
        matrix, bias, lora_a, lora_b = own
        assert matrix is not None
        head = Linear(matrix, bias, lora_a, lora_b, scaling)
        trained = [p for p in own if p is not None and p.requires_grad]
        totals = [torch.zeros_like(p, dtype=_wide(p.dtype)) for p in trained]
        d_hidden = torch.empty_like(hidden)
        losses = []
        pieces = _chunks(head, hidden, d_hidden, targets, weight)
        for x, d_x, target, w in pieces:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                logits = project(x, head)
            nll, d_logits = _loss(compile, execution.BACKEND)(logits.detach(), target, w)
            losses.append(nll)
            d_piece, *grads = torch.autograd.grad(logits, [x, *trained], d_logits)
            d_x.copy_(d_piece)
            for total, grad in zip(totals, grads, strict=True):
                total += grad
        nll = torch.cat(losses)
        ctx.mark_non_differentiable(nll)
        ctx.save_for_backward(d_hidden, *totals)
        ctx.dtypes = [p.dtype for p in trained]
        ctx.needed = needed
        return nll, (nll * weight).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_loss = grads[1]
        d_hidden, *totals = ctx.saved_tensors
        found = iter(
            [(total * d_loss).to(dtype) for total, dtype in zip(totals, ctx.dtypes, strict=True)]
        )
        d_parameters = [next(found) if need else None for need in ctx.needed]
        d_hidden = (d_hidden * d_loss).to(d_hidden.dtype)
        return d_hidden, None, None, None, None, *d_parameters


def _chunks(head: Linear, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Rows of all tensors, in chunks of nearly equal length."""
    num_rows, num_classes = len(tensors[0]), head.weight.shape[0]
    num_chunks = -(-num_rows * num_classes // CHUNK_LOGITS)
    length = max(1, -(-num_rows // max(1, num_chunks)))
    return list(zip(*(tensor.split(length) for tensor in tensors), strict=True))


def _cross_entropy(logits: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """CE [n] of logits [n, classes], and the gradient of Σ w · CE in the type of the logits."""
    wide = logits.to(_wide(logits.dtype))
    log_total = torch.logsumexp(wide, dim=-1, keepdim=True)
    nll = (log_total - wide.gather(-1, targets[:, None])).squeeze(-1)
    is_target = torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
    gradient = (torch.exp(wide - log_total) - is_target.to(wide.dtype)) * weight[:, None]
    return nll, gradient.to(logits.dtype)


@cache
def _loss(compile: bool, backend: str) -> Any:
    if not compile:
        return _cross_entropy
    execution.prepare_compilation()
    return torch.compile(_cross_entropy, backend=backend, dynamic=False)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
