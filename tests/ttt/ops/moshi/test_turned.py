"""Queries, keys and values turned by RoPE: their gradient, plain and by the kernel."""

import pytest
import torch
from interpreted import DEVICE, calls_the_interpreter, on_a_device, run_interpreted

from ttt.ops.moshi.compiled_turned import compiled_turned
from ttt.ops.moshi.turned import gradient, parts, turned
from ttt.ops.rope import RopeTable, rope_table

BATCH, FRAMES = 2, 5
INTERLEAVE = pytest.mark.parametrize("interleave", [True, False])


@calls_the_interpreter
def test_the_kernel_interpreted_on_the_cpu() -> None:
    assert "12 passed" in run_interpreted(__file__)


def table(width: int, interleave: bool) -> RopeTable:
    return rope_table(torch.arange(FRAMES)[:, None], width, 50.0, interleave=interleave)


@INTERLEAVE
@pytest.mark.parametrize("is_compiled", [False, True])
def test_gradients_are_those_of_its_parts(interleave: bool, is_compiled: bool) -> None:
    """In float64 nothing rounds."""
    torch.manual_seed(0)
    cos, sin = (x.double() for x in table(8, interleave))
    qkv = torch.randn(BATCH, FRAMES, 3 * 3 * 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, BATCH, FRAMES, 3, 8, dtype=torch.float64)
    expected = parts(qkv, cos, sin, 3, interleave)
    made = compiled_turned if is_compiled else turned
    found = made(qkv, 3, (cos, sin), interleave=interleave)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    (own,), (exact,) = (
        torch.autograd.grad((weights * torch.stack(outs)).sum(), qkv) for outs in (found, expected)
    )
    torch.testing.assert_close(own, exact, rtol=1e-12, atol=1e-12)


def test_functions_of_torch_func_pass_through() -> None:
    cos, sin = table(8, True)
    qkv = torch.randn(BATCH, FRAMES, 3 * 8)

    def total(x: torch.Tensor) -> torch.Tensor:
        return torch.stack(turned(x, 1, (cos, sin), interleave=True)).square().sum()

    # Turning changes no norm.
    torch.testing.assert_close(torch.func.grad(total)(qkv), 2 * qkv)


@on_a_device
@INTERLEAVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "width"), [(2, 64), (3, 128), (80, 64)])
def test_the_kernel_computes_what_the_plain_form_does(
    num_heads: int, width: int, dtype: torch.dtype, interleave: bool
) -> None:
    """Of gradients that lie head by head too, as attention returns them."""
    from ttt.ops.moshi import turned_kernels

    torch.manual_seed(0)
    cos, sin = table(width, interleave)
    d_q, d_v = torch.randn(2, BATCH, FRAMES, num_heads, width, dtype=dtype)
    d_k = torch.randn(BATCH, num_heads, FRAMES, width, dtype=dtype).transpose(1, 2)
    plain = gradient(d_q, d_k, d_v, cos, sin, interleave)
    given = [x.to(DEVICE) for x in (d_q, d_k, d_v, cos, sin)]
    made = turned_kernels.gradient(*given, interleave=interleave).cpu()
    # Triton's interpreter cuts digits off where a GPU rounds.
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(made, plain, rtol=tolerance, atol=tolerance)
    assert torch.equal(made[..., 2 * num_heads * width :], d_v.flatten(2))
