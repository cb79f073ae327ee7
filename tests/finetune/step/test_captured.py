"""Passes that are recorded are those that are not."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from finetune.config import OptimArgs
from finetune.distributed import World
from finetune.step import CapturedGradients, Optimizer

ROWS = (8, 8, 3, 8, 3)
"""Batches of two sizes, in turn."""


@dataclass
class Parts:
    total: Tensor
    largest: Tensor


def trained(device: str, dtype: torch.dtype, *, is_captured: bool) -> tuple[list[float], Tensor]:
    """Return the losses of a few steps, and what the model puts out after them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 1)).to(device, dtype)
    named = dict(model.named_parameters())
    optimizer = Optimizer({"base": named}, OptimArgs(lr=1e-2), max_steps=len(ROWS))

    def compute(x: Tensor, y: Tensor) -> Parts:
        squares = (model(x).float() - y) ** 2
        return Parts(squares.mean(), squares.max().detach())

    gradients = CapturedGradients(compute, optimizer)
    losses = []
    for seed, rows in enumerate(ROWS):
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, 6, generator=random).to(device, dtype)
        y = torch.randn(rows, 1, generator=random).to(device)
        if is_captured:
            parts = gradients(x, y)
        else:
            parts = compute(x, y)
            parts.total.backward()
        world = World(0, 1, torch.device(device))
        optimizer.step(max_norm=1.0, world=world, is_loss_finite=True)
        losses += [parts.total.item(), parts.largest.item()]
    with torch.no_grad():
        return losses, model(torch.ones(1, 6, device=device, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_training_is_the_same(device: str, dtype: torch.dtype) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    losses, out = trained(device, dtype, is_captured=True)
    expected, expected_out = trained(device, dtype, is_captured=False)
    assert losses == expected
    assert torch.equal(out, expected_out)
    assert len(set(losses)) == len(losses)
