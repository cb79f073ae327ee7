"""The fast forms against the frame-by-frame definition: values and gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt import ops
from ttt.ops.in_place import chunks, reference


@contextmanager
def sizes(super_chunk: int, block: int) -> Iterator[None]:
    """Small super-chunks and blocks of rows, so that short sequences have many of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "SUPER_CHUNK_FRAMES", super_chunk)
        patch.setattr(chunks, "WHOLE_FRAMES", super_chunk)
        patch.setattr(chunks, "BLOCK_FRAMES", block)
        yield


def random_inputs(
    seed: int, batch: int = 2, num_frames: int = 19, hidden: int = 7, width: int = 5
) -> tuple[Any, Any, torch.Tensor, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: Any) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    z, v = normal(batch, num_frames, hidden), normal(batch, num_frames, width)
    lengths = torch.randint(1, 9, (batch, num_frames), generator=generator)
    documents = torch.stack(
        [torch.repeat_interleave(torch.arange(num_frames), row)[:num_frames] for row in lengths]
    )
    return z.requires_grad_(), v.requires_grad_(), documents, normal(batch, num_frames, width)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_frames=st.integers(1, 40),
    chunk_size=st.integers(1, 9),
    bound=st.sampled_from([None, 1e-3, 3.0, 1e6]),
    decay=st.sampled_from([1.0, 0.9, 0.3]),
    packed=st.booleans(),
    super_chunk=st.sampled_from([4, 12, 2048]),
    block=st.sampled_from([1, 6, 256]),
    lag=st.integers(0, 3),
)
def test_in_place_equals_its_definition(
    seed: int,
    num_frames: int,
    chunk_size: int,
    bound: Any,
    decay: Any,
    packed: bool,
    super_chunk: int,
    block: Any,
    lag: int,
) -> None:
    z, v, documents, weights = random_inputs(seed, num_frames=num_frames)
    options: dict[str, Any] = {
        "lr": 0.7,
        "chunk_size": chunk_size,
        "max_delta_norm": bound,
        "documents": documents if packed else None,
        "decay": decay,
        "lag": min(lag, chunk_size - 1),
    }
    results: list[Any] = []
    for op in (reference.in_place_ttt, ops.in_place_ttt):
        with sizes(super_chunk, block):
            out = op(z, v, **options)
        # Frames of a single chunk leave the definition's output without any graph.
        grads = torch.autograd.grad(
            (out * weights).sum() + 0 * (z.sum() + v.sum()), (z, v), materialize_grads=True
        )
        results.append((out, *grads))
    for slow, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_frames=st.integers(1, 15),
    chunk_size=st.integers(1, 6),
    kernel_size=st.integers(1, 4),
    data=st.data(),
    packed=st.booleans(),
)
def test_chunk_conv_equals_its_definition(
    seed: int, num_frames: int, chunk_size: int, kernel_size: int, data: st.DataObject, packed: bool
) -> None:
    _, x, documents, _ = random_inputs(seed, num_frames=num_frames)
    weight = torch.randn(5, kernel_size, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {
        "chunk_size": chunk_size,
        "lookahead": data.draw(st.integers(0, kernel_size - 1)),
        "documents": documents if packed else None,
    }
    slow = reference.chunk_conv(x, weight, **options)
    fast = ops.chunk_conv(x, weight, **options)
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)
    for a, b in zip(
        torch.autograd.grad(slow.square().sum(), (x, weight)),
        torch.autograd.grad(fast.square().sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_backward_passes_gradcheck() -> None:
    z, v, documents, _ = random_inputs(0, batch=1, num_frames=9, hidden=3, width=2)
    assert torch.autograd.gradcheck(
        lambda z, v: ops.in_place_ttt(
            z, v, lr=0.3, chunk_size=2, max_delta_norm=2.0, documents=documents[:1]
        ),
        (z, v),
    )


@pytest.mark.parametrize("bound", [None, 0.5])
def test_packed_documents_equal_documents_apart(bound: float | None) -> None:
    z, v, _, _ = random_inputs(3, num_frames=17)
    lengths = [5, 1, 8, 3]
    documents = torch.repeat_interleave(torch.tensor([4, 2, 4, 9]), torch.tensor(lengths))
    options: dict[str, Any] = {"lr": 0.7, "chunk_size": 3, "max_delta_norm": bound}
    packed = ops.in_place_ttt(z, v, documents=documents.expand(2, -1), **options)
    apart = [
        ops.in_place_ttt(z_part, v_part, **options)
        for z_part, v_part in zip(z.split(lengths, 1), v.split(lengths, 1), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(apart, 1), rtol=1e-12, atol=1e-12)


def test_the_bound_acts_on_each_row_alone_and_is_not_always_on() -> None:
    z, v, _, _ = random_inputs(1)
    v = torch.stack([v[0] * 1e-3, v[1] * 1e3])
    free = ops.in_place_ttt(z, v, lr=1.0, chunk_size=4)
    bounded = ops.in_place_ttt(z, v, lr=1.0, chunk_size=4, max_delta_norm=1.0)
    torch.testing.assert_close(bounded[0], free[0])
    assert bounded[1].norm() < 1e-2 * free[1].norm()


def test_nothing_leaves_a_first_chunk_or_enters_one() -> None:
    z, v, _, _ = random_inputs(2, num_frames=12)
    out = ops.in_place_ttt(z, v, lr=1.0, chunk_size=5)
    assert torch.equal(out[:, :5], torch.zeros_like(out[:, :5]))
    assert out[:, 5:].abs().amin() > 0
    # Targets of the open chunk, 10 and later, reach nobody.
    changed = torch.cat([v[:, :10], v[:, 10:] + 1], dim=1)
    assert torch.equal(ops.in_place_ttt(z, changed, lr=1.0, chunk_size=5), out)


def test_silence_with_a_bound_has_finite_gradients() -> None:
    z = torch.zeros(1, 8, 3, dtype=torch.float64, requires_grad=True)
    v = torch.zeros(1, 8, 2, dtype=torch.float64, requires_grad=True)
    ops.in_place_ttt(z, v, lr=1.0, chunk_size=2, max_delta_norm=1.0).sum().backward()
    assert z.grad is not None and v.grad is not None
    assert z.grad.isfinite().all() and v.grad.isfinite().all()


def test_bfloat16_is_as_close_as_its_rounding() -> None:
    z, v, _, _ = random_inputs(5, num_frames=64, hidden=32, width=16)
    exact = ops.in_place_ttt(z, v, lr=0.1, chunk_size=8)
    rounded = ops.in_place_ttt(z.bfloat16(), v.bfloat16(), lr=0.1, chunk_size=8)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() / exact.norm() < 0.01


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("what", ["z", "v"])
def test_a_frame_that_is_not_finite_reaches_no_earlier_one(what: str, lag: int) -> None:
    z, v, _, _ = random_inputs(5, batch=1, num_frames=24)
    z, v = z.detach().clone(), v.detach().clone()
    (z if what == "z" else v)[0, 13] = float("inf")
    options: dict[str, Any] = {"lr": 1.0, "chunk_size": 4, "lag": lag}
    expected = reference.in_place_ttt(z, v, **options)
    found = ops.in_place_ttt(z, v, **options)
    assert torch.equal(found.isfinite().all(-1), expected.isfinite().all(-1))
    finite = expected.isfinite().all(-1)
    torch.testing.assert_close(found[finite], expected[finite])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_frames=st.integers(1, 15),
    kernel_size=st.integers(1, 4),
    packed=st.booleans(),
)
def test_causal_conv_equals_its_definition(
    seed: int, num_frames: int, kernel_size: int, packed: bool
) -> None:
    _, x, documents, _ = random_inputs(seed, num_frames=num_frames)
    weight = torch.randn(5, kernel_size, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"documents": documents if packed else None}
    slow, fast = (op.causal_conv(x, weight, **options) for op in (reference, ops))
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)
