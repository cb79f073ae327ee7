"""TTT-Linear and TTT-MLP against their frame-by-frame definitions; RoPE; memory."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moshi.modules.rope import apply_rope

from ttt import ops
from ttt.ops.inner_loop import reference as reference_linear
from ttt.ops.inner_loop.ttt_linear_mlp import SMALL_SIZE

METHODS: dict[str, Any] = {
    "linear": (ops.ttt_linear, reference_linear.ttt_linear, 1e-10),
    "mlp": (ops.ttt_mlp, reference_linear.ttt_mlp, 1e-8),
}
every_method = pytest.mark.parametrize("method", METHODS)


def random_inputs(
    method: str,
    seed: int = 0,
    num_frames: int = 13,
    size: int = 4,
    batch: int = 2,
    heads: int = 2,
    width: int = 4,
    batched: bool = False,
) -> tuple[list[Any], Any]:
    """Positional arguments (leaves that require gradients), and `token_scale`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: Any, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    widths = [width, width] if method == "linear" else [width, 4 * width, width]
    lead = (batch, heads) if batched else (heads,)
    frames = [normal(batch, heads, num_frames, width) for _ in "qkv"]
    eta = torch.rand(batch, heads, num_frames, generator=generator, dtype=torch.float64)
    weights: list[Any] = []
    for inner, outer in itertools.pairwise(widths):
        weights += [normal(*lead, inner, outer, scale=inner**-0.5), normal(*lead, outer, scale=0.3)]
    norm = [1 + normal(heads, width, scale=0.3), normal(heads, width, scale=0.3)]
    arguments = [x.requires_grad_() for x in (*frames, eta, *weights, *norm)]
    positions = torch.arange(1, size + 1, dtype=torch.float64)
    token_scale = (1 / positions + normal(size, scale=0.1)).requires_grad_()
    return arguments, token_scale


def random_documents(seed: int, batch: int, num_frames: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (batch, num_frames), generator=generator)
    return torch.stack(
        [torch.repeat_interleave(torch.arange(num_frames), row)[:num_frames] for row in lengths]
    )


def values_and_gradients(
    op: Any, arguments: Any, token_scale: Any, **options: Any
) -> tuple[Any, ...]:
    """Outputs, final weights, and the gradients of a random sum of all of them."""
    out, state = op(*arguments, token_scale=token_scale, **options)
    generator = torch.Generator().manual_seed(9)
    total = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in (out, *state)
    )
    leaves = (*arguments, token_scale)
    grads = torch.autograd.grad(total, leaves, materialize_grads=True, allow_unused=True)
    return out, *state, *grads


def assert_same(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@every_method
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_frames=st.integers(1, 14),
    size=st.integers(2, 5),
    group_size=st.sampled_from([None, 1, 2, 100]),
    batched=st.booleans(),
    packed=st.booleans(),
)
def test_the_dual_form_equals_its_definition(
    method: str,
    seed: int,
    num_frames: int,
    size: int,
    group_size: int | None,
    batched: bool,
    packed: bool,
) -> None:
    fast, definition, tolerance = METHODS[method]
    inputs = random_inputs(method, seed, num_frames, size, batched=batched)
    documents = random_documents(seed, 2, num_frames) if packed else None
    expected = values_and_gradients(definition, *inputs, documents=documents)
    found = values_and_gradients(
        fast, *inputs, documents=documents, scan_checkpoint_group_size=group_size
    )
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b, tolerance)


@every_method
@pytest.mark.parametrize("num_frames", [9, SMALL_SIZE + 1])
@pytest.mark.parametrize("packed", [False, True])
def test_a_mini_batch_that_no_sequence_fills_costs_no_more_than_the_sequence(
    method: str, num_frames: int, packed: bool
) -> None:
    """A matrix of its frames would take 8 TB."""
    fast, definition, tolerance = METHODS[method]
    inputs = random_inputs(method, 0, num_frames, 10**6)
    documents = torch.zeros(2, num_frames, dtype=torch.long) if packed else None
    expected = values_and_gradients(definition, *inputs)
    found = values_and_gradients(fast, *inputs, documents=documents)
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b, tolerance)


