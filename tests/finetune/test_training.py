"""Training runs through `Trainer`, on recordings, with a checkpoint of Moshi's layout."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_lm_kwargs
from moshi.models.lm import LMModel
from moshi.modules.lora import replace_all_linear_with_lora
from moshi.utils.compile import no_compile
from safetensors.torch import load_file
from torch.optim.lr_scheduler import OneCycleLR
from training_tools import (
    FULL,
    LM_CONFIG,
    LORA,
    PLAIN,
    assert_same_weights,
    logged,
    logged_steps,
    saved_weights,
    train,
    trainer,
)

import finetune.step.gradients
import finetune.trainer
from finetune.config import OptimArgs, TrainArgs
from finetune.config.args import DataArgs
from finetune.distributed import World
from finetune.errors import UserError
from finetune.evaluation import evaluate
from finetune.monitoring import EffectWatch
from finetune.plan.describe import warn_of_slow_layers
from finetune.step import Optimizer, stream_sums
from finetune.step.loss import StreamSums
from ttt import TTTArgs, TTTLMModel, build_model
from ttt.layers import execution

SLOW = pytest.mark.slow
ALONE = World(rank=0, size=1, device=torch.device("cpu"))


# --- against stock moshi --------------------------------------------------------------------------


def plain_loss(
    model: TTTLMModel, codes: torch.Tensor, *, padding_weight: float, first_codebook_weight: float
) -> torch.Tensor:
    """Σ w · CE / Σ w of the text, plus the same of the audio."""
    output = model(codes)
    targets = codes[:, :1][output.text_mask]
    is_padding = (targets == 3) | (targets == 0)
    weight = torch.where(is_padding, padding_weight, 1.0)
    nll = F.cross_entropy(output.text_logits[output.text_mask], targets, reduction="none")
    text_loss = (weight * nll).sum() / weight.sum()

    targets = codes[:, 1 : 1 + model.dep_q]
    weight = torch.ones(targets.shape)
    weight[:, 0] = first_codebook_weight
    targets, weight = targets[output.mask], weight[output.mask]
    nll = F.cross_entropy(output.logits[output.mask], targets, reduction="none")
    return text_loss + (weight * nll).sum() / weight.sum()


def stock_model(config: Path, own: TTTLMModel, *, lora: bool) -> tuple[Any, list[Any]]:
    """Stock `moshi` with the weights that a run starts from, and what trains in it; `own` is the
    run's model, for the adapters that are drawn at random."""
    model = LMModel(device="cpu", dtype=torch.float32, **LM_CONFIG)
    model.load_state_dict(load_file(config.parent / "model/model.safetensors"))
    if not lora:
        return model, list(model.parameters())
    replace_all_linear_with_lora(model, LORA["lora.rank"], 2.0)
    drawn = {name: p for name, p in own.named_parameters() if "lora_" in name}
    assert not any(p.any() for name, p in drawn.items() if "lora_B" in name)
    model.load_state_dict(drawn, strict=False)
    return model, [p for name, p in model.named_parameters() if "lora_" in name]


