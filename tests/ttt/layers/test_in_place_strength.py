"""How strongly an In-Place layer writes, by its learned gate and its learned β."""

import math
from typing import Any

import pytest
import torch
from helpers import tiny_model, tiny_relative_args

from ttt import ops
from ttt.layers.in_place import InPlaceGating


def layer(dtype: torch.dtype = torch.float64) -> InPlaceGating:
    found = tiny_model(tiny_relative_args(write="delta", target="hidden"), dtype=dtype)
    module = found.ttt_layers[0]
    assert isinstance(module, InPlaceGating)
    return module


def log_strength(module: InPlaceGating) -> torch.nn.Parameter:
    return module.ttt_parameters()["log_write_strength"]


def learned(module: InPlaceGating, x: torch.Tensor) -> torch.Tensor:
    """What TTT adds to the MLP's output."""
    gate, up = module.linear_in(x).chunk(2, dim=-1)
    plain = module.linear_out(module.activation(gate) * up)
    added: torch.Tensor = module(x, None, None) - plain
    return added


def test_the_gate_counts_ten_times() -> None:
    """As docs/mathematics.md has it: with another factor, a trained gate would mean another."""
    module, x = layer(), torch.randn(2, 17, 16, dtype=torch.float64)
    module.ttt_parameters()["target_gate"].data.fill_(0.03)
    gate, up = module.linear_in(x).chunk(2, dim=-1)
    source = x / x.square().mean(-1, keepdim=True).sqrt()
    expected = ops.reference.in_place_delta(
        module.activation(gate) * up,
        ops.reference.causal_conv(source, 0.3 * module.target_conv) @ module.target_proj.T,
        beta=10.0,
        chunk_size=5,
        lag=1,
    )
    assert expected.norm() > 0.1
    torch.testing.assert_close(learned(module, x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("strength", "used"), [(0.5, 0.5), (999.0, 999.0), (1e5, 1000.0)])
def test_a_learned_strength_ends_at_1000_and_can_come_back(strength: float, used: float) -> None:
    module = layer()
    log_strength(module).data.fill_(math.log(strength))
    beta = module.write_strength
    assert beta is not None
    assert beta.item() == pytest.approx(used)
    (grad,) = torch.autograd.grad(beta, log_strength(module))
    # Of β to its logarithm: β.
    assert grad.item() == pytest.approx(used)


def test_beyond_the_bound_a_layer_computes_what_it_does_there() -> None:
    module, x = layer(), torch.randn(2, 17, 16, dtype=torch.float64)
    results: list[Any] = []
    for strength in (1000.0, 1e5):
        log_strength(module).data.fill_(math.log(strength))
        out = learned(module, x)
        grad = torch.autograd.grad(out.square().sum(), log_strength(module))[0]
        results.append((out, grad))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
    assert results[1][1].abs() > 1e-9


def test_a_strength_learned_in_bfloat16_is_used_in_float32() -> None:
    module = layer(torch.bfloat16)
    log_strength(module).data.fill_(1.0)
    beta = module.write_strength
    assert beta is not None and beta.dtype == torch.float32
    assert beta.item() == pytest.approx(math.e)
