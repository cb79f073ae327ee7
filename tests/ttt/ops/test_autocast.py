"""Under `torch.autocast` the operators compute what they compute without it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    random_codes,
    tiny_args,
    tiny_linear_args,
    tiny_model,
    tiny_relative_args,
)
from torch import Tensor

import ttt
from ttt import TTTArgs, ops
from ttt.ops.autocast import without_autocast

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
Op = Callable[..., Tensor]
NUM_FRAMES = 40


def in_chunks(op: Op, **options: Any) -> Op:
    return lambda z, v: op(z, v, chunk_size=8, **options)


def inner(op: Any) -> Op:
    """An operator of one head, of 16 wide as the kernels take it, with all else made up."""

    def call(z: Tensor, v: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        q, k, x = z[:, None], z[:, None].flip(-1), v[:, None]
        widths = [16, 16] if op is ops.ttt_linear else [16, 64, 16]
        weights: list[Tensor] = []
        for index in range(len(widths) - 1):
            w = torch.randn(1, *widths[index : index + 2], generator=generator)
            weights += [0.2 * w, torch.zeros(1, widths[index + 1])]
        norm = [torch.ones(1, 16), torch.zeros(1, 16)]
        rest = [y.to(z) for y in (torch.full((1, 1, NUM_FRAMES), 0.1), *weights, *norm)]
        rest[0] = rest[0].expand(len(z), -1, -1)
        out, state = op(q, k, x, *rest, token_scale=1 / torch.arange(1, 17).to(z))
        return torch.cat([out[:, 0].flatten(), *(y.flatten() for y in state)])

    return call


OPERATORS: dict[str, Op] = {
    "sum": in_chunks(ops.in_place_ttt, lr=1.0, lag=1, decay=0.9),
    "sum, bounded": in_chunks(ops.in_place_ttt, lr=1.0, max_delta_norm=5.0),
    "delta": in_chunks(ops.in_place_delta, beta=100.0, lag=1, decay=0.9),
    "linear": inner(ops.ttt_linear),
    "mlp": inner(ops.ttt_mlp),
    "one chunk of sum": lambda z, v: ops.chunk_delta(z, v, max_delta_norm=5.0),
    "one chunk of delta": lambda z, v: ops.chunk_errors(z, v, 100.0),
}
DIFFERENTIATED = ("sum", "sum, bounded", "delta", "linear", "mlp")


def inputs(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    z, v = torch.randn(2, 2, NUM_FRAMES, 16).to(device, dtype)
    return z.requires_grad_(), v.requires_grad_()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_as_without_autocast(name: str, device: str) -> None:
    z, v = inputs(device)
    plain = OPERATORS[name](z, v)
    with torch.autocast(device, torch.bfloat16):
        found = OPERATORS[name](z, v)
        assert torch.get_autocast_dtype(device) == torch.bfloat16
        assert torch.is_autocast_enabled(device)
    assert found.dtype == plain.dtype
    assert torch.equal(found, plain)
    if name in DIFFERENTIATED:
        weights = torch.randn_like(plain)
        grads = [torch.autograd.grad(x, (z, v), weights) for x in (plain, found)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["sum", "sum, bounded", "delta"])
def test_a_backward_pass_within_autocast_is_as_one_outside(name: str, device: str) -> None:
    z, v = inputs(device)
    out = OPERATORS[name](z, v)
    weights = torch.randn_like(out)
    plain = torch.autograd.grad(out, (z, v), weights, retain_graph=True)
    with torch.autocast(device, torch.bfloat16):
        found = torch.autograd.grad(out, (z, v), weights)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


@pytest.mark.parametrize("rule", ["sum", "delta"])
@pytest.mark.parametrize("kinds", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_inputs_of_two_types_are_taken_in_the_wider(rule: str, kinds: tuple[str, str]) -> None:
    """As autocast makes them: what passed a linear layer has 16 bits, what passed a norm has 32."""
    z, v = inputs("cpu")
    z, v = (x.detach().bfloat16() for x in (z, v))
    z, v = z.to(getattr(torch, kinds[0])), v.to(getattr(torch, kinds[1]))
    z.requires_grad_(), v.requires_grad_()
    found = OPERATORS[rule](z, v)
    wide = OPERATORS[rule](z.float(), v.float())
    assert found.dtype == torch.float32
    assert torch.equal(found, wide)
    found.square().sum().backward()
    assert [x.grad.dtype for x in (z, v) if x.grad is not None] == [x.dtype for x in (z, v)]


MODELS: dict[str, TTTArgs] = {
    "sum": tiny_args(),
    "delta": tiny_relative_args(write="delta", target="hidden"),
    "linear": tiny_linear_args(),
    "mlp": tiny_linear_args(method="mlp", base_lr=0.4),
}
each_model = pytest.mark.parametrize("args", [pytest.param(v, id=k) for k, v in MODELS.items()])


@each_model
def test_models_of_the_type_of_autocast_are_as_without_it(args: TTTArgs) -> None:
    """Also as streams, whose state is float32 whatever the model is."""
    model, codes = tiny_model(args, dtype=torch.bfloat16, context=NUM_FRAMES), random_codes()

    def results() -> list[Tensor]:
        with torch.no_grad(), model.streaming(2):
            parts = [model.forward_text(part)[1] for part in codes.split([7, 1, 15], dim=2)]
            state = ttt.get_state(model)
        with ttt.measuring(model) as measured:
            logits = model(codes).text_logits
        return [logits, *parts, *state.values(), *measured.values()]

    plain = results()
    with torch.autocast("cpu", torch.bfloat16):
        found = results()
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@each_model
def test_a_model_of_32_bits_trains_under_autocast(args: TTTArgs) -> None:
    """To the digits that its own linear layers keep."""
    model, codes = tiny_model(args, dtype=torch.float32), random_codes()
    plain = model(codes).text_logits
    with torch.autocast("cpu", torch.bfloat16):
        found = model(codes).text_logits
    assert (found - plain).norm() < 0.04 * plain.norm()
    found.float().square().mean().backward()
    for name, parameter in ttt.ttt_parameters(model).items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("enabled", [False, True])
def test_what_is_so_marked_can_be_compiled_as_a_whole(enabled: bool) -> None:
    """Parts of a layer are: PyTorch's compiler reads what stands around them, too."""
    product = without_autocast(torch.mm)
    compiled = torch.compile(product, backend="eager", fullgraph=True)
    x = torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        assert torch.equal(compiled(x, x), product(x, x))
        assert compiled(x, x).dtype == torch.float32
