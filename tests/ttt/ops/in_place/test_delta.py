"""`write: delta` against its definition, and what must hold for any memory that learns so."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sum import random_inputs, sizes

from ttt import ops
from ttt.ops.in_place import reference


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_frames=st.integers(1, 40),
    chunk_size=st.integers(1, 9),
    strength=st.sampled_from([0.1, 10.0, 1000.0]),
    decay=st.sampled_from([1.0, 0.9, 0.3]),
    packed=st.booleans(),
    super_chunk=st.sampled_from([4, 12, 2048]),
    block=st.sampled_from([1, 6, 256]),
    lag=st.integers(0, 3),
    some_written=st.booleans(),
    silent=st.sampled_from([0.0, 0.5, 2.0]),
)
def test_delta_equals_its_definition(
    seed: int,
    num_frames: int,
    chunk_size: int,
    strength: float,
    decay: Any,
    packed: bool,
    super_chunk: int,
    block: Any,
    lag: int,
    some_written: bool,
    silent: float,
) -> None:
    z, v, documents, weights = random_inputs(seed, num_frames=num_frames)
    z.data[weights[..., 1].abs() < silent] = 0
    beta = torch.tensor(strength, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {
        "beta": beta,
        "chunk_size": chunk_size,
        "documents": documents if packed else None,
        "decay": decay,
        "lag": min(lag, chunk_size - 1),
        "written": weights[..., 0] < 0.8 if some_written else None,
    }
    results: list[Any] = []
    for op in (reference.in_place_delta, ops.in_place_delta):
        with sizes(super_chunk, block):
            out = op(z, v, **options)
        # Frames of a single chunk leave the definition's output without any graph.
        loss = (out * weights).sum() + 0 * (z.sum() + v.sum() + beta)
        results.append((out, *torch.autograd.grad(loss, (z, v, beta))))
    for slow, fast in zip(*results, strict=True):
        scale = slow.abs().max().item()
        torch.testing.assert_close(fast, slow, rtol=1e-7, atol=1e-9 * (1 + scale))


@pytest.mark.parametrize("lag", [0, 3, 20])
@pytest.mark.parametrize("packed", [False, True])
def test_a_chunk_that_no_sequence_fills_costs_nothing(lag: int, packed: bool) -> None:
    """A matrix of its frames would take 8 TB."""
    z, v, documents, weights = random_inputs(0, num_frames=9)
    beta = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"chunk_size": 10**6, "decay": 0.9, "lag": lag}
    options["documents"] = documents if packed else None
    for out in (
        ops.in_place_delta(z, v, beta=beta, written=weights[..., 0] < 0.8, **options),
        ops.in_place_ttt(z, v, lr=0.7, max_delta_norm=1.0, **options),
    ):
        grads = torch.autograd.grad((out * weights).sum(), (z, v, beta), materialize_grads=True)
        assert not out.any() and not any(grad.any() for grad in grads)


def test_a_key_of_zeros_is_no_pair() -> None:
    """Neither for what its chunk writes nor for any gradient: it is as if it were not written."""
    z, v, _, weights = random_inputs(0, num_frames=8)
    z.data[:, 1] = 0
    is_key = torch.ones(2, 8, dtype=torch.bool)
    is_key[:, 1] = False
    options: dict[str, Any] = {"beta": 10.0, "chunk_size": 4}
    results: list[Any] = []
    for op, written in (
        (reference.in_place_delta, None),
        (ops.in_place_delta, is_key),
        (ops.in_place_delta, None),
    ):
        out = op(z, v, written=written, **options)
        results.append((out, *torch.autograd.grad((out * weights).sum(), (z, v))))
    definition, skipped, found = results
    assert definition[0].any() and not definition[1][:, 1].any()
    for made in (skipped, found):
        for a, b in zip(made, definition, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_backward_pass_gradchecks() -> None:
    z, v, _, _ = random_inputs(0, batch=1, num_frames=9, hidden=3, width=2)
    beta = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z, v, beta: ops.in_place_delta(z, v, beta=beta, chunk_size=2, decay=0.9),
        (z, v, beta),
    )


def test_packed_documents_equal_documents_apart() -> None:
    z, v, _, _ = random_inputs(3, num_frames=17)
    lengths = [5, 1, 8, 3]
    documents = torch.repeat_interleave(torch.tensor([4, 2, 4, 9]), torch.tensor(lengths))
    options: dict[str, Any] = {"beta": 10.0, "chunk_size": 3}
    packed = ops.in_place_delta(z, v, documents=documents.expand(2, -1), **options)
    apart = [
        ops.in_place_delta(z_part, v_part, **options)
        for z_part, v_part in zip(z.split(lengths, 1), v.split(lengths, 1), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(apart, 1), rtol=1e-12, atol=1e-12)


def test_what_is_known_is_not_written_again() -> None:
    """The same chunk a hundred times: what is read of it tends to its targets and stays there,
    where `sum` grows without end."""
    z, v, _, _ = random_inputs(1, batch=1, num_frames=4, hidden=16)
    z, v = z.detach().repeat(1, 100, 1), v.detach().repeat(1, 100, 1)
    out = ops.in_place_delta(z, v, beta=10.0, chunk_size=4)
    torch.testing.assert_close(out[:, -4:], v[:, -4:], rtol=1e-6, atol=1e-6)
    assert ops.in_place_ttt(z, v, lr=1.0, chunk_size=4)[:, -4:].norm() > 100 * v[:, -4:].norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_digital_silence_is_well_behaved(dtype: torch.dtype) -> None:
    """Chunks of one repeated frame, of zeros, and of zeros but one frame."""
    z, v, _, _ = random_inputs(2, batch=1, num_frames=24, hidden=16)
    z, v = z.detach().to(dtype), v.detach().to(dtype)
    z[:, 4:12] = z[:, 4:5]
    z[:, 12:18] = 0
    z.requires_grad_(), v.requires_grad_()
    beta = torch.tensor(10.0, requires_grad=True)
    out = ops.in_place_delta(z, v, beta=beta, chunk_size=4)
    out.float().square().sum().backward()
    for x in (out, z.grad, v.grad, beta.grad):
        assert x is not None and x.isfinite().all()
    assert out.norm() < 3 * v.norm()
    assert v.grad[:, 12:16].abs().max() == 0


def test_silence_writes_nothing() -> None:
    z, v, _, _ = random_inputs(4, num_frames=12)
    silent = torch.cat([z[:, :4], torch.zeros_like(z[:, :4]), z[:, 8:]], dim=1)
    out = ops.in_place_delta(silent, v, beta=10.0, chunk_size=4)
    without = ops.in_place_delta(
        z[:, [*range(4), *range(8, 12)]], v[:, :8], beta=10.0, chunk_size=4
    )
    torch.testing.assert_close(out[:, 8:], without[:, 4:], rtol=1e-12, atol=1e-12)


def test_the_scale_of_activations_does_not_matter() -> None:
    """β has no unit: ten times as long activations read the same."""
    z, v, _, _ = random_inputs(5)
    options: dict[str, Any] = {"beta": 10.0, "chunk_size": 4}
    torch.testing.assert_close(
        ops.in_place_delta(1000 * z, v, **options), ops.in_place_delta(z, v, **options)
    )


@pytest.mark.parametrize("super_chunk", [16, 2048])
def test_bfloat16_is_as_close_as_its_rounding(super_chunk: int) -> None:
    z, v, _, _ = random_inputs(6, num_frames=64, hidden=32, width=16)
    low_z, low_v = z.detach().bfloat16(), v.detach().bfloat16()
    with sizes(super_chunk, 8):
        exact = ops.in_place_delta(low_z.double(), low_v.double(), beta=10.0, chunk_size=8)
        rounded = ops.in_place_delta(low_z, low_v, beta=10.0, chunk_size=8)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("rule", ["sum", "delta"])
def test_what_the_backward_pass_keeps_grows_with_the_length_and_not_its_square(rule: str) -> None:
    sizes_of_kept: list[Any] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes_of_kept[-1] += tensor.numel()
        return tensor

    for num_frames in (64, 512):
        sizes_of_kept.append(0)
        z, v, _, _ = random_inputs(0, num_frames=num_frames)
        with sizes(16, 4), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            if rule == "sum":
                ops.in_place_ttt(z, v, lr=1.0, chunk_size=4)
            else:
                ops.in_place_delta(z, v, beta=10.0, chunk_size=4)
    assert sizes_of_kept[1] < 8.1 * sizes_of_kept[0]


CHUNK_FRAMES = 8


def recalled(fact: int, again: int, num_frames: int = 64) -> list[Any]:
    """How much of its value a key gives back at frame `again`, and 8 chunks on, after the fact at
    frame `fact`; the value follows its key, as a target does by default."""
    generator = torch.Generator().manual_seed(fact * 100 + again)

    def normal(*shape: Any) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    z, x = normal(1, num_frames, 2048), normal(1, num_frames, 32)
    key, value = normal(2048), normal(32)
    last = num_frames - 1
    z[0, [fact, again, last]] = key
    x[0, [fact + 1, again + 1]] = value
    out = ops.in_place_delta(z, x, beta=10.0, chunk_size=CHUNK_FRAMES, lag=1)[0]
    return [(out[t] @ value / value.square().sum()).item() for t in (again, last)]


def test_a_chunks_edge_is_a_place_like_any_other() -> None:
    """A key at each position of a chunk, again at each position of a later one."""
    positions = range(CHUNK_FRAMES)
    then, later = torch.tensor(
        [[recalled(p, 3 * CHUNK_FRAMES + q) for q in positions] for p in positions]
    ).unbind(-1)
    for found in (then, later):
        assert found.mean() > 0.85
        assert (found.mean(0) - found.mean()).abs().max() < 0.02
        assert (found.mean(1) - found.mean()).abs().max() < 0.02


def test_what_is_not_written_is_as_if_its_key_were_zero_when_written() -> None:
    """A frame that is no target neither writes nor erases what is known of its key."""
    z, v, _, _ = random_inputs(7, batch=1, num_frames=24, hidden=16)
    written = torch.ones(1, 24, dtype=torch.bool)
    written[0, 13:16] = False
    options: dict[str, Any] = {"beta": 10.0, "chunk_size": 4}
    out = ops.in_place_delta(z, v, written=written, **options)
    other = torch.where(written.unsqueeze(-1), v, 100.0)
    assert torch.equal(ops.in_place_delta(z, other, written=written, **options), out)
    everything = ops.in_place_delta(z, v, **options)
    assert torch.equal(out[:, :16], everything[:, :16])
    assert not torch.allclose(out[:, 16:], everything[:, 16:])
