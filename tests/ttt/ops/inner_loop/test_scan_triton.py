"""The kernels of TTT-Linear and TTT-MLP against the plain form, on a CUDA device or interpreted."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreted import (
    DEVICE,
    INTERPRETED,
    calls_the_interpreter,
    on_a_device,
    run_interpreted,
    with_products_of_bfloat16,
)
from test_ttt_linear_mlp import METHODS, every_method, random_inputs
from torch.utils.checkpoint import checkpoint

from ttt.layers.execution import Execution
from ttt.ops.inner_loop import ttt_linear_mlp

pytest.importorskip("triton")


@calls_the_interpreter
def test_kernels_interpreted_on_the_cpu() -> None:
    assert "30 passed" in run_interpreted(__file__)


def moderate_inputs(
    method: str, num_frames: int, size: int, width: int, batched: bool
) -> tuple[list[Any], Any]:
    """As in training: small steps. Wild ones would enlarge float32's rounding without end."""
    arguments, token_scale = random_inputs(
        method, num_frames=num_frames, size=size, width=width, batched=batched
    )
    arguments[3] = 0.3 / size * arguments[3]
    return [x.detach() for x in arguments], token_scale.detach()


def values_and_gradients(
    op: Any,
    arguments: list[Any],
    token_scale: Any,
    dtype: torch.dtype,
    frames_dtype: torch.dtype | None = None,
    **options: Any,
) -> list[Any]:
    """In float64 on the CPU: outputs, final weights, and the gradients of a random sum of them."""
    device = "cpu" if dtype == torch.float64 else DEVICE
    leaves = [
        x.to(device, frames_dtype or dtype if index < 3 else dtype).requires_grad_()
        for index, x in enumerate((*arguments, token_scale))
    ]
    out, state = op(*leaves[:-1], token_scale=leaves[-1], **options)
    generator = torch.Generator().manual_seed(9)
    total = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum()
        for x in (out, *state)
    )
    return [x.cpu().double() for x in (out, *state, *torch.autograd.grad(total, leaves))]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Values and gradients by the kernels, where memory that they leave unwritten is NaN."""

    from ttt.ops.inner_loop import scan_triton

    def run(*args: Any, **options: Any) -> list[Any]:
        with monkeypatch.context() as patch:
            patch.setattr(ttt_linear_mlp, "has_kernel", lambda *_: True)
            if INTERPRETED:
                # The interpreter cannot multiply bfloat16.
                patch.setattr(scan_triton, "SPLIT_TYPES", ())
            # For the filling alone: what else runs may sum in any order.
            torch.use_deterministic_algorithms(True, warn_only=True)
            try:
                return values_and_gradients(*args, **options)
            finally:
                torch.use_deterministic_algorithms(False)

    return run


@on_a_device
@every_method
@pytest.mark.parametrize(
    ("num_frames", "size", "width", "group_size", "batched"),
    [
        (50, 16, 16, 2, False),
        (64, 16, 32, None, True),
        (70, 32, 16, 1, False),
        (150, 16, 16, None, False),
    ],
)
def test_kernels_equal_the_definition(
    method: str,
    num_frames: int,
    size: int,
    width: int,
    group_size: int | None,
    batched: bool,
    kernels: Callable[..., Any],
) -> None:
    """With an incomplete mini-batch at the end and without, groups of several sizes, and blocks
    that a group does not fill."""
    op = METHODS[method][0]
    inputs = moderate_inputs(method, num_frames, size, width, batched)
    exact = values_and_gradients(op, *inputs, torch.float64)
    found = kernels(op, *inputs, torch.float32, scan_checkpoint_group_size=group_size)
    for a, b in zip(found, exact, strict=True):
        assert (a - b).norm() / b.norm() < 1e-5


@on_a_device
@every_method
def test_activation_checkpointing_around_the_kernels_changes_nothing(
    method: str, kernels: Callable[..., Any]
) -> None:
    op = METHODS[method][0]
    inputs = moderate_inputs(method, 40, 16, 16, False)

    def checkpointed(*args: Any, **options: Any) -> Any:
        return checkpoint(op, *args, **options, use_reentrant=False)

    for group_size in (2, None):
        expected = kernels(op, *inputs, torch.float32, scan_checkpoint_group_size=group_size)
        found = kernels(checkpointed, *inputs, torch.float32, scan_checkpoint_group_size=group_size)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


@on_a_device
@every_method
@pytest.mark.parametrize("group_size", [2, None])
def test_a_second_pass_backwards_gives_the_same(
    method: str, group_size: int | None, kernels: Callable[..., Any]
) -> None:
    """Though the first one uses up what the forward pass kept."""
    op = METHODS[method][0]
    inputs = moderate_inputs(method, 40, 16, 16, False)

    def twice(*args: Any, **options: Any) -> tuple[Any, Any]:
        out, state = op(*args, **options)
        leaves = [*args, options["token_scale"]]
        first, second = (torch.autograd.grad(out.sum(), leaves, retain_graph=True) for _ in "12")
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        return out, state

    kernels(twice, *inputs, torch.float32, scan_checkpoint_group_size=group_size)


@on_a_device
@every_method
def test_gradients_of_gradients_are_refused(method: str, kernels: Callable[..., Any]) -> None:
    op = METHODS[method][0]
    inputs = moderate_inputs(method, 16, 16, 16, False)

    def twice(*args: Any, **options: Any) -> tuple[Any, Any]:
        out, state = op(*args, **options)
        (found,) = torch.autograd.grad(out.square().sum(), args[0], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            found.sum().backward()
        return out, state

    kernels(twice, *inputs, torch.float32)


@on_a_device
@pytest.mark.skipif(INTERPRETED, reason="takes long, and asks how much fits on a device")
@pytest.mark.parametrize("frames_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("method", "size", "width"),
    [("linear", 64, 128), ("linear", 16, 64), ("mlp", 32, 128), ("mlp", 32, 64), ("mlp", 16, 128)],
)
def test_the_largest_sizes_run(
    method: str, size: int, width: int, frames_dtype: torch.dtype, kernels: Callable[..., Any]
) -> None:
    """What `has_kernel` claims; the last is that of Moshi 7B."""
    op = METHODS[method][0]
    (q, k, v, *rest), token_scale = moderate_inputs(method, 3 * size - 5, size, width, False)
    inputs = [*(x.to(frames_dtype).double() for x in (q, k, v)), *rest], token_scale
    exact = values_and_gradients(op, *inputs, torch.float64)
    found = kernels(
        op, *inputs, torch.float32, frames_dtype=frames_dtype, scan_checkpoint_group_size=None
    )
    for a, b in zip(found, exact, strict=True):
        assert (a - b).norm() / b.norm() < (1e-5 if frames_dtype == torch.float32 else 5e-3)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Of each pass through a group whether it keeps something, or that it goes backwards."""
    from ttt.ops.inner_loop import scan_triton

    forward, backward, found = scan_triton._forward, scan_triton._backward, []

    def counted_forward(*args: Any, keep: bool) -> Any:
        found.append("keeps" if keep else "discards")
        return forward(*args, keep=keep)

    def counted_backward(*args: Any) -> Any:
        found.append("backwards")
        return backward(*args)

    monkeypatch.setattr(scan_triton, "_forward", counted_forward)
    monkeypatch.setattr(scan_triton, "_backward", counted_backward)
    return found