@pytest.mark.parametrize(
    "gradient_checkpointing, compile",
    [
        (False, False),
        # Checkpointed or not, losses are the same to the bit: see what must not matter, below.
        pytest.param(True, False, marks=SLOW),
        ("selective", False),
        pytest.param(True, True, marks=SLOW),
    ],
)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_without_ttt_the_losses_are_those_of_a_loop_over_stock_moshi(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lora: bool,
    gradient_checkpointing: bool | str,
    compile: bool,
) -> None:
    monkeypatch.setattr(execution, "BACKEND", "aot_eager")
    monkeypatch.setattr(execution, "MIN_KEPT_WIDTH", 16)
    overrides: dict[str, Any] = {
        **PLAIN,
        "full_finetuning": not lora,
        **(LORA if lora else {}),
        "max_steps": 20,
        "gradient_checkpointing": gradient_checkpointing,
        "compile": compile,
        "text_padding_weight": 0.5,
        "first_codebook_weight_multiplier": 100.0,
        "max_norm": 0.7,
    }
    own = trainer(config, tmp_path / "data", overrides)
    batches = own.train_data
    model, trained = stock_model(config, own.model, lora=lora)
    optimizer = torch.optim.AdamW(trained, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = OneCycleLR(optimizer, max_lr=3e-3, total_steps=20, pct_start=0.3)
    expected: list[Any] = []
    for _ in range(20):
        codes = next(batches).codes
        with no_compile():
            loss = plain_loss(model, codes, padding_weight=0.5, first_codebook_weight=100.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.7)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert expected[-1] < (0.98 if lora else 0.8) * expected[0]

    train(config, tmp_path / "run", overrides)
    assert logged(tmp_path / "run") == pytest.approx(expected, abs=1e-5)


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


# --- running out of memory ------------------------------------------------------------------------


def test_a_step_that_does_not_fit_names_what_takes_less(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = finetune.trainer.Trainer.forward_backward

    def forward_while_there_is_room(self: Any, batches: Any) -> tuple[float, float]:
        if self.step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, batches)

    monkeypatch.setattr(finetune.trainer.Trainer, "forward_backward", forward_while_there_is_room)
    overrides: dict[str, Any] = {
        "max_steps": 5,
        "ckpt_freq": 2,
        "batch_size": 2,
        "num_microbatches": 3,
    }
    overrides |= {"gradient_checkpointing": False}
    with pytest.raises(UserError, match="ran out of memory in step 3") as caught:
        train(config, tmp_path, overrides)
    for way in (
        "a smaller batch_size (now 2)",
        "num_microbatches (now 3)",
        "gradient_checkpointing: selective; gradient_checkpointing: true",
    ):
        assert way in str(caught.value)
    monkeypatch.undo()
    assert train(config, tmp_path, {**overrides, "resume": True}).step == 5


@pytest.mark.parametrize("freq", [0, 2])
def test_an_evaluation_that_does_not_fit_names_what_takes_less(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, freq: int
) -> None:
    evaluate = finetune.trainer.evaluate
    steps = iter([0, 2])

    def evaluate_while_there_is_room(*given: Any, **options: Any) -> dict[str, float]:
        if next(steps) == freq:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return evaluate(*given, **options)

    monkeypatch.setattr(finetune.trainer, "evaluate", evaluate_while_there_is_room)
    overrides: dict[str, Any] = {"do_eval": True, "eval_freq": 2, "batch_size": 2, "health_sec": 0}
    expected = f"ran out of memory in the evaluation after {freq} steps"
    with pytest.raises(UserError, match=expected) as caught:
        train(config, tmp_path, overrides)
    for way in ("a smaller batch_size (now 2)", "a shorter duration_sec", "do_eval: false"):
        assert way in str(caught.value)
    assert "gradient_checkpointing" not in str(caught.value)


# --- every option reaches the run -----------------------------------------------------------------


EXACT: dict[str, Any] = {**FULL, "param_dtype": "float32", "max_steps": 3, "do_ckpt": False}
"""Losses and no checkpoint; what trains shows in them from the second step on."""


@pytest.fixture(scope="module")
def baseline(config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of three steps with everything switched on."""
    run_dir = tmp_path_factory.mktemp("baseline") / "run"
    train(config, run_dir, EXACT)
    return logged(run_dir)


@pytest.mark.parametrize(
    "option, value",
    [
        ("full_finetuning", False),
        ("first_codebook_weight_multiplier", 2.0),
        ("text_padding_weight", 0.1),
        ("duration_sec", 1.6),
        ("batch_size", 3),
        ("num_microbatches", 2),
        ("max_norm", 1e-9),
        ("seed", 1),
        ("param_dtype", "bfloat16"),
        ("optim.lr", 1e-3),
        ("optim.ttt_lr", 3e-2),
        ("optim.weight_decay", 10.0),
        ("optim.pct_start", 0.6),
        ("data.shuffle", False),
        ("ttt.enabled", False),
        ("ttt.start_layer", 1),
        ("ttt.layer_frequency", 2),
        ("ttt.chunk_size", 4),
        ("ttt.learning_rate", 2.0),
        ("ttt.lr_scale", "none"),
        ("ttt.target", "input"),
        ("ttt.target", "text"),
        ("ttt.conv_kernel_size", 3),
        ("ttt.conv_lookahead", 0),
        ("ttt.max_delta_norm", 1e-4),
    ],
)
def test_an_option_changes_the_run(
    config: Path, tmp_path: Path, baseline: list[float], option: str, value: float | str
) -> None:
    train(config, tmp_path, {**EXACT, option: value})
    assert logged(tmp_path) != baseline


@pytest.mark.parametrize(
    "option, value",
    [
        ("gradient_checkpointing", True),
        ("gradient_checkpointing", "selective"),
        ("data.num_workers", 2),
        ("do_eval", True),
        ("log_freq", 1),
    ],
)
def test_an_option_that_must_not_matter_changes_nothing(
    config: Path, tmp_path: Path, baseline: list[float], option: str, value: str | int
) -> None:
    train(config, tmp_path, {**EXACT, option: value})
    assert logged(tmp_path) == baseline


@pytest.mark.parametrize("option, value", [("lora.rank", 4), ("lora.scaling", 3.0)])
def test_an_option_of_lora_changes_the_run(
    config: Path, tmp_path: Path, option: str, value: float
) -> None:
    steps: dict[str, Any] = {**LORA, "max_steps": 3, "do_ckpt": False}
    train(config, tmp_path / "one", steps)
    train(config, tmp_path / "other", {**steps, option: value})
    assert logged(tmp_path / "one") != logged(tmp_path / "other")


def test_ttt_has_no_weight_decay(config: Path, tmp_path: Path) -> None:
    train(config, tmp_path / "one")
    train(config, tmp_path / "other", {"optim.weight_decay": 10.0})
    assert_same_weights(saved_weights(tmp_path / "one", 4), saved_weights(tmp_path / "other", 4))


def test_lines_are_logged_as_often_as_asked_for(config: Path, tmp_path: Path) -> None:
    train(config, tmp_path, {"max_steps": 7, "log_freq": 3})
    assert logged_steps(tmp_path) == [3, 6, 7]


# --- large batches --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FULL, LORA], ids=["full", "lora"])
def test_accumulated_micro_batches_are_the_large_batch(
    config: Path, tmp_path: Path, kind: dict[str, Any]
) -> None:
    overrides: dict[str, Any] = {**kind, "param_dtype": "float32", "text_padding_weight": 0.3}
    large: dict[str, Any] = {**overrides, "batch_size": 4, "num_microbatches": 1}
    small: dict[str, Any] = {**overrides, "batch_size": 1, "num_microbatches": 4}
    codes = next(trainer(config, tmp_path / "data", large).train_data).codes
    targets_in_row = (codes != -1).sum((1, 2)).tolist()
    assert len(set(targets_in_row)) > 1, "micro-batches of unequal weight are what can go wrong"

    train(config, tmp_path / "large", large)
    train(config, tmp_path / "small", small)
    assert logged(tmp_path / "small") == pytest.approx(logged(tmp_path / "large"), abs=1e-5)
    # Not the weights: Adam makes a whole step of a gradient that is nothing but rounding.
    gradients: list[Any] = []
    for name, options in (("large", large), ("small", small)):
        run = trainer(config, tmp_path / f"{name} gradients", options)
        run.forward_backward([next(run.train_data) for _ in range(options["num_microbatches"])])
        gradients.append({n: p.grad for n, p in run.model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


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


# --- evaluation -----------------------------------------------------------------------------------


def test_evaluation_counts_every_target_once_and_starts_afresh(
    config: Path, tmp_path: Path
) -> None:
    results: list[Any] = []
    for batch_size in (3, 2, 1):  # 3 segments of unequal length
        overrides: dict[str, Any] = {**PLAIN, "do_eval": True, "batch_size": batch_size}
        run = trainer(config, tmp_path / str(batch_size), overrides)
        assert run.eval_data is not None
        results += [evaluate(run.model, run.eval_data, run.loss_weights, ALONE) for _ in range(2)]
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-5)
    assert results[2] == results[3]

    whole = trainer(config, tmp_path / "all", overrides | {"batch_size": 3}).eval_data
    assert whole is not None
    codes = next(iter(whole))
    with torch.no_grad():
        output = run.model(codes.codes)
    nll = F.cross_entropy(
        output.text_logits[output.text_mask], codes.codes[:, :1][output.text_mask]
    )
    assert results[0]["text_nll"] == pytest.approx(nll.item(), rel=1e-5)
    assert results[0]["text_perplexity"] == pytest.approx(math.exp(nll.item()), rel=1e-5)
    expected = plain_loss(run.model, codes.codes, padding_weight=0.5, first_codebook_weight=1.0)
    assert results[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_as_it_was(
    config: Path, tmp_path: Path, training: bool
) -> None:
    run = trainer(config, tmp_path, {**FULL, "do_eval": True})
    run.model.train(training)
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    run.evaluate()
    assert_same_weights(run.model.state_dict(), before)
    assert all(module.training is training for module in run.model.modules())
    assert all(p.grad is None for p in run.model.parameters())


def test_evaluations_come_as_often_as_asked_for_and_at_the_end(
    config: Path, tmp_path: Path
) -> None:
    train(config, tmp_path / "some", {"do_eval": True, "eval_freq": 2, "max_steps": 5})
    assert [
        json.loads(line)["step"]
        for line in (tmp_path / "some/metrics.eval.jsonl").read_text().splitlines()
    ] == [0, 2, 4, 5]  # before the first step as well: what training starts from
    train(config, tmp_path / "once", {"do_eval": True, "max_steps": 5})
    assert len(logged(tmp_path / "once", kind="eval")) == 2


# --- what a run says ------------------------------------------------------------------------------


@pytest.mark.parametrize("learning_rate, warnings", [(1e-3, 1), (1.0, 0)])
def test_ttt_without_effect_is_warned_of_once(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    learning_rate: float,
    warnings: int,
) -> None:
    published = {"ttt.lr_scale": "none", "ttt.target": "text", "ttt.learning_rate": learning_rate}
    train(config, tmp_path, {"max_steps": 24, **published})
    out = capsys.readouterr().out
    assert out.count("it does nothing. Set ttt.lr_scale: relative, or raise ttt.l") == warnings
    assert out.count("steps TTT changes the outputs of layers 00, 01 by ") == warnings
    assert out.count("after 5 steps TTT changes its layers' outputs by ") == 1


@pytest.mark.parametrize(
    ("early", "late", "warning"),
    [
        ({"05": 0.0, "11": 0.0}, {"05": 0.3, "11": 0.02}, ""),
        ({"05": 0.0, "11": 0.0}, {"05": 0.3, "11": 0.002}, "of layer 11 by 0.002 (11) of their"),
        # It did something at first, and does nothing any more.
        ({"05": 0.1, "11": 0.1}, {"05": 1e-3, "11": 1e-3}, "of layers 05, 11 by 0.001 (05), 0.0"),
        (
            {"05": 0.1, "11": 0.1},
            {"05": math.nan, "11": 0.1},
            "TTT adds nan (05) times the output of layer 05",
        ),
    ],
)
def test_effects_are_judged_by_layer_and_as_they_are_now(
    caplog: pytest.LogCaptureFixture, early: dict[str, float], late: dict[str, float], warning: Any
) -> None:
    watch = EffectWatch(TrainArgs(DataArgs(), "run", max_steps=400, optim=OptimArgs(pct_start=0.2)))
    caplog.set_level("WARNING")
    for step in range(1, 100):
        effects = early if step < 80 else late
        watch.look(step, {f"layer_{layer}/effect": value for layer, value in effects.items()})
        assert step >= 80 or not caplog.messages  # the rates rise for 80 steps
    assert len(caplog.messages) == bool(warning) and warning in "".join(caplog.messages)


@pytest.mark.parametrize("learning_rate, warnings", [(1e6, 1), (1.0, 0)])
def test_ttt_that_drowns_its_layers_is_warned_of_once(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    learning_rate: float,
    warnings: int,
) -> None:
    train(config, tmp_path, {"max_steps": 6, "ttt.learning_rate": learning_rate})
    out = capsys.readouterr().out
    assert out.count("and drowns it. With write: sum, what all chunks have in common") == warnings


def test_what_ttt_does_is_logged_by_layer(config: Path, tmp_path: Path) -> None:
    train(config, tmp_path / "free")
    train(config, tmp_path / "bounded", {"ttt.max_delta_norm": 1e-6})
    for layer in ("00", "01"):
        effects = logged(tmp_path / "free", f"ttt/layer_{layer}/effect")
        assert effects[0] == 0 and effects[-1] > 0  # untrained TTT changes nothing
        deltas = {
            run: logged(tmp_path / run, f"ttt/layer_{layer}/delta")[-1]
            for run in ("free", "bounded")
        }
        assert 0 < deltas["bounded"] < deltas["free"]
        clip_rates = {
            run: logged(tmp_path / run, f"ttt/layer_{layer}/clip_rate")
            for run in ("free", "bounded")
        }
        assert clip_rates["free"][-1] == clip_rates["bounded"][0] == 0 < clip_rates["bounded"][-1]
    assert all(norm > 0 for norm in logged(tmp_path / "free", "grad_norm/ttt"))


def start_lines(
    config: Path, run_dir: Path, overrides: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> Any:
    """What a run prints before its first step."""
    train(config, run_dir, {"max_steps": 1, "do_ckpt": False, **overrides})
    return capsys.readouterr().out.split("step 1/1")[0]


def test_a_run_says_what_it_is_going_to_do(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = start_lines(config, tmp_path, {"do_eval": True, "health_sec": 0}, capsys)
    assert "7 segments of up to 25 frames" in out and "3 to evaluate" in out
    assert "TTT: in-place (sum, relative, learning rate 1) in layers 0, 1; 4 updates" in out
    assert "updates a sequence, every 5 frames" in out
    assert "attention sees 12 frames of 25" in out
    assert "(frozen)" in out and "ttt 578" in out
    assert f"writes to {tmp_path}" in out
    assert "warning: " not in out


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ({"duration_sec": 0.4}, "(5 frames), not longer than ttt.chunk_size (5 frames)"),
        ({"ttt.chunk_size": 50}, "TTT never learns anything"),
        ({"duration_sec": 0.96}, "attention sees the whole sequence (12 frames)"),
    ],
)
def test_a_run_warns_where_ttt_can_have_nothing_to_do(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: dict[str, Any],
    expected: Any,
) -> None:
    out = start_lines(config, tmp_path, overrides, capsys)
    assert out.count("warning: ") == 1 and expected in out


@pytest.mark.parametrize("method, size, warns", [("linear", 64, False), ("mlp", 64, True)])
def test_a_run_on_a_gpu_warns_where_no_kernel_scans(
    caplog: pytest.LogCaptureFixture, method: str, size: int, warns: bool
) -> None:
    ttt = TTTArgs(enabled=True, method=method, mini_batch_size=size, start_layer=0)
    model = build_model(tiny_lm_kwargs(dim=32), ttt, device="cpu", dtype=torch.float32)
    warn_of_slow_layers(model)
    assert ("16 or 32 frames" in caplog.text) == warns


def test_training_does_not_depend_on_what_random_numbers_others_draw(
    config: Path, tmp_path: Path
) -> None:
    train(config, tmp_path / "one", LORA)
    torch.manual_seed(123)
    torch.rand(5)
    train(config, tmp_path / "other", LORA)
    assert_same_weights(saved_weights(tmp_path / "one", 4), saved_weights(tmp_path / "other", 4))
