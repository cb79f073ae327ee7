"""Steps of the optimizer: its schedule, float32 master weights, and losses that are not finite."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import ALONE
from training_tools import (
    FULL,
    assert_same_weights,
    checkpoint,
    logged,
    logged_steps,
    train,
    trainer,
)

import finetune.step.gradients
from finetune.checkpoint import list_checkpoints
from finetune.config import OptimArgs
from finetune.errors import UserError
from finetune.step import Optimizer, stream_sums
from finetune.step.loss import StreamSums

# --- the schedule, and steps that are counted -----------------------------------------------------


@pytest.mark.parametrize("pct_start, max_steps", [(0.05, 20), (0.5, 2), (0.05, 1)])
def test_the_schedule_may_rise_for_a_single_step(pct_start: float, max_steps: int) -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    args = OptimArgs(lr=1.0, pct_start=pct_start)
    optimizer = Optimizer({"base": {"weight": weight}}, args, max_steps=max_steps)
    rates: list[Any] = []
    for _ in range(max_steps):
        weight.grad = torch.ones(1)
        result = optimizer.step(max_norm=1.0, world=ALONE, is_loss_finite=True)
        rates.append(result.learning_rates["lr"])
    assert max(rates) == max(rates[:2]) and min(rates) > 0
    assert weight.item() < 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_state_continues_where_adamw_counts_its_steps_elsewhere(fused: bool) -> None:
    """A fused AdamW, on a GPU, counts them there; any other on the CPU. Made by the other one."""
    saved = Optimizer({"base": {"weight": torch.nn.Parameter(torch.ones(1))}}, OptimArgs(),
                      max_steps=5)  # fmt: skip
    saved.adamw.defaults["fused"] = not fused
    saved.parameters["base"][0].grad = torch.ones(1)
    saved.step(max_norm=1.0, world=ALONE, is_loss_finite=True)
    there = torch.nn.Parameter(torch.ones(1, device="meta"))
    resumed = Optimizer({"base": {"weight": there}}, OptimArgs(), max_steps=5)
    resumed.adamw.defaults["fused"] = fused
    resumed.restore(saved.summary(), fill=lambda tensors: None)
    state = resumed.adamw.state[there]
    assert state["step"].device.type == ("meta" if fused else "cpu")
    assert state["exp_avg"].device.type == "meta"


# --- float32 master weights -----------------------------------------------------------------------


def optimize(dtype: torch.dtype, grads: list[Any], *, lr: float) -> torch.Tensor:
    """A weight of 1 after one step per list of gradients (one per micro-batch)."""
    weight = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    args = OptimArgs(lr=lr, weight_decay=0.0)
    optimizer = Optimizer({"base": {"weight": weight}}, args, max_steps=len(grads))
    for micro_batches in grads:
        for grad in micro_batches:
            (weight * grad).sum().backward()
        optimizer.step(max_norm=1e9, world=ALONE, is_loss_finite=True)
    return weight.detach()


def test_steps_too_small_for_bfloat16_add_up() -> None:
    lr = 2e-4  # next to 1, bfloat16 numbers are 4e-3 apart
    one = optimize(torch.bfloat16, [[1.0]], lr=lr)
    assert torch.equal(one, torch.ones_like(one))
    many = optimize(torch.bfloat16, [[1.0]] * 100, lr=lr)
    exact = optimize(torch.float32, [[1.0]] * 100, lr=lr)
    assert many.max() < 1 - 4e-3
    assert torch.equal(many, exact.bfloat16())


def test_gradients_too_small_for_bfloat16_add_up_over_micro_batches() -> None:
    # In bfloat16 256 + 1 is 256: these two steps would be one and the same.
    large_then_small = [[256.0, *[1.0] * 256], [512.0]]
    expected = [[512.0], [512.0]]
    assert torch.equal(
        optimize(torch.bfloat16, large_then_small, lr=0.1),
        optimize(torch.bfloat16, expected, lr=0.1),
    )


# --- losses that are not finite -------------------------------------------------------------------


def sabotage(
    monkeypatch: pytest.MonkeyPatch, calls: set[Any], *, break_gradient_only: bool = False
) -> list[Any]:
    """Makes the given calls of the loss (counted from 1) not finite; also collects the weights
    that every call finds, which are those before that step."""
    found: list[Any] = []

    def broken(model: Any, *args: Any) -> tuple[StreamSums, StreamSums]:
        found.append({name: p.detach().clone() for name, p in model.named_parameters()})
        text, audio = stream_sums(model, *args)
        if len(found) in calls:
            if break_gradient_only:
                text.loss.register_hook(lambda grad: grad * float("inf"))
            else:
                text.loss = text.loss * float("nan")
        return text, audio

    monkeypatch.setattr(finetune.step.gradients, "stream_sums", broken)
    return found


@pytest.mark.parametrize("break_gradient_only", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dtype: str,
    break_gradient_only: bool,
) -> None:
    weights = sabotage(monkeypatch, {2}, break_gradient_only=break_gradient_only)
    train(config, tmp_path, {**FULL, "optim.lr": 0.1, "param_dtype": dtype})
    _, before, after, later = weights
    assert_same_weights(before, after)
    assert not torch.equal(after["text_linear.weight"], later["text_linear.weight"])
    assert all(weight.isfinite().all() for weight in later.values())
    assert logged(tmp_path, "nonfinite_steps") == [0, 1, 1, 1]
    losses = logged(tmp_path)
    assert [math.isfinite(loss) for loss in losses] == [True, break_gradient_only, True, True]
    assert capsys.readouterr().out.count("step 2 skipped") == 1


def test_too_many_such_steps_in_a_row_stop_the_run(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch, {2, 3, 5, 6, 7})
    overrides: dict[str, Any] = {"max_steps": 20, "max_nonfinite_steps": 3}
    with pytest.raises(UserError, match=r"last 3 steps.*max_nonfinite_steps.*Lower optim.lr"):
        train(config, tmp_path, overrides)
    assert logged_steps(tmp_path)[-1] >= 6


def test_the_count_in_a_row_survives_resuming(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides: dict[str, Any] = {"max_steps": 6, "max_nonfinite_steps": 3, "ckpt_freq": 1}
    sabotage(monkeypatch, {1, 2})
    run = trainer(config, tmp_path, overrides)
    monkeypatch.setattr(run, "interrupted", lambda: run.step == 2)
    run.train()
    sabotage(monkeypatch, {1})
    with pytest.raises(UserError, match="last 3 steps"):
        train(config, tmp_path, {**overrides, "resume": True})


DIVERGING: dict[str, Any] = {**FULL, "optim.lr": "1e38", "max_norm": "1e38", "health_sec": 0}
"""Nothing is finite after the first step, within what `max_nonfinite_steps` tolerates."""


@pytest.mark.parametrize("do_ckpt", [True, False])
def test_a_run_that_has_diverged_at_its_last_evaluation_ends_in_an_error(
    config: Path, tmp_path: Path, do_ckpt: bool
) -> None:
    """Its last checkpoint is none that anything goes on from."""
    overrides = {**DIVERGING, "do_eval": True, "do_ckpt": do_ckpt, "ckpt_freq": 2}
    with pytest.raises(UserError, match=r"evaluation after step 4, the last, is (nan|inf).*Lower"):
        train(config, tmp_path, overrides)
    assert logged(tmp_path, "nonfinite_steps")[-1] < 10
    assert list_checkpoints(tmp_path) == ([checkpoint(tmp_path, 2)] if do_ckpt else [])
    assert (tmp_path / "checkpoints/checkpoint_000004.diverged").is_dir() == do_ckpt
    if do_ckpt:  # so again; what is set apart is replaced
        with pytest.raises(UserError, match="evaluation after step 4"):
            train(config, tmp_path, {**overrides, "resume": True})
        assert list_checkpoints(tmp_path) == [checkpoint(tmp_path, 2)]


@pytest.mark.parametrize("num_lost", [1, 2])
def test_steps_that_are_lost_at_the_end_are_no_accident_if_nothing_follows_them(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_lost: int
) -> None:
    sabotage(monkeypatch, {4, 5 - num_lost})
    if num_lost == 1:
        train(config, tmp_path)
        assert list_checkpoints(tmp_path) == [checkpoint(tmp_path, 4)]
        return
    with pytest.raises(UserError, match=r"last 2 steps before the run's end, step 4, had a loss"):
        train(config, tmp_path)
    # They changed nothing, and may come of bad data: with more steps the run goes on from there.
    assert list_checkpoints(tmp_path) == [checkpoint(tmp_path, 4)]
    train(config, tmp_path, {"resume": True, "max_steps": 5})
    assert list_checkpoints(tmp_path)[-1] == checkpoint(tmp_path, 5)


def test_an_evaluation_shows_that_the_model_is_well_after_lost_steps(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch, {3, 4})
    train(config, tmp_path, {"do_eval": True, "health_sec": 0})
    assert logged(tmp_path, "nonfinite_steps")[-1] == 2
    assert list_checkpoints(tmp_path) == [checkpoint(tmp_path, 4)]


@pytest.mark.parametrize("do_ckpt", [True, False])
def test_weights_that_are_not_finite_are_never_saved(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, do_ckpt: bool
) -> None:
    run = trainer(config, tmp_path, {"ckpt_freq": 2, "do_ckpt": do_ckpt})
    step = run.optimizer.step
    name = next(name for name, p in run.model.named_parameters() if p.requires_grad)

    def step_into_nan(**given: Any) -> Any:
        result = step(**given)
        if run.step == 4:
            run.model.get_parameter(name).data[-1] = float("inf")
        return result

    monkeypatch.setattr(run.optimizer, "step", step_into_nan)
    with pytest.raises(
        UserError, match=rf"after step 4 weights that train .*\({name}\), and nothing"
    ):
        run.train()
    assert list_checkpoints(tmp_path) == ([checkpoint(tmp_path, 2)] if do_ckpt else [])
    if do_ckpt:
        train(config, tmp_path, {"resume": True})
