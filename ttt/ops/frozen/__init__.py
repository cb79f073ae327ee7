"""Products with weights that do not train, which are kept in fewer bits than they are used in.

    float8   e4m3, with a scale for every row [out]; the arithmetic is in 8 bits as well
    nf4      NormalFloat of 4 bits, with a scale for every 64 weights; the arithmetic is in the type
             of the input

`KINDS` is the only list of them. A kind is a module with the four functions that `reference.py`
has for both, and stores a weight once: the forward pass, its recomputation and the gradient of the
input all read the same bits.

A frame's result depends on that frame alone, whatever else is in the sequence: so a stream computes
what training did, and no later frame is seen.
"""

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

KINDS = {"float8": "ttt.ops.frozen.float8", "nf4": "ttt.ops.frozen.nf4"}


class FrozenWeight(NamedTuple):
    """A weight [out, in] in fewer bits."""

    kind: str
    values: Tensor
    scales: Tensor
    out_features: int
    in_features: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))


class Layout(NamedTuple):
    """Shapes and types of the two tensors that a weight is kept in."""

    values: tuple[tuple[int, ...], torch.dtype]
    scales: tuple[tuple[int, ...], torch.dtype]


def kind_module(kind: str) -> ModuleType:
    return importlib.import_module(KINDS[kind])


def layout(kind: str, out_features: int, in_features: int) -> Layout:
    found: Layout = kind_module(kind).layout(out_features, in_features)
    return found


def freeze(weight: Tensor, kind: str) -> FrozenWeight:
    """Return a weight [out, in] in fewer bits."""
    values, scales = kind_module(kind).quantize(weight.detach())
    return FrozenWeight(kind, values, scales, *weight.shape)


def thaw(weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
    """Return the matrix [out, in] that a frozen weight stands for."""
    found: Tensor = kind_module(weight.kind).dequantize(*weight[1:], dtype)
    return found


def frozen_product(x: Tensor, weight: FrozenWeight) -> Tensor:
    """x Wᵀ, [..., in] to [..., out], with a gradient for x."""
    rows = x.reshape(-1, weight.in_features)
    out = _product(rows, *weight[1:], weight.kind)
    return out.unflatten(0, x.shape[:-1])


@torch.library.custom_op("moshi_ttt::frozen_product", mutates_args=())
def _product(
    x: Tensor, values: Tensor, scales: Tensor, out_features: int, in_features: int, kind: str
) -> Tensor:
    found: Tensor = kind_module(kind).product(x, values, scales, out_features, in_features)
    return found


@torch.library.custom_op("moshi_ttt::frozen_gradient", mutates_args=())
def _gradient(
    d_out: Tensor, values: Tensor, scales: Tensor, out_features: int, in_features: int, kind: str
) -> Tensor:
    found: Tensor = kind_module(kind).gradient(d_out, values, scales, out_features, in_features)
    return found


@_product.register_fake
def _(
    x: Tensor, values: Tensor, scales: Tensor, out_features: int, in_features: int, kind: str
) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


@_gradient.register_fake
def _(
    d_out: Tensor, values: Tensor, scales: Tensor, out_features: int, in_features: int, kind: str
) -> Tensor:
    return d_out.new_empty(d_out.shape[0], in_features)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, scales, *ctx.rest = inputs
    ctx.save_for_backward(values, scales)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    values, scales = ctx.saved_tensors
    return _gradient(d_out, values, scales, *ctx.rest), None, None, None, None, None


_product.register_autograd(_backward, setup_context=_setup_context)
