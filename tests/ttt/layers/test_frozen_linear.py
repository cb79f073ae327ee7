"""Frozen layers where PyTorch moves, casts, saves and loads modules."""

import pytest
import torch
from torch import nn

from ttt.layers.frozen import FrozenLinear

KINDS = pytest.mark.parametrize("kind", ["float8", "nf4"])


def frozen(kind: str, device: str = "cpu") -> FrozenLinear:
    torch.manual_seed(0)
    return FrozenLinear(nn.Linear(128, 64, bias=False, device=device, dtype=torch.bfloat16), kind)


@KINDS
def test_its_own_state_is_taken(kind: str) -> None:
    layer = frozen(kind)
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    for other in (frozen(kind, "meta"), frozen(kind)):
        found = other.load_state_dict(layer.state_dict())
        assert not found.missing_keys and not found.unexpected_keys
        assert other.is_filled
        assert torch.equal(other(x), layer(x))


@pytest.mark.filterwarnings("ignore:for values")
@KINDS
def test_half_of_a_state_is_not_enough(kind: str) -> None:
    state = {"values": frozen(kind).values}
    layer = frozen(kind, "meta")
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(state)
    assert not layer.is_filled


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_cast_changes_the_type_that_the_weight_stands_for(kind: str, dtype: torch.dtype) -> None:
    layer = frozen(kind)
    types, before = (layer.values.dtype, layer.scales.dtype), layer.thawed(torch.float32)
    layer.to(dtype)
    assert (layer.values.dtype, layer.scales.dtype) == types
    assert layer.thawed().dtype == dtype
    assert torch.equal(layer.thawed(torch.float32), before)
    assert nn.Sequential(frozen(kind, "meta")).to_empty(device="cpu")[0].is_filled
