"""Losses and gradients of a step as one CUDA graph, for models so small that starting a kernel
takes longer than running it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from finetune.step.optim import Optimizer

_WARMUPS = 2
"""Passes before a graph is recorded: kernels are compiled and chosen in them."""


class HasTotal(Protocol):
    """Losses of a batch, with their sum, 0-dimensional, that is trained on."""

    @property
    def total(self) -> Tensor:
        """Return what the gradients are of."""


Losses = TypeVar("Losses", bound=HasTotal)


@dataclass
class _Recorded(Generic[Losses]):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    losses: Losses
    gradients: list[Tensor | None]


class CapturedGradients(Generic[Losses]):
    """Compute the losses of a batch, and the gradients that the optimizer takes.

    On a GPU the first batch of every shape is recorded as a CUDA graph, and the others replay it:
    the same kernels on the same numbers, without Python between them. On a CPU it is a call of
    `compute` and of `backward`.

    Args:
        compute: returns the losses of its tensors. On a GPU it must neither wait for the GPU nor
            read anything that changes from step to step but these tensors and the weights, which
            the optimizer changes in place.
        optimizer: whose gradients these are; it has to take a step after each call.
    """

    def __init__(self, compute: Callable[..., Losses], optimizer: Optimizer) -> None:
        self.compute = compute
        self.masters = [m for masters in optimizer.masters.values() for m in masters]
        self.recorded: dict[tuple[tuple[torch.Size, torch.dtype], ...], _Recorded[Losses]] = {}

    def __call__(self, *inputs: Tensor) -> Losses:
        """Return the losses, which have no gradient any more; the next call overwrites them."""
        if not inputs[0].is_cuda:
            return self._pass(inputs)
        kinds = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if kinds not in self.recorded:
            self.recorded[kinds] = self._record(inputs)
        recorded = self.recorded[kinds]
        for own, given in zip(recorded.inputs, inputs, strict=True):
            own.copy_(given)
        recorded.graph.replay()
        for master, gradient in zip(self.masters, recorded.gradients, strict=True):
            master.grad = gradient
        return recorded.losses

    def _pass(self, inputs: tuple[Tensor, ...]) -> Losses:
        losses = self.compute(*inputs)
        losses.total.backward()
        return losses

    def _record(self, inputs: tuple[Tensor, ...]) -> _Recorded[Losses]:
        inputs = tuple(tensor.clone() for tensor in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARMUPS):
                self._pass(inputs)
                self._drop_gradients()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            losses = self._pass(inputs)
        # What the backward pass kept is not needed again.
        losses.total.detach_()
        gradients = [master.grad for master in self.masters]
        self._drop_gradients()
        return _Recorded(graph, inputs, losses, gradients)

    def _drop_gradients(self) -> None:
        for master in self.masters:
            master.grad = None
