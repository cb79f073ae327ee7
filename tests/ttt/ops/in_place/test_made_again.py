"""`in_place_delta` in a layer that activation checkpointing makes again."""

from typing import Any

import pytest
import torch
from test_sum import sizes

from ttt import ops
from ttt.layers.execution import Execution

NUM_FRAMES, HIDDEN, WIDTH = 75, 16, 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("super_chunk", [16, 2048])
@pytest.mark.parametrize("is_cut", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("is_projected", [False, True], ids=["", "projection"])
def test_gradients_are_the_same_to_the_bit(
    dtype: torch.dtype, super_chunk: int, is_cut: bool, is_projected: bool
) -> None:
    torch.manual_seed(0)
    shapes = [(2, NUM_FRAMES, HIDDEN), (2, NUM_FRAMES, WIDTH), (WIDTH, WIDTH)]
    z, v, projection = (torch.randn(*shape, dtype=dtype).requires_grad_() for shape in shapes)
    beta = torch.tensor([7.0]).requires_grad_()
    frames = torch.arange(NUM_FRAMES).expand(2, -1)
    options: dict[str, Any] = {
        "documents": frames // 30 if is_cut else None,
        "written": frames % 11 != 0,
    }

    def learn(z: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if is_projected:
            options["projection"] = projection
        out = ops.in_place_delta(z, v, beta=beta, chunk_size=8, lag=1, decay=0.9, **options)
        # A second use, with what was kept for itself.
        again = ops.in_place_delta(z, v, beta=2 * beta, chunk_size=4, lag=1, written=frames > 40)
        return v + out + again

    leaves = [z, v, beta, *([projection] if is_projected else [])]
    d_out = torch.randn(*shapes[1], dtype=dtype)
    results = []
    for checkpointing in (False, True):
        with sizes(super_chunk, 8):
            execution = Execution(checkpointing=checkpointing)
            out = execution.split_layer(learn, z, v, may_keep=True)
            results.append([out, *torch.autograd.grad(out, leaves, d_out)])
    for one, other in zip(*results, strict=True):
        assert one.norm() > 0 and torch.equal(one, other)


def test_a_projection_is_a_product_of_the_targets() -> None:
    torch.manual_seed(0)
    z = torch.randn(1, NUM_FRAMES, HIDDEN, dtype=torch.float64)
    v, projection = (
        torch.randn(*shape, dtype=torch.float64).requires_grad_()
        for shape in [(1, NUM_FRAMES, WIDTH), (WIDTH, WIDTH)]
    )
    options: dict[str, Any] = {"beta": 7.0, "chunk_size": 8, "lag": 1}
    results = []
    for out in (
        ops.in_place_delta(z, v, projection=projection, **options),
        ops.in_place_delta(z, v @ projection.mT, **options),
    ):
        results.append([out, *torch.autograd.grad(out.square().sum(), [v, projection])])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)
