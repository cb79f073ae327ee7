"""What the operators refuse, and what they make of nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ttt import ops

Z, V = torch.ones(2, 9, 4), torch.ones(2, 9, 3)
TAPS = torch.ones(3, 2)


def add(z: Tensor = Z, v: Tensor = V, **options: Any) -> Tensor:
    return ops.in_place_ttt(z, v, **{"lr": 1.0, "chunk_size": 4, **options})


def delta(z: Tensor = Z, v: Tensor = V, **options: Any) -> Tensor:
    return ops.in_place_delta(z, v, **{"beta": 10.0, "chunk_size": 4, **options})


def linear(num_frames: int = 9, size: Any = (4,), **options: Any) -> Any:
    x, rate = torch.ones(2, 1, num_frames, 4), torch.ones(2, 1, num_frames)
    w, b, scale = torch.ones(1, 4, 4), torch.ones(1, 4), torch.ones(size)
    return ops.ttt_linear(x, x, x, rate, w, b, b, b, token_scale=scale, **options)


def mlp(num_frames: int = 9, **options: Any) -> Any:
    x, rate = torch.ones(2, 1, num_frames, 4), torch.ones(2, 1, num_frames)
    inner = torch.ones(1, 4, 16), torch.ones(1, 16), torch.ones(1, 16, 4), torch.ones(1, 4)
    norm = torch.ones(1, 4), torch.ones(1, 4)
    return ops.ttt_mlp(x, x, x, rate, *inner, *norm, token_scale=torch.ones(4), **options)


REFUSED: dict[str, Callable[[], Any]] = {
    "beta: must be more than 0, got 0.0": lambda: delta(beta=0.0),
    "beta: must be more than 0, got -1.0": lambda: delta(beta=-1.0),
    "beta: must be more than 0, got nan": lambda: ops.chunk_errors(Z, V, float("nan")),
    "beta: must be a number, or a tensor of one element, got [2]": lambda: delta(
        beta=torch.ones(2)
    ),
    "chunk_size: must be at least 1, got 0": lambda: delta(chunk_size=0),
    "chunk_size: must be at least 1, got -1": lambda: add(chunk_size=-1),
    "chunk_size: must be at least 1, got -2": lambda: ops.chunk_conv(
        V, TAPS, chunk_size=-2, lookahead=0
    ),
    "lag: must lie between 0 and chunk_size - 1 = 3, got 4": lambda: add(lag=4),
    "lag: must lie between 0 and chunk_size - 1 = 3, got -1": lambda: delta(lag=-1),
    "decay: must lie between 0 and 1, got 1.5": lambda: delta(decay=1.5),
    "decay: must lie between 0 and 1, got -0.5": lambda: add(decay=-0.5),
    "max_delta_norm: must be more than 0, or None, got 0.0": lambda: add(max_delta_norm=0.0),
    "max_delta_norm: must be more than 0, or None, got -1.0": lambda: ops.chunk_delta(
        Z, V, max_delta_norm=-1.0
    ),
    "lookahead: must lie between 0 and K - 1 = 1, got 5": lambda: ops.chunk_conv(
        V, TAPS, chunk_size=4, lookahead=5
    ),
    "z: must be [B, T, h], got [9, 4]": lambda: delta(Z[0], V[0]),
    "v: must be [B, T, d] with z's [2, 9] as [B, T], got [2, 8, 3]": lambda: add(v=V[:, :8]),
    "documents: must be [B, T] = [2, 9], got [9]": lambda: add(documents=torch.ones(9)),
    "written: must be [B, T] = [2, 9], got [2, 8]": lambda: delta(written=torch.ones(2, 8) > 0),
    "projection: must be [d, d] = [3, 3], got [4, 3]": lambda: delta(projection=torch.ones(4, 3)),
    "token_scale: must be [K], of at least one frame, got [0]": lambda: linear(size=(0,)),
    "token_scale: must be [K], of at least one frame, got [4, 1]": lambda: linear(size=(4, 1)),
    "scan_checkpoint_group_size: must be at least 1, or None, got 0": lambda: mlp(
        scan_checkpoint_group_size=0
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_out_of_range_is_named(message: str) -> None:
    with pytest.raises(ValueError) as caught:
        REFUSED[message]()
    assert str(caught.value) == message


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("op", [add, delta])
def test_the_in_place_rules_make_nothing_of_nothing(op: Any, packed: bool) -> None:
    documents = torch.zeros(2, 0, dtype=torch.long) if packed else None
    z = torch.ones(2, 0, 4, requires_grad=True)
    out = op(z, V[:, :0], documents=documents)
    assert out.shape == (2, 0, 3)
    out.sum().backward()
    assert z.grad is not None and z.grad.shape == z.shape


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("op", [linear, mlp])
@pytest.mark.parametrize("group_size", [None, 2])
def test_the_inner_loops_make_nothing_of_nothing(op: Any, packed: bool, group_size: Any) -> None:
    """And their weights stay as they are."""
    documents = torch.zeros(2, 0, dtype=torch.long) if packed else None
    out, weights = op(0, scan_checkpoint_group_size=group_size, documents=documents)
    assert out.shape == (2, 1, 0, 4)
    assert all(w.shape[:2] == (2, 1) and bool((w == 1).all()) for w in weights)


@pytest.mark.parametrize("packed", [False, True])
def test_convolutions_make_nothing_of_nothing(packed: bool) -> None:
    documents, none = torch.zeros(2, 0, dtype=torch.long) if packed else None, V[:, :0]
    for out in (
        ops.short_conv(none, TAPS, documents=documents),
        ops.causal_conv(none, TAPS, documents=documents),
        ops.chunk_conv(none, TAPS, chunk_size=4, lookahead=1, documents=documents),
    ):
        assert out.shape == none.shape


@pytest.mark.parametrize("op", [add, delta])
def test_there_is_no_gradient_of_a_gradient_and_it_is_said(op: Any) -> None:
    z = Z.clone().requires_grad_()
    (grad,) = torch.autograd.grad(op(z).square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()