@on_a_device
@every_method
def test_what_is_kept_is_not_made_again(
    method: str, kernels: Callable[..., Any], passes: list[Any]
) -> None:
    """A group is gone through forwards once, if all is kept; else again by the backward pass."""
    op = METHODS[method][0]

    def without_gradients(*args: Any, **options: Any) -> Any:
        with torch.no_grad():
            op(*args, **options)
        return op(*args, **options)

    inputs = moderate_inputs(method, 40, 16, 16, False)
    for group_size, expected in (
        (None, ["discards", "keeps", "backwards"]),
        (2, 3 * ["discards"] + 2 * ["keeps", "backwards"]),
    ):
        passes.clear()
        kernels(without_gradients, *inputs, torch.float32, scan_checkpoint_group_size=group_size)
        assert passes == expected


@on_a_device
@pytest.mark.parametrize("num_layers", [1, 2])
def test_tensors_may_begin_anywhere_in_memory(
    num_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For pointers that are no multiples of 16 Triton would compile a kernel again, and slower."""
    from ttt.ops.inner_loop import scan_triton

    rests: list[int] = []

    def looked_at(pass_through: Any) -> Any:
        def call(frames: Any, *args: Any, **options: Any) -> Any:
            rests.extend(x.data_ptr() % 16 for x in frames)
            return pass_through(frames, *args, **options)

        return call

    def moved(x: torch.Tensor) -> torch.Tensor:
        longer = x.new_empty(x.numel() + 1)
        longer[1:] = x.flatten()
        return longer[1:].view_as(x)

    generator = torch.Generator().manual_seed(0)
    widths = [16, 16] if num_layers == 1 else [16, 64, 16]
    shapes = 3 * [(1, 2, 2, 16, 16)] + [(1, 2, 2, 16), (2, 16), (2, 16), (16,)]
    for inputs, outputs in itertools.pairwise(widths):
        shapes += [(1, 2, inputs, outputs), (1, 2, outputs)]
    tensors = [0.1 * torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
    d_out = torch.randn(shapes[0], generator=generator).to(DEVICE)
    for name in ("_forward", "_backward"):
        monkeypatch.setattr(scan_triton, name, looked_at(getattr(scan_triton, name)))
    monkeypatch.setattr(scan_triton, "SPLIT_TYPES", ())
    results: list[Any] = []
    for place in (torch.clone, moved):
        leaves = [place(x).requires_grad_() for x in tensors]
        layers = tuple(zip(leaves[7::2], leaves[8::2], strict=True))
        q, k, v, eta, ln_weight, ln_bias, scale = leaves[:7]
        out, _ = scan_triton.scan(
            q,
            k,
            v,
            eta,
            layers,
            ln_weight,
            ln_bias,
            token_scale=scale,
            num_writes=2,
            group_size=None,
        )
        results.append([out, *torch.autograd.grad(out, leaves, place(d_out))])
    assert rests and not any(rests)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@on_a_device
@every_method
@pytest.mark.parametrize("may_keep", [False, True])
def test_a_layer_that_is_made_again_keeps_all_before_or_nothing(
    method: str, may_keep: bool, kernels: Callable[..., Any], passes: list[Any]
) -> None:
    """With two uses of the operator, each of what it has kept for itself."""
    op, execution = METHODS[method][0], Execution(checkpointing=True)

    def twice(q: Any, *args: Any, **options: Any) -> Any:
        out, _ = op(q, *args, **options)
        return op(q + out, *args, **options)

    def in_a_layer(*args: Any, **options: Any) -> Any:
        def layer(*tensors: Any) -> Any:
            return twice(*tensors, **options)

        return execution.split_layer(layer, *args, may_keep=may_keep)

    inputs = moderate_inputs(method, 40, 16, 16, False)
    expected = kernels(twice, *inputs, torch.float32, scan_checkpoint_group_size=None)
    passes.clear()
    found = kernels(in_a_layer, *inputs, torch.float32, scan_checkpoint_group_size=None)
    forwards = ["keeps"] * 2 if may_keep else ["discards"] * 2 + ["keeps"] * 2
    assert passes == [*forwards, "backwards", "backwards"]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@on_a_device
@every_method
def test_weights_are_rebuilt_through_many_mini_batches(
    method: str, kernels: Callable[..., Any]
) -> None:
    """Backwards those of a start come from those of the end, by as many additions."""
    op = METHODS[method][0]
    count = 25 if INTERPRETED else 150
    (*arguments,), token_scale = moderate_inputs(method, 16 * count, 16, 16, False)
    arguments = [x[:1] if index < 4 else x for index, x in enumerate(arguments)]
    exact = values_and_gradients(op, arguments, token_scale, torch.float64)
    found = kernels(op, arguments, token_scale, torch.float32, scan_checkpoint_group_size=None)
    for a, b in zip(found, exact, strict=True):
        assert (a - b).norm() / b.norm() < 2e-5


@on_a_device
@every_method
def test_frames_of_16_bits_are_computed_in_float32(
    method: str, kernels: Callable[..., Any]
) -> None:
    op = METHODS[method][0]
    (q, k, v, *rest), token_scale = moderate_inputs(method, 48, 16, 16, False)
    inputs = [*(x.bfloat16().double() for x in (q, k, v)), *rest], token_scale
    exact = values_and_gradients(op, *inputs, torch.float64)
    found = kernels(op, *inputs, torch.float32, frames_dtype=torch.bfloat16)
    for a, b in zip(found, exact, strict=True):
        assert (a - b).norm() / b.norm() < 5e-3


@on_a_device
@pytest.mark.skipif(not INTERPRETED, reason="bounds of sums in the interpreter's order")
@every_method
def test_fast_weights_have_more_digits_than_frames(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors of products are two terms of 16 bits: with one alone, or with one of the products of
    terms left out, the fast weights would be further off."""
    op = METHODS[method][0]
    (q, k, v, *rest), token_scale = moderate_inputs(method, 80, 16, 16, False)
    frames, rest = [x.bfloat16().double() for x in (q, k, v)], [x.double() for x in rest]
    with torch.no_grad():
        _, exact = op(*frames, *rest, token_scale=token_scale.double())
        monkeypatch.setattr(ttt_linear_mlp, "has_kernel", lambda *_: True)
        with_products_of_bfloat16(monkeypatch)
        arguments = [x.bfloat16() for x in frames] + [x.float() for x in rest]
        _, found = op(*arguments, token_scale=token_scale.float())
    for a, b in zip(found, exact, strict=True):
        # Below 2⁻¹⁶; with one term alone it would be 2⁻⁸ of each product.
        assert (a - b).norm() / b.norm() < 1e-5