@every_method
def test_a_sequence_goes_on_from_its_state(method: str) -> None:
    op, _, tolerance = METHODS[method]
    arguments, token_scale = random_inputs(method, num_frames=19)
    frames, weights, norm = arguments[:4], arguments[4:-2], arguments[-2:]
    whole, final = op(*arguments, token_scale=token_scale)
    parts, state = [], weights
    for start, end in ((0, 8), (8, 12), (12, 19)):
        piece = [x[:, :, start:end] for x in frames]
        out, state = op(*piece, *state, *norm, token_scale=token_scale)
        parts.append(out)
    assert_same(torch.cat(parts, dim=2), whole, tolerance)
    for a, b in zip(state, final, strict=True):
        assert_same(a, b, tolerance)


@every_method
def test_packed_documents_equal_documents_apart(method: str) -> None:
    op, _, tolerance = METHODS[method]
    arguments, token_scale = random_inputs(method, num_frames=17)
    lengths = [5, 1, 8, 3]
    documents = torch.repeat_interleave(torch.tensor([4, 2, 4, 9]), torch.tensor(lengths))
    packed, _ = op(*arguments, token_scale=token_scale, documents=documents.expand(2, -1))
    pieces = zip(*(x.split(lengths, dim=2) for x in arguments[:4]), strict=True)
    apart = [op(*piece, *arguments[4:], token_scale=token_scale)[0] for piece in pieces]
    assert_same(packed, torch.cat(apart, dim=2), tolerance)


@every_method
def test_nothing_is_read_from_the_future(method: str) -> None:
    op = METHODS[method][0]
    arguments, token_scale = random_inputs(method, num_frames=11)
    before, _ = op(*arguments, token_scale=token_scale)
    for t in range(11):
        changed = [x.detach().clone() for x in arguments]
        for x in changed[:4]:
            x[:, :, t] += 0.5
        after, _ = op(*changed, token_scale=token_scale)
        assert torch.equal(after[:, :, :t], before[:, :, :t])
        assert (after[:, :, t] - before[:, :, t]).abs().min() > 1e-6


@every_method
def test_without_a_rate_nothing_is_learned(method: str) -> None:
    op = METHODS[method][0]
    (q, k, v, eta, *rest), token_scale = random_inputs(method)
    out, state = op(q, k, v, 0 * eta, *rest, token_scale=token_scale)
    for found, start in zip(state, rest[:-2], strict=True):
        assert torch.equal(found, start.expand_as(found))
    alone = [
        op(
            q[:, :, t : t + 1],
            *(x[:, :, :1] for x in (k, v, 0 * eta)),
            *rest,
            token_scale=token_scale,
        )[0]
        for t in range(q.shape[2])
    ]
    assert_same(out, torch.cat(alone, dim=2), 1e-12)


@every_method
def test_learning_lowers_the_inner_loss(method: str) -> None:
    """Frames of one kind: before a mini-batch's update the loss is lower than at first, and after
    it lower still."""
    arguments, token_scale = random_inputs(method, num_frames=43)
    arguments = [x.detach() for x in arguments]
    k, v, eta = (x[:, :, :1] + 0.05 * x for x in arguments[1:4])
    weights = arguments[4:-2]
    layers = tuple(zip(weights[0::2], weights[1::2], strict=True))
    losses = ops.inner_losses(k, v, 0.1 * eta, layers, *arguments[-2:], token_scale=token_scale)
    assert {name: by_position.shape for name, by_position in losses.items()} == {
        name: (2, 40) for name in ("initial", "before", "after")
    }
    assert_same(losses["before"][:, :4], losses["initial"][:, :4], 1e-12)
    assert losses["before"][:, 4:].mean() < 0.9 * losses["initial"][:, 4:].mean()
    assert losses["after"].mean() < losses["before"].mean()


@every_method
def test_bfloat16_inputs_are_computed_in_float32(method: str) -> None:
    op = METHODS[method][0]
    arguments, token_scale = random_inputs(method, num_frames=64, size=16, width=16)
    rounded = [x.detach().bfloat16() for x in arguments]
    out, state = op(*rounded, token_scale=token_scale.bfloat16())
    assert out.dtype == torch.bfloat16 and {x.dtype for x in state} == {torch.float32}
    exact, _ = op(*(x.double() for x in rounded), token_scale=token_scale.bfloat16().double())
    # As close as the rounding of the output alone leaves it.
    assert (out - exact).norm() / exact.norm() < 3e-3


