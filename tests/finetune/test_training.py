"""Training runs on recordings: losses against stock moshi's, memory, large batches, evaluation."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from data_tools import write_dataset
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
    saved_weights,
    train,
    trainer,
)

import finetune.trainer
from finetune.data import Batch
from finetune.distributed import World
from finetune.errors import UserError
from finetune.evaluation import evaluate
from ttt import TTTLMModel
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
        "max_steps": 10,
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
    schedule = OneCycleLR(optimizer, max_lr=3e-3, total_steps=10, pct_start=0.3)
    expected: list[Any] = []
    for _ in range(10):
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

    def broken() -> Iterator[Batch]:
        assert run.eval_data is not None
        yield next(iter(run.eval_data))
        raise UserError("a recording is broken")

    with pytest.raises(UserError, match="a recording is broken"):
        evaluate(run.model, broken(), run.loss_weights, ALONE)
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


# --- random numbers -------------------------------------------------------------------------------


def test_training_does_not_depend_on_what_random_numbers_others_draw(
    config: Path, tmp_path: Path
) -> None:
    train(config, tmp_path / "one", LORA)
    torch.manual_seed(123)
    torch.rand(5)
    train(config, tmp_path / "other", LORA)
    assert_same_weights(saved_weights(tmp_path / "one", 4), saved_weights(tmp_path / "other", 4))


def test_training_draws_no_random_numbers(config: Path, tmp_path: Path) -> None:
    """So a checkpoint keeps no state of them, and a run that goes on from one is the same."""
    longer = write_dataset(tmp_path / "longer", [4.0, 4.0])  # the health of speech is checked
    overrides: dict[str, Any] = {"do_eval": True, "eval_freq": 2, "data.eval_data": str(longer)}
    overrides |= {"duration_sec": 3, "data.num_workers": 2, "data.room_tone": -70.0}
    run = trainer(config, tmp_path / "run", LORA | overrides)
    before = torch.get_rng_state()
    assert run.train() == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert any("health/" in line for line in (tmp_path / "run/metrics.eval.jsonl").open())
