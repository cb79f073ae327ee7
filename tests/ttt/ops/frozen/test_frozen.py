"""Products with frozen weights in fewer bits, against their plain definition."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from ttt.ops.frozen import (
    KINDS,
    freeze,
    frozen_product,
    frozen_products,
    layout,
    reference,
    thaw,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers whose rows differ in size, as rows of weights and frames do."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** torch.linspace(-2, 1, shape[0])
    return (torch.randn(shape, generator=generator) * sizes[:, None]).to(dtype)


@pytest.mark.parametrize("shape", [(48, 80), (5, 14)], ids=["whole blocks", "a part of a block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_the_published_format(shape: Any, dtype: torch.dtype) -> None:
    weight = drawn(*shape, dtype=dtype)
    frozen = freeze(weight, "nf4")
    codes, scales = reference.nf4_quantize(weight)
    assert torch.equal(frozen.scales, scales)
    expected = reference.nf4_dequantize(codes, scales)
    torch.testing.assert_close(thaw(frozen, torch.float32), expected, rtol=1e-6, atol=0)
    assert torch.equal(thaw(frozen, torch.bfloat16), expected.bfloat16())


def test_a_weight_in_nf4_is_off_by_half_a_step_at_most() -> None:
    weight = drawn(48, 80)
    frozen = freeze(weight, "nf4")
    widest = max(b - a for a, b in zip(reference.NF4, reference.NF4[1:], strict=False)) / 2
    error = (thaw(frozen, torch.float32) - weight).abs().flatten().view(-1, reference.BLOCK)
    assert (error <= widest * frozen.scales[:, None] * 1.001).all()


def test_a_weight_in_float8_is_off_by_half_a_digit_at_most() -> None:
    weight = drawn(48, 80)
    frozen = freeze(weight, "float8")
    # Three bits after the first; below the smallest normal number 2⁻⁶, steps of 2⁻⁹.
    bound = (weight.abs() * 2**-4).maximum(2**-10 * frozen.scales[:, None])
    assert ((thaw(frozen, torch.float32) - weight).abs() <= bound * 1.001).all()
    assert frozen.values.float().abs().amax(dim=1).eq(reference.LARGEST).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_and_its_gradient_are_those_of_the_full_weight_but_for_rounding(
    kind: str,
) -> None:
    weight, x = drawn(48, 80), drawn(7, 80, seed=1).requires_grad_()
    d_out = drawn(7, 48, seed=2)
    out = frozen_product(x, freeze(weight, kind))
    (d_x,) = torch.autograd.grad(out, x, d_out)
    matrix = thaw(freeze(weight, kind), torch.float32)
    # Of float8 the input and the gradient are rounded as well: by 2⁻⁴ of each number at most.
    relative = 2**-4 * 1.1 if kind == "float8" else 1e-6
    assert ((out - x @ matrix.T).abs() <= relative * (x.abs() @ matrix.abs().T)).all()
    folded = d_out.abs() @ matrix.abs()
    least = 2**-10 * (d_out.abs() * matrix.abs().amax(dim=1)).amax(1, keepdim=True)
    bound = relative * folded + (kind == "float8") * least * len(matrix)
    assert ((d_x - d_out @ matrix).abs() <= bound + 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_depends_on_no_other(kind: str) -> None:
    frozen = freeze(drawn(48, 80), kind)
    x = drawn(3, 80, seed=1).requires_grad_()
    more = torch.cat([x, 1e3 * drawn(4, 80, seed=2)])
    alone, together = frozen_product(x, frozen), frozen_product(more, frozen)[:3]
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)
    one, other = (torch.autograd.grad(y.sum(), x)[0] for y in (alone, together))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_several_products_are_each_alone(kind: str) -> None:
    weights = [freeze(drawn(48, 80, seed=seed), kind) for seed in (3, 4)]
    x = torch.stack([drawn(5, 80, seed=1), drawn(5, 80, seed=2)]).requires_grad_()
    together = frozen_products(x, weights)
    alone = torch.stack([frozen_product(*pair) for pair in zip(x, weights, strict=True)])
    assert torch.equal(together, alone)
    one, other = (torch.autograd.grad(y.square().sum(), x)[0] for y in (together, alone))
    assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_or_block_of_zeros_stays(kind: str) -> None:
    weight = drawn(4, 64)
    weight[1] = 0
    out = frozen_product(torch.zeros(2, 64), freeze(weight, kind))
    assert torch.equal(thaw(freeze(weight, kind), torch.float32)[1], torch.zeros(64))
    assert torch.equal(out, torch.zeros(2, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_is_what_a_weight_takes(kind: str) -> None:
    frozen = freeze(drawn(6, 40), kind)
    places = layout(kind, 6, 40)
    assert places.values == (tuple(frozen.values.shape), frozen.values.dtype)
    assert places.scales == (tuple(frozen.scales.shape), frozen.scales.dtype)


# --- on a device ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="would call itself")
def test_kernels_interpreted_on_the_cpu() -> None:
    """Triton reads this variable when it is imported, hence another process."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-x", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


