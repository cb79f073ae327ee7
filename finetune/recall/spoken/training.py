"""Train small Moshis on spoken dialogues."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.config import OptimArgs
from finetune.data import TextEncoder
from finetune.distributed import World
from finetune.errors import UserError
from finetune.model import trainable_by_role
from finetune.recall.arms import ARMS
from finetune.recall.model import new_model, read_codes
from finetune.recall.spoken.presets import SpokenPreset, Stage
from finetune.spoken import ACKNOWLEDGMENTS, NAMES, Answer, Dataset, value_tokens
from finetune.step import CapturedGradients, LossWeights, Optimizer, stream_sums
from ttt import HiddenStates, TTTLMModel
from ttt.model import depth_hidden

logger = logging.getLogger(__name__)

LOG_STEPS = 50
FRAME, REPEATED, IS_REPEATED = (
    Answer._fields.index(name) for name in ("frame", "repeated_frame", "is_repeated")
)


@dataclass
class Losses:
    """Losses of a batch, in nats, and which answers were right."""

    total: Tensor
    text: Tensor
    words: Tensor
    """Of the text but padding, without weights."""
    audio: Tensor
    answers: Tensor
    """[B, Q]."""
    right: Tensor
    """[B, Q]: the value is the likeliest of all tokens."""
    asked: Tensor
    """[B, Q]: there is a question."""
    repeats: Tensor
    """[B, Q]: Moshi repeats the fact, and the value is the likeliest token there (1) or is not (0);
    -1: it does not repeat it."""


def train_arm(
    preset: SpokenPreset,
    name: str,
    dataset: Dataset,
    *,
    seed: int,
    device: torch.device,
    base: Mapping[str, Tensor] | None,
) -> tuple[TTTLMModel, list[dict[str, Any]]]:
    """Return the trained model of an arm, and its curve.

    Args:
        base: weights of the arm `off`, which a fine-tuned arm starts from.
    """
    arm = ARMS[name]
    model = untrained(preset, name, seed=seed, device=device)
    rates = {"lr": preset.lr, "ttt_lr": arm.ttt_lr(preset)}
    if arm.is_finetuned:
        assert base is not None
        model.load_state_dict(base, strict=False)
        rates = {"lr": preset.ttt_lr / 10, "ttt_lr": preset.ttt_lr}
    # Fine-tuned arms see other batches than their base has seen.
    curve = train(
        model,
        preset,
        preset.stages(name, dataset),
        dataset.text,
        seed=seed + 500 * arm.is_finetuned,
        label=f"{name}, seed {seed}",
        **rates,
    )
    return model, curve


def untrained(preset: SpokenPreset, name: str, *, seed: int, device: torch.device) -> TTTLMModel:
    """Return the model of an arm as it is before training."""
    return new_model(
        preset.model,
        preset.streams,
        preset.ttt_args(name),
        context=preset.context(name),
        seed=seed,
        device=device,
        dtype=getattr(torch, preset.dtype),
        compile=preset.compile,
    )


def train(
    model: TTTLMModel,
    preset: SpokenPreset,
    stages: Sequence[Stage],
    text: TextEncoder,
    *,
    seed: int,
    lr: float,
    ttt_lr: float,
    label: str,
) -> list[dict[str, Any]]:
    """Train for the steps of all stages; returns what was logged.

    Raises:
        UserError: the loss is not finite.
    """
    model.train()
    num_steps = sum(stage.num_steps for stage in stages)
    optimizer = Optimizer(
        trainable_by_role(model),
        OptimArgs(lr=lr, ttt_lr=ttt_lr, pct_start=preset.pct_start),
        max_steps=num_steps,
    )
    world = World(0, 1, model.device)
    weights = text_weights(preset, text, model.device)
    curve: list[dict[str, Any]] = []

    def gradients_of(stage: Stage) -> CapturedGradients[Losses]:
        def compute(codes: Tensor, answers: Tensor) -> Losses:
            return compute_losses(model, codes, answers, preset, weights, rows=stage.audio_rows)

        return CapturedGradients(compute, optimizer)

    gradients = [gradients_of(stage) for stage in stages]
    for step, (place, rows) in enumerate(_batches(stages, seed), 1):
        codes, answers = stages[place].dialogues.batch(rows, model.device)
        losses = gradients[place](codes, answers)
        optimizer.step(max_norm=1.0, world=world, is_loss_finite=True)
        if step % LOG_STEPS == 0 or step in (1, num_steps):
            curve.append({"step": step, **_record(losses, answers)})
            logger.info(
                "%s: step %d/%d  %s",
                label,
                step,
                num_steps,
                "  ".join(
                    f"{key} {value:.3f}" for key, value in curve[-1].items() if key != "step"
                ),
            )
            if not losses.total.isfinite():
                raise UserError(f"{label}: the loss is not finite at step {step}. Lower the rates.")
    return curve


def text_weights(preset: SpokenPreset, text: TextEncoder, device: torch.device) -> Tensor:
    """Return the weight of every token of the text, [text_card]: names and values have more."""
    weights = torch.ones(preset.streams.text_card)
    words = " ".join((*ACKNOWLEDGMENTS, "Okay,")).split()
    weights[[token for word in words for token in text.tokenize(word)]] = (
        preset.acknowledgment_weight
    )
    special = [token for kind in value_tokens(text) for token in kind]
    special += [text.tokenize(name)[0] for name in NAMES]
    weights[special] = preset.emphasis
    weights[[text.text_padding_id, text.end_of_text_padding_id]] = preset.text_padding_weight
    return weights.to(device)


def schedule(num_steps: Sequence[int]) -> list[int]:
    """Return the stage of every step: the stages, of so many steps each, one after the other, until
    all have as many steps left as the shortest has; from there on in turn."""
    shortest = min(num_steps)
    alone = [[stage] * (count - shortest) for stage, count in enumerate(num_steps)]
    return [stage for stages in alone for stage in stages] + list(range(len(alone))) * shortest


def _batches(stages: Sequence[Stage], seed: int) -> Iterator[tuple[int, Tensor]]:
    """Draw the place of a stage, and rows of it, for every step; each row once before any comes
    again."""
    rows = [_rows(len(stage.dialogues), stage.batch_size, seed) for stage in stages]
    for place in schedule([stage.num_steps for stage in stages]):
        yield place, next(rows[place])


def _rows(count: int, size: int, seed: int) -> Iterator[Tensor]:
    assert count >= size, f"{count} dialogues do not fill a batch of {size}"
    random = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=random)
        yield from order[: count // size * size].view(-1, size)


def compute_losses(
    model: TTTLMModel,
    codes: Tensor,
    answers: Tensor,
    preset: SpokenPreset,
    weights: Tensor,
    *,
    rows: int,
) -> Losses:
    """Compute a batch's losses.

    Args:
        codes: [B, 17, T].
        answers: [B, Q, len(Answer)].
        weights: see `text_weights`.
        rows: the depth transformer sees so many of the dialogues alone.
    """
    delayed = read_codes(model, codes)
    hidden = model._text_hidden(delayed[:, :, :-1])
    some = HiddenStates(
        hidden[:rows], depth_hidden(model, delayed[:rows, :, 1:], hidden[:rows], model.execution)
    )
    loss_weights = LossWeights(preset.text_padding_weight, preset.first_codebook_weight)
    _, audio = stream_sums(model, some, codes[:rows], loss_weights)
    logits = model.text_linear(hidden).float()
    targets = codes[:, 0]
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    nll = nll.view_as(targets)
    weight = weights[targets]
    frames = answers[..., FRAME].clamp(min=0)
    asked = answers[..., FRAME] >= 0
    is_repeated = asked & (answers[..., IS_REPEATED] == 1)
    repeat_frames = answers[..., REPEATED].clamp(min=0)
    at_answers = nll.gather(1, frames)
    text_loss = (nll * weight).sum() / weight.sum()
    total = (
        text_loss
        + preset.audio_weight * audio.loss / audio.weight
        + preset.answer_weight * _mean(at_answers, asked)
        + preset.repeat_weight * _mean(nll.gather(1, repeat_frames), is_repeated)
    )
    is_word = weight >= 1
    words = (nll.detach() * is_word).sum() / is_word.sum()
    hits = logits.argmax(-1) == targets
    repeats = torch.where(is_repeated, hits.gather(1, repeat_frames).long(), -1)
    right = hits.gather(1, frames)
    audio_loss = audio.nll / audio.count
    return Losses(total, text_loss, words, audio_loss, at_answers.detach(), right, asked, repeats)


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


def _record(losses: Losses, answers: Tensor) -> dict[str, float]:
    is_repeated = answers[..., IS_REPEATED] == 1
    of_moshi, of_user = losses.asked & is_repeated, losses.asked & ~is_repeated
    return {
        "text": losses.text.item(),
        "audio": losses.audio.item(),
        "moshi": losses.right[of_moshi].float().mean().item(),
        "user": losses.right[of_user].float().mean().item(),
        "repeats": (losses.repeats[of_moshi] == 1).float().mean().item(),
    }
