"""`write: delta` in 16 bits, where it is hard: keys that are much alike.

Every case is compared with float64 on the same 16-bit inputs, values and gradients. White keys, on
which any arithmetic looks right, are one case of many.
"""

from typing import Any

import pytest
import torch
from test_sum import sizes

from ttt import ops

CHUNK_FRAMES = 64
NUM_FRAMES = 300
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def keys(kind: str, hidden: int = 256, num_frames: int = NUM_FRAMES) -> torch.Tensor:
    """[1, T, h] frames."""
    torch.manual_seed(0)
    noise = torch.randn(1, num_frames, hidden)
    common = torch.randn(hidden)
    if kind == "silence":
        return common + 1e-3 * noise
    if kind == "repeated":
        return common.expand(1, num_frames, -1).clone()
    if kind == "half silent":
        is_silent = torch.arange(num_frames) // 20 % 2 == 0
        return torch.where(is_silent[None, :, None], common + 1e-3 * noise, noise)
    cosine = float(kind.removeprefix("cosine "))
    words = cosine**0.5 * common + (1 - cosine) ** 0.5 * torch.randn(64, hidden)
    return words[torch.randint(0, 64, (1, num_frames))] + 0.02 * noise


def errors(
    kind: str,
    beta: float,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    super_chunk: int = 2048,
    lag: int = 1,
    chunk_size: int = CHUNK_FRAMES,
    num_frames: int = NUM_FRAMES,
) -> list[Any]:
    """Relative errors of the output, dz, and dv."""
    z = keys(kind, num_frames=num_frames).to(dtype)
    v = torch.randn(64, 32)[torch.randint(0, 64, (1, num_frames))].to(dtype)
    d_out = torch.randn(1, num_frames, 32).to(dtype)
    results: list[Any] = []
    for where, precision in (("cpu", torch.float64), (device, dtype)):
        inputs = [x.to(where, precision).requires_grad_() for x in (z, v)]
        with sizes(super_chunk, 64):
            out = ops.in_place_delta(*inputs, beta=beta, chunk_size=chunk_size, lag=lag)
        grads = torch.autograd.grad(out, inputs, d_out.to(where, precision))
        results.append([x.detach().cpu().double() for x in (out, *grads)])
    return [
        ((low - exact).norm() / exact.norm()).item() for exact, low in zip(*results, strict=True)
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("super_chunk", [128, 2048])
@pytest.mark.parametrize("beta", [1.0, 10.0, 100.0])
@pytest.mark.parametrize(
    "kind", ["cosine 0", "cosine 0.9", "cosine 0.94", "cosine 0.99", "half silent", "silence"]
)
def test_bfloat16_is_as_exact_as_its_inputs(
    kind: str, beta: float, super_chunk: int, device: str
) -> None:
    """One bfloat16 rounds by 0.2 %, and the results are such."""
    out, d_z, d_v = errors(kind, beta, device, super_chunk=super_chunk)
    is_hard = kind == "silence" and beta == 100.0
    assert out < (0.02 if is_hard else 0.01)
    assert d_v < 0.01
    if kind != "silence":
        # Between super-chunks dz is a sum of bfloat16 numbers.
        assert d_z < (0.01 if super_chunk > NUM_FRAMES else 0.03)
    elif super_chunk > NUM_FRAMES and beta < 100:
        # Frames of silence differ by 1e-3, hardly more than 16 bits tell apart.
        assert d_z < 0.2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("beta, bound", [(10.0, 0.06), (100.0, 0.3)])
def test_gradients_of_silence_in_long_chunks(beta: float, bound: float, device: str) -> None:
    """They hang on sums of E and X in which nearly all cancels: products that round more than those
    of float32 have them three to ten times as wrong, and so does a sum over frames in pieces, of
    which each is rounded."""
    _, d_z, _ = errors("silence", beta, device, chunk_size=256, num_frames=1100)
    assert d_z < bound


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("beta", [1.0, 10.0, 100.0])
def test_one_frame_over_and_over(beta: float, device: str) -> None:
    """No gradient moves such keys apart: dz is nothing but rounding."""
    out, _, d_v = errors("repeated", beta, device)
    assert out < 0.01 and d_v < 0.01


@pytest.mark.parametrize("kind", ["cosine 0", "cosine 0.94", "cosine 0.99", "half silent"])
def test_float32_holds_up_to_the_bound(kind: str) -> None:
    out, d_z, d_v = errors(kind, 1e3, "cpu", dtype=torch.float32)
    assert out < 1e-2 and d_v < 1e-2 and d_z < 1e-2