@every_method
def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_mini_batches(
    method: str,
) -> None:
    """Above the inputs and the fast weights at the groups' edges: less than one group makes."""
    op = METHODS[method][0]

    def saved_bytes(num_frames: int, group_size: int | None) -> int:
        arguments, token_scale = random_inputs(method, num_frames=num_frames, size=4)
        kept: dict[int, torch.Tensor] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            kept[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out, _ = op(*arguments, token_scale=token_scale, scan_checkpoint_group_size=group_size)
        del out
        return sum(x.numel() * x.element_size() for x in kept.values())

    everything = [saved_bytes(num_frames, None) for num_frames in (64, 256)]
    checkpointed = [saved_bytes(num_frames, 4) for num_frames in (64, 256)]
    assert everything[1] > 3.5 * everything[0]
    assert checkpointed[1] - checkpointed[0] < 0.05 * (everything[1] - everything[0])


# RoPE ---------------------------------------------------------------------------------------------


def random_conv_inputs(
    num_frames: int = 13, width: int = 3, size: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, num_frames, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(width, size, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_frames, size", [(13, 4), (2, 4), (7, 2), (5, 1)])
def test_the_short_convolution_equals_its_definition(
    num_frames: int, size: int, packed: bool
) -> None:
    documents = random_documents(3, 2, num_frames) if packed else None
    results: list[Any] = []
    for op in (ops.short_conv, reference_linear.short_conv):
        x, weight = random_conv_inputs(num_frames, size=size)
        out = op(x, weight, documents=documents)
        (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        results.append((out.detach(), x.grad, weight.grad))
    for fast, defined in zip(*results, strict=True):
        assert_same(fast, defined, 1e-12)


def test_a_convolution_goes_on_from_the_frames_before() -> None:
    x, weight = (y.detach() for y in random_conv_inputs())
    whole = ops.short_conv(x, weight)
    for cut in range(3, 13):
        rest = ops.short_conv(x[:, cut:], weight, before=x[:, cut - 3 : cut])
        assert torch.equal(rest, whole[:, cut:])


def test_before_the_first_frame_lies_that_frame_and_never_nothing() -> None:
    """A key of frames before alone would be zero at first, and the inner norm divides by it."""
    x, _ = random_conv_inputs()
    shift = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=x.dtype).expand(3, -1)
    assert torch.equal(ops.short_conv(x, shift), torch.cat([x[:, :1], x[:, :-1]], dim=1))


def random_heads(num_frames: int = 16, width: int = 8) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 3, num_frames, width, generator=generator, dtype=torch.float64)
        for _ in range(2)
    ]


def test_rope_keeps_norms_and_position_0() -> None:
    x, _ = random_heads()
    turned = ops.rope(x, torch.arange(16)[None], theta=10_000.0)
    assert_same(turned.norm(dim=-1), x.norm(dim=-1), 1e-12)
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    assert (turned[:, :, 1:] - x[:, :, 1:]).abs().amax(-1).min() > 1e-3


def test_rope_makes_products_depend_on_the_distance_alone() -> None:
    q, k = random_heads(num_frames=1)

    def product(position_q: int, position_k: int) -> torch.Tensor:
        turned_q = ops.rope(q, torch.tensor([[position_q]]), theta=100.0)
        return (turned_q * ops.rope(k, torch.tensor([[position_k]]), theta=100.0)).sum(-1)

    for distance in range(16):
        for start in range(16 - distance):
            assert_same(product(start + distance, start), product(distance, 0), 1e-12)
    assert (product(5, 0) - product(4, 0)).abs().max() > 1e-3


def test_rope_is_moshis_own() -> None:
    q, k = (x.float() for x in random_heads())
    expected = apply_rope(q, k, torch.tensor([3, 0]), max_period=10_000, interleave=True)
    positions = torch.tensor([[3], [0]]) + torch.arange(16)
    for x, turned in zip((q, k), expected, strict=True):
        assert_same(ops.rope(x, positions, theta=10_000.0), turned, 1e-6)
