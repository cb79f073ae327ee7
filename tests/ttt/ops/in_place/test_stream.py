"""The kernels of a streaming step against the plain form, on a CUDA device or interpreted."""

from typing import Any

import pytest
import torch
from helpers import tiny_args, tiny_delta_args, tiny_model, tiny_relative_args
from interpreted import DEVICE, INTERPRETED, calls_the_interpreter, on_a_device, run_interpreted

from ttt import TTTArgs

pytest.importorskip("triton")


@calls_the_interpreter
def test_kernels_interpreted_on_the_cpu() -> None:
    assert "13 passed" in run_interpreted(__file__)


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
    ],
    ids=["sum", "bounded", "delta", "delta, lag 2", "relative, bounded", "relative delta"],
)
def test_a_step_on_the_device_equals_the_plain_one(
    args: TTTArgs, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows, one of them paused at times, one restarted, one silent for a chunk."""
    from ttt.ops.in_place import stream

    if INTERPRETED:
        monkeypatch.setattr(stream, "PROGRAMS", 2)
    module = tiny_model(args, dtype=dtype).to(DEVICE).ttt_layers[0]
    chunk_size = args.chunk_size
    outputs: dict[str, Any] = {}
    for way in ("plain", "kernels"):
        torch.manual_seed(0)
        spoken: list[Any] = []
        with torch.no_grad(), module.streaming(3):
            state = module._streaming_state
            for step in range(2 * chunk_size + 3):
                z = torch.randn(3, 1, module.hidden).to(DEVICE, dtype)
                source = torch.randn(3, 1, module.width).to(DEVICE, dtype)
                if step < chunk_size:
                    z[2] = 0
                state.set_exec_mask(torch.tensor([True, step % 3 != 1, True]).to(DEVICE))
                if step == chunk_size + 2:
                    state.reset(torch.tensor([True, False, False]).to(DEVICE))
                is_frame = torch.tensor([[True], [step % 5 != 4], [step != 2]]).to(DEVICE)
                step_of = module._stream_frame if way == "kernels" else module._stream_frames
                spoken.append(step_of(z, source, is_frame, state).float())
            outputs[way] = (torch.cat(spoken), state.change.clone(), state.num_pending.clone())
    assert torch.equal(outputs["plain"][2], outputs["kernels"][2])
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
