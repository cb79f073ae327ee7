"""Passes that are recorded are those that are not."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from torch import Tensor, nn

from finetune.config import OptimArgs
from finetune.data import TextEncoder
from finetune.distributed import World
from finetune.recall.spoken import training
from finetune.recall.spoken.presets import Stage, preset
from finetune.spoken import Answer, EncodedDialogues
from finetune.step import CapturedGradients, Optimizer

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENIZER = Path(__file__).parents[3] / "example/memory/tokenizer.model"

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
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_training_is_the_same(device: str, dtype: torch.dtype) -> None:
    # On a CPU nothing is recorded: there it is what each call has to do.
    losses, out = trained(device, dtype, is_captured=True)
    expected, expected_out = trained(device, dtype, is_captured=False)
    assert losses == expected
    assert torch.equal(out, expected_out)
    assert len(set(losses)) == len(losses)


class OneByOne:
    """The passes, not recorded."""

    def __init__(self, compute: Callable[..., Any], optimizer: Optimizer) -> None:
        self.compute = compute

    def __call__(self, *inputs: Tensor) -> Any:
        losses = self.compute(*inputs)
        losses.total.backward()
        return losses


def dialogues(count: int, num_frames: int) -> EncodedDialogues:
    """Return dialogues of noise, with two questions each."""
    random = torch.Generator().manual_seed(num_frames)
    text = torch.randint(0, 500, (count, num_frames), generator=random).short()
    codes = torch.randint(0, 256, (count, 16, num_frames), generator=random).byte()
    answers = torch.full((count, 6, len(Answer._fields)), -1, dtype=torch.int32)
    answers[:, 0] = torch.tensor(Answer(40, 0, 1, 1, 30, 35, 10, 0, 0))
    answers[:, 1] = torch.tensor(Answer(70, 0, 2, 0, 50, 65, 20, 1, 0))
    return EncodedDialogues(text, codes, answers)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("arm", ["off", "delta_hidden"])
def test_the_spoken_experiment_is_the_same(
    monkeypatch: pytest.MonkeyPatch, device: str, arm: str
) -> None:
    chosen = dataclasses.replace(preset("gpu"), audio_rows=2)
    model = preset("cpu").model
    chosen = dataclasses.replace(chosen, model=dataclasses.replace(model, width=64))
    text = TextEncoder(sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER)))
    stages = [Stage(dialogues(8, 100), 6, 4, 2), Stage(dialogues(4, 200), 3, 2, 1)]

    def train() -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        made = training.untrained(chosen, arm, seed=0, device=torch.device(device))
        curve = training.train(
            made, chosen, stages, text, seed=0, lr=1e-3, ttt_lr=2e-3, label="a test"
        )
        return curve, made.state_dict()

    monkeypatch.setattr(training, "LOG_STEPS", 1)
    curve, weights = train()
    monkeypatch.setattr(training, "CapturedGradients", OneByOne)
    expected_curve, expected = train()
    assert len(curve) == 9 and curve == expected_curve
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
