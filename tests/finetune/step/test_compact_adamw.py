"""Moments in fewer bits: what is stepped, kept and continued."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training_tools import (
    LORA,
    assert_same_weights,
    checkpoint,
    logged,
    saved_weights,
    stop_after,
    train,
    trainer,
)

from finetune.config import OptimArgs, load_config
from finetune.distributed import World, shard_size
from finetune.errors import UserError
from finetune.step import Optimizer, moment_bytes
from finetune.step.compact_adamw import LEAST, CompactAdamW

WORLD = World(0, 1, torch.device("cpu"))
KINDS = ["bfloat16", "int8"]


def after_steps(kind: Any, num_steps: int = 12) -> tuple[torch.Tensor, Optimizer]:
    """A weight that AdamW pulls to a target, with gradients that are partly noise."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 80, generator=generator))
    target = torch.randn(64, 80, generator=generator)
    scales = 10 ** torch.linspace(-3, 1, 64)[:, None]
    args = OptimArgs(lr=0.05, weight_decay=0.0, state=kind)
    optimizer = Optimizer({"base": {"weight": weight}}, args, max_steps=num_steps)
    for _ in range(num_steps):
        drawn = torch.randn(64, 80, generator=generator)
        weight.grad = scales * (weight.detach() - target + 0.5 * drawn)
        optimizer.step(max_norm=1e9, world=WORLD, is_loss_finite=True)
    return weight.detach(), optimizer


@pytest.mark.parametrize(("kind", "apart"), [("bfloat16", 0.005), ("int8", 0.05)])
def test_the_steps_are_adamws_but_for_the_rounding_of_moments(kind: str, apart: float) -> None:
    expected, _ = after_steps("float32")
    start, _ = after_steps("float32", 1)
    found, optimizer = after_steps(kind)
    moved = (expected - start).norm()
    assert 0 < (found - expected).norm() < apart * moved
    kept = optimizer.tensors()
    moments = [t for name, (t, _) in kept.items() if name.startswith("exp_avg")]
    assert sum(t.nbytes for t in moments) == moment_bytes(64 * 80, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_small_parameters_are_stepped_exactly(kind: str) -> None:
    weights = []
    for each in ("float32", kind):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, LEAST - 1))
        args = OptimArgs(lr=0.05, state=each)  # type: ignore[arg-type]
        optimizer = Optimizer({"base": {"weight": weight}}, args, max_steps=5)
        for step in range(5):
            weight.grad = torch.sin(weight.detach() * (step + 1))
            optimizer.step(max_norm=1e9, world=WORLD, is_loss_finite=True)
        weights.append(weight.detach())
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_is_stepped_as_if_it_were_alone(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes are no multiples of a block, one parameter is small, and one has gradients at times."""
    monkeypatch.setattr("finetune.step.compact_adamw.AT_ONCE", 20_000)
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(*s, generator=generator) for s in ((64, 80), (4097,), (7, 7), (90, 101))]
    steps = [[torch.randn(w.shape, generator=generator) for w in starts] for _ in range(4)]

    def stepped(numbers: list[int]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        weights = {str(i): torch.nn.Parameter(starts[i].clone()) for i in numbers}
        optimizer = Optimizer({"lora": weights}, OptimArgs(lr=0.05, state=kind), max_steps=4)
        for step, gradients in enumerate(steps):
            for i in numbers:
                weights[str(i)].grad = None if i == step == 1 else gradients[i].clone()
            optimizer.step(max_norm=1e9, world=WORLD, is_loss_finite=True)
        kept = {name: tensor for name, (tensor, _) in optimizer.tensors().items()}
        return [w.detach() for w in weights.values()], kept

    together, kept = stepped([0, 1, 2, 3])
    for i, weight in enumerate(together):
        (alone,), own = stepped([i])
        torch.testing.assert_close(weight, alone, rtol=0, atol=0)
        for name, tensor in own.items():
            torch.testing.assert_close(kept[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_to_the_bit(
    config: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All of the tiny model's parameters are small.
    monkeypatch.setattr("finetune.step.compact_adamw.LEAST", 16)
    how: dict[str, Any] = {**LORA, "optim.state": kind, "max_steps": 4, "ckpt_freq": 2}
    train(config, tmp_path / "whole", how)
    stop_after(trainer(config, tmp_path / "cut", how), 3)
    train(config, tmp_path / "cut", {**how, "resume": True})
    assert_same_weights(saved_weights(tmp_path / "whole", 4), saved_weights(tmp_path / "cut", 4))
    train(config, tmp_path / "float32", {**how, "optim.state": "float32"})
    assert logged(tmp_path / "whole")[-1] != logged(tmp_path / "float32")[-1]
    assert logged(tmp_path / "whole") == pytest.approx(logged(tmp_path / "float32"), abs=0.1)
    with pytest.raises(UserError, match=f"optim.state: was {kind} when the checkpoint was made"):
        trainer(config, tmp_path / "whole", {**how, "optim.state": "float32", "resume": True})
    assert checkpoint(tmp_path / "whole", 4).is_dir()


def test_a_part_of_a_parameter_keeps_moments_as_the_whole_does() -> None:
    """However many processes share it, and however it is cut."""
    part = torch.nn.Parameter(torch.ones(LEAST // 2))
    part.grad = torch.ones(LEAST // 2)
    groups = [{"params": [part], "numels": [LEAST]}]
    adamw = CompactAdamW(groups, kind="bfloat16", fused=False)
    adamw.step()
    assert adamw.state[part]["exp_avg"].dtype == torch.bfloat16


def test_moments_of_another_kind_are_not_taken() -> None:
    weight = torch.nn.Parameter(torch.ones(LEAST))
    kept, other = (
        Optimizer({"base": {"weight": weight}}, OptimArgs(state=kind), max_steps=5)
        for kind in ("bfloat16", "float32")
    )
    with pytest.raises(ValueError, match="it keeps moments in bfloat16"):
        other.restore(kept.summary(), fill=lambda tensors: pytest.fail("filled"))


def test_moments_in_8_bits_are_not_sharded(config: Path) -> None:
    args = load_config(config, {"optim.state": "int8", "parallel.shard_size": 2, **LORA})
    with pytest.raises(UserError, match="int8 is for models that are not sharded"):
        shard_size(args, 2)
