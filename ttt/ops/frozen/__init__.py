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
from collections.abc import Sequence
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
    rows = x.reshape(1, -1, weight.in_features)
    out = _products(rows, [weight.values], [weight.scales], *weight[3:], weight.kind)
    return out.view(*x.shape[:-1], weight.out_features)


def frozen_products(x: Tensor, weights: Sequence[FrozenWeight]) -> Tensor:
    """The same of K weights of one shape, [K, N, in] to [K, N, out]."""
    values, scales = [each.values for each in weights], [each.scales for each in weights]
    return _products(x, values, scales, *weights[0][3:], weights[0].kind)


@torch.library.custom_op("moshi_ttt::frozen_products", mutates_args=())
def _products(
    x: Tensor,
    values: list[Tensor],
    scales: list[Tensor],
    out_features: int,
    in_features: int,
    kind: str,
) -> Tensor:
    out = x.new_empty(*x.shape[:2], out_features)
    # Each writes to its place: to put the results together would be another pass over them.
    for each in zip(x, values, scales, out, strict=True):
        kind_module(kind).product(*each)
    return out


@torch.library.custom_op("moshi_ttt::frozen_gradients", mutates_args=())
def _gradients(
    d_out: Tensor,
    values: list[Tensor],
    scales: list[Tensor],
    out_features: int,
    in_features: int,
    kind: str,
) -> Tensor:
    d_x = d_out.new_empty(*d_out.shape[:2], in_features)
    for each in zip(d_out, values, scales, d_x, strict=True):
        kind_module(kind).gradient(*each)
    return d_x


@_products.register_fake
def _(
    x: Tensor,
    values: list[Tensor],
    scales: list[Tensor],
    out_features: int,
    in_features: int,
    kind: str,
) -> Tensor:
    return x.new_empty(*x.shape[:2], out_features)


@_gradients.register_fake
def _(
    d_out: Tensor,
    values: list[Tensor],
    scales: list[Tensor],
    out_features: int,
    in_features: int,
    kind: str,
) -> Tensor:
    return d_out.new_empty(*d_out.shape[:2], in_features)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, scales, *ctx.rest = inputs
    ctx.save_for_backward(*values, *scales)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
    kept = list(ctx.saved_tensors)
    values, scales = kept[: len(kept) // 2], kept[len(kept) // 2 :]
    d_x = _gradients(d_out, values, scales, *ctx.rest)
    return d_x, [None] * len(values), [None] * len(scales), None, None, None


_products.register_autograd(_backward, setup_context=_setup_context)