def on_a_device(test: Any) -> Any:
    missing = not INTERPRETED and not torch.cuda.is_available()
    skip = pytest.mark.skipif(missing, reason="needs a CUDA device, or Triton's interpreter")
    return pytest.mark.gpu(skip(test))


DEVICE = "cpu" if INTERPRETED else "cuda"


@on_a_device
@pytest.mark.parametrize("has_factors", [False, True])
def test_the_kernel_rounds_as_the_reference(has_factors: bool) -> None:
    from ttt.ops.frozen import float8_kernels

    x = drawn(5, 2500, dtype=torch.bfloat16).to(DEVICE)
    x[2] = 0
    factors = drawn(2500, 1, seed=3).flatten().to(DEVICE) if has_factors else None
    values, scales = float8_kernels.to_e4m3(x, factors)
    expected, expected_scales = reference.to_e4m3(x, factors)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    # A GPU's division may be off in its last digit, which rarely is one of e4m3's.
    apart = (values.float() - expected.float()).abs()
    if INTERPRETED:
        # The interpreter loses the carry where a number is rounded up to a power of two, and has a
        # rule of its own for numbers in the middle of two.
        apart[expected.float().abs().frexp().mantissa == 0.5] = 0
    assert (apart <= 2**-3 * expected.float().abs() + 2**-9).all()
    assert (apart > 0).float().mean() < (2e-2 if INTERPRETED else 1e-3)


@on_a_device
def test_the_kernel_turns_bytes() -> None:
    from ttt.ops.frozen import float8_kernels

    values = drawn(144, 272).to(reference.E4M3).to(DEVICE)
    assert torch.equal(
        float8_kernels.turned(values).view(torch.uint8), values.view(torch.uint8).t()
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [1, 200])
def test_the_device_computes_what_the_reference_does(kind: str, num_rows: int) -> None:
    frozen = freeze(drawn(144, 272, dtype=torch.bfloat16).cuda(), kind)
    x = drawn(num_rows, 272, seed=1, dtype=torch.bfloat16).cuda().requires_grad_()
    d_out = drawn(num_rows, 144, seed=2, dtype=torch.bfloat16).cuda()
    out = frozen_product(x, frozen)
    (d_x,) = torch.autograd.grad(out, x, d_out)
    if kind == "float8":
        expected = reference.float8_product(x, frozen.values, frozen.scales)
        expected_d_x = reference.float8_gradient(d_out, frozen.values, frozen.scales)
    else:
        matrix = thaw(frozen, torch.bfloat16)
        expected, expected_d_x = x @ matrix.t(), d_out @ matrix
    assert (out - expected).norm() < 1e-2 * expected.norm()
    assert (d_x - expected_d_x).norm() < 1e-2 * expected_d_x.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("is_fast", [True, False])
def test_long_sums_are_those_of_the_reference(
    is_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ttt.ops.frozen import float8

    monkeypatch.setattr(float8, "FAST_SUMS", is_fast)
    frozen = freeze(drawn(64, 8192, dtype=torch.bfloat16).cuda(), "float8")
    x = drawn(200, 8192, seed=1, dtype=torch.bfloat16).cuda()
    expected = reference.float8_product(x, frozen.values, frozen.scales)
    assert (frozen_product(x, frozen) - expected).norm() < 1e-2 * expected.norm()
