"""What operators keep for the second forward pass of a layer that is made again."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from ttt.layers.execution import Execution
from ttt.ops import recompute


class _Double(torch.autograd.Function):
    """Twice x; it keeps its result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        made = recompute.kept()
        out = 2 * x if made is None else made[0]
        if recompute.may_keep():
            recompute.keep((out,))
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return 2 * grads[0] + 0 * out


def kept_tensors() -> list[Any]:
    passes = [x for x in gc.get_objects() if isinstance(x, recompute._Pass)]
    return [x.shelf for x in passes if x.shelf]


@pytest.mark.parametrize("is_followed", [True, False])
def test_what_was_kept_is_gone_with_the_layer(is_followed: bool) -> None:
    """Also where no backward pass follows, as after an error: the next try would have no room."""
    x = torch.randn(4, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        return _Double.apply(x * x) + 1

    out = Execution(checkpointing=True).split_layer(layer, x, may_keep=True)
    assert kept_tensors()
    if is_followed:
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(gradient, 4 * x)
    del out
    gc.collect()
    assert not kept_tensors()
