"""The kernels of TTT-Linear and TTT-MLP against the plain form, on a CUDA device or interpreted."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreted import DEVICE, INTERPRETED, calls_the_interpreter, on_a_device, run_interpreted
from test_ttt_linear_mlp import METHODS, every_method, random_inputs
from torch.utils.checkpoint import checkpoint

from ttt.layers.execution import Execution
from ttt.ops.inner_loop import ttt_linear_mlp

pytest.importorskip("triton")


@calls_the_interpreter
def test_kernels_interpreted_on_the_cpu() -> None:
    assert "24 passed" in run_interpreted(__file__)


PIECES = "lane = [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]]"
"""Of four rows eight threads each, a thread two neighbors of a row: how tensor cores take them."""


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("name, parts, size", [("forward", 2, 16), ("backward", 4, 16)])
def test_threads_hold_what_they_turn(name: str, parts: int, size: int) -> None:
    """Of compiled code, which needs no GPU: Triton chooses which thread holds what, and an
    instruction that turns pieces of 8 x 8 is right for one choice only. (For pointers that are no
    multiples of 16 it chooses another; see the test of tensors anywhere in memory.)"""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ttt.ops.inner_loop import kernels, mlp_backward

    kernel = getattr(kernels if name == "forward" else mlp_backward, f"mlp_{name}")
    constants: dict[str, Any] = {
        "EPS": 1e-6,
        "K": size,
        "F": 128,
        "D": 512,
        "TILE": 16,
        "SPLIT": True,
    }
    constants |= {"PARTS": parts, **({"KEEP": True} if name == "forward" else {})}
    frames = ("q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v")
    signature = {
        key: "constexpr"
        if key in constants
        else "i32"
        if key in (*kernels.COUNTS, "num_units")
        else "*bf16"
        if key in frames
        else "*fp32"
        for key in kernel.arg_names
    }
    places = {key: (index,) for index, key in enumerate(kernel.arg_names)}
    aligned = [["tt.divisibility", 16]]
    code = triton.compile(
        ASTSource(
            kernel,
            signature,
            {places[key]: value for key, value in constants.items()},
            {places[key]: aligned for key, kind in signature.items() if kind.startswith("*")},
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": parts, "num_stages": 1},
    ).asm["ttgir"]
    layouts = set(re.findall(r"movmatrix.*?-> tensor<[^>]*, (#\w+)>", code))
    assert layouts
    for layout in layouts:
        (definition,) = re.findall(rf"^{layout} = (.*)$", code, re.MULTILINE)
        is_product = "nvidia_mma<{versionMajor = 2" in definition and "[1, 16, 8]" in definition
        assert is_product or ("register = [[0, 0, 1]," in definition and PIECES in definition)


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
    [(50, 16, 16, 2, False), (64, 16, 32, None, True), (70, 32, 16, 1, False)],
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
    """With an incomplete mini-batch at the end and without, groups of several sizes."""
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
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Of each launch the direction, and whether it keeps something."""
    from ttt.ops.inner_loop import scan_triton

    launch, found = scan_triton._launch, []

    def counted(kernel: Any, *args: Any, **options: Any) -> Any:
        found.append((kernel.__name__.split("_")[1], options.get("KEEP")))
        return launch(kernel, *args, **options)

    monkeypatch.setattr(scan_triton, "_launch", counted)
    return found


@on_a_device
@every_method
def test_what_is_kept_is_not_made_again(
    method: str, kernels: Callable[..., Any], passes: list[tuple[Any, Any]]
) -> None:
    """A group is gone through forwards once, if all is kept; else again by the backward pass."""
    op = METHODS[method][0]

    def without_gradients(*args: Any, **options: Any) -> Any:
        with torch.no_grad():
            op(*args, **options)
        return op(*args, **options)

    inputs = moderate_inputs(method, 40, 16, 16, False)
    for group_size, expected in (
        (None, [("forward", False), ("forward", True), ("backward", None)]),
        (2, 3 * [("forward", False)] + 2 * [("forward", True), ("backward", None)]),
    ):
        passes.clear()
        kernels(without_gradients, *inputs, torch.float32, scan_checkpoint_group_size=group_size)
        assert passes == expected


@on_a_device
@pytest.mark.parametrize("num_layers", [1, 2])
def test_tensors_may_begin_anywhere_in_memory(
    num_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton compiles a kernel otherwise for pointers that are no multiples of 16, and then other
    threads hold what is turned: it must not come to that."""
    from ttt.ops.inner_loop import scan_triton

    launch = scan_triton._launch
    rests: list[int] = []

    def looked_at(kernel: Any, frames: Any, others: Any, *args: Any, **options: Any) -> Any:
        rests.extend(x.data_ptr() % 16 for x in (*frames, *others))
        return launch(kernel, frames, others, *args, **options)

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
    monkeypatch.setattr(scan_triton, "_launch", looked_at)
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
def test_a_layer_that_is_made_again_keeps_nothing_before(
    method: str, kernels: Callable[..., Any], passes: list[tuple[Any, Any]]
) -> None:
    op, execution = METHODS[method][0], Execution(checkpointing=True)

    def in_a_layer(*args: Any, **options: Any) -> Any:
        return execution.split_layer(
            lambda *tensors: op(*tensors, **options), *args, may_keep=False
        )

    inputs = moderate_inputs(method, 40, 16, 16, False)
    expected = kernels(op, *inputs, torch.float32, scan_checkpoint_group_size=None)
    passes.clear()
    found = kernels(in_a_layer, *inputs, torch.float32, scan_checkpoint_group_size=None)
    assert passes == [("forward", False), ("forward", True), ("backward", None)]
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
