"""The kernels of a streaming step against the plain form, on a CUDA device or interpreted."""

import math
from typing import Any

import pytest
import torch
from helpers import tiny_args, tiny_delta_args, tiny_model, tiny_relative_args
from interpreted import DEVICE, INTERPRETED, calls_the_interpreter, on_a_device, run_interpreted

from ttt import TTTArgs
from ttt.config import MAX_WRITE_STRENGTH

pytest.importorskip("triton")


@calls_the_interpreter
def test_kernels_interpreted_on_the_cpu() -> None:
    assert "16 passed" in run_interpreted(__file__)


@on_a_device
# The interpreter cannot multiply bfloat16.
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16 if INTERPRETED else torch.bfloat16],
    ids=["32 bits", "16 bits"],
)
@pytest.mark.parametrize(
    "args",
    [
        tiny_args(chunk_size=3, conv_kernel_size=3, conv_lookahead=1, state_decay=0.8),
        tiny_args(chunk_size=3, max_delta_norm=0.5),
        tiny_delta_args(chunk_size=3, state_decay=0.8),
        tiny_delta_args(chunk_size=3, conv_kernel_size=3),
        tiny_relative_args(chunk_size=3, max_delta_norm=0.5),
        tiny_relative_args(chunk_size=3, write="delta"),
        tiny_relative_args(chunk_size=3, write="delta", conv_kernel_size=1),
    ],
    ids=[
        "sum",
        "bounded",
        "delta",
        "delta, lag 2",
        "relative, bounded",
        "relative delta",
        "no lag",
    ],
)
def test_a_step_on_the_device_equals_the_plain_one(
    args: TTTArgs, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four rows: one is paused at times, one restarted, one silent for a chunk, one switched off at
    times. Those that do not learn keep their whole state, to the bit."""
    from ttt.ops.in_place import stream

    if INTERPRETED:
        monkeypatch.setattr(stream, "PROGRAMS", 2)
        # More than one of them for a frame.
        monkeypatch.setattr(stream, "TILE", 16)
    module = tiny_model(args, dtype=dtype).to(DEVICE).ttt_layers[0]
    if module.target_gate is not None:
        # With 0.1 the conv would be multiplied by 1.
        module.target_gate.data.fill_(0.13)
    chunk_size = args.chunk_size
    outputs: dict[str, Any] = {}
    for way in ("plain", "kernels"):
        torch.manual_seed(0)
        spoken: list[Any] = []
        with torch.no_grad(), module.streaming(4):
            state = module._streaming_state
            for step in range(2 * chunk_size + 3):
                z = torch.randn(4, 1, module.hidden).to(DEVICE, dtype)
                source = torch.randn(4, 1, module.width).to(DEVICE, dtype)
                if step < chunk_size:
                    z[2] = 0
                if step % 4 == 1:
                    source[1] = 0
                state.set_exec_mask(torch.tensor([True, step % 3 != 1, True, True]).to(DEVICE))
                state.rows_on.copy_(torch.tensor([True, True, True, step % 4 != 3]))
                if step == chunk_size + 2:
                    state.reset(torch.tensor([True, False, False, False]).to(DEVICE))
                present = torch.tensor([[True], [step % 5 != 3], [step != 2], [True]]).to(DEVICE)
                before = [tensor[~state.learns] for tensor in state.tensors().values()]
                step_of = module._stream_frame if way == "kernels" else module._stream_frames
                # None says that all are frames.
                is_frame = None if bool(present.all()) else present
                spoken.append(step_of(z, source, is_frame, state).float())
                after = [tensor[~state.learns] for tensor in state.tensors().values()]
                if way == "kernels":
                    assert all(map(torch.equal, before, after))
            outputs[way] = (torch.cat(spoken), state.change.clone(), state.num_pending.clone())
    assert torch.equal(outputs["plain"][2], outputs["kernels"][2])
    off = 3 * 4 + 3
    assert outputs["plain"][0][off].abs().max() == outputs["kernels"][0][off].abs().max() == 0
    for plain, kernels in zip(outputs["plain"][:2], outputs["kernels"][:2], strict=True):
        assert plain.abs().max() > 0.01
        error = (kernels - plain).norm() / plain.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


@on_a_device
def test_inverses_of_more_than_one_block() -> None:
    """Rows: a repeated frame with noise, an incomplete chunk (left alone), and silence."""
    from ttt.ops.in_place import stream

    torch.manual_seed(0)
    z = 0.01 * torch.randn(3, 70, 8) + torch.ones(8)
    z[2] = 0
    gram = z.double() @ z.double().mT
    strength = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] / 10
    write = stream._Write(
        torch.tensor([70, 3, 70], device=DEVICE), chunk_size=70, dtype=torch.float32
    )
    inverse = write.inverse(z.to(DEVICE), torch.tensor([10.0], device=DEVICE).log()).cpu().double()
    product = inverse[0] @ (gram[0] + strength[0] * torch.eye(70))
    torch.testing.assert_close(product, torch.eye(70).double(), rtol=0, atol=1e-3)
    assert torch.equal(inverse[2], torch.zeros(70, 70).double())


@on_a_device
def test_beta_is_bounded_as_in_the_plain_form() -> None:
    from ttt.ops.in_place import stream

    torch.manual_seed(0)
    module = tiny_model(tiny_delta_args(chunk_size=3), dtype=torch.float32).to(DEVICE).ttt_layers[0]
    keys = torch.randn(1, 3, 8).to(DEVICE)
    inverses = []
    for beta in (MAX_WRITE_STRENGTH / 100, MAX_WRITE_STRENGTH, 50 * MAX_WRITE_STRENGTH):
        module.log_write_strength.data.fill_(math.log(beta))
        write = stream._Write(torch.tensor([3], device=DEVICE), chunk_size=3, dtype=torch.float32)
        inverses.append(
            write.inverse(keys, module.log_write_strength, MAX_WRITE_STRENGTH)[0].cpu().double()
        )
        # (G + λ I)⁻¹ with λ = mean ‖z‖² / β.
        wide = keys[0].cpu().double()
        strength = wide.square().sum(1).mean() / module.write_strength.item()
        expected = (wide @ wide.mT + strength * torch.eye(3)).inverse()
        torch.testing.assert_close(inverses[-1], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(inverses[1], inverses[2])
