"""Train and measure the arms of the experiment, one result file each."""

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.config import OptimArgs
from finetune.distributed import World
from finetune.errors import UserError
from finetune.model import trainable_by_role
from finetune.recall.arms import ARMS, check_arms
from finetune.recall.jobs import Job, run_jobs
from finetune.recall.measure import measure_length, measure_trained_length, nothing_written
from finetune.recall.model import answer_logits, new_model, read_codes
from finetune.recall.presets import Preset
from finetune.recall.streams import Streams, draw
from finetune.step import Optimizer
from ttt import TTTArgs, TTTLMModel, measuring

logger = logging.getLogger(__name__)

LOG_STEPS = 25
SEQUENCES_AT_ONCE = 32


def run_arm(preset: Preset, name: str, seed: int, device: torch.device) -> dict[str, Any]:
    """Train the arm `name` and measure it; everything that is known of it."""
    started_at = time.monotonic()
    args = preset.ttt_args(name)
    model, curve, base_curve = train_arm(preset, name, seed=seed, device=device)
    trained_at = time.monotonic()
    model.eval()
    update_frames = args.update_frames if args.enabled else preset.chunk_size
    where: dict[str, Any] = {"update_frames": update_frames}

    def trained_length() -> dict[str, Any]:
        return measure_trained_length(
            model,
            preset.streams,
            num_sequences=preset.num_eval,
            batch=SEQUENCES_AT_ONCE,
            **where,
        )

    result: dict[str, Any] = {
        "arm": name,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "curve": curve,
        "base_curve": base_curve,
        "trained_length": trained_length(),
    }
    if any(module.write_gates() for module in model.ttt_layers.values()):
        with nothing_written(model):
            result["nothing_written"] = trained_length()
    result["longer"] = {}
    for times, num_sequences in preset.longer(name).items():
        result["longer"][str(times)] = measure_length(
            model, preset.streams, times=times, num_sequences=num_sequences, **where
        )
        logger.info("%s, seed %d: measured at %d times the length", name, seed, times)
    result["train_sec"] = trained_at - started_at
    result["measure_sec"] = time.monotonic() - trained_at
    return result


def train_arm(
    preset: Preset, name: str, *, seed: int, device: torch.device
) -> tuple[TTTLMModel, list[dict[str, float]], list[dict[str, float]]]:
    """The trained model of an arm, its curve, and that of the model it was tuned from."""
    arm, args = ARMS[name], preset.ttt_args(name)
    options: dict[str, Any] = {
        "context": preset.context(name),
        "seed": seed,
        "device": device,
        "dtype": getattr(torch, preset.dtype),
    }
    model = new_model(preset.model, preset.streams, args, **options)
    if not arm.is_finetuned:
        label = f"{name}, seed {seed}"
        ttt_lr = arm.ttt_lr(preset)
        return model, train(model, preset, seed=seed, lr=preset.lr, ttt_lr=ttt_lr, label=label), []
    base = new_model(preset.model, preset.streams, TTTArgs(), **options)
    base_curve = train(
        base, preset, seed=seed, lr=preset.lr, label=f"base, seed {seed}", whole_text=True
    )
    model.load_state_dict(base.state_dict(), strict=False)
    curve = train(model, preset, seed=seed + 500, lr=preset.ttt_lr / 10, label=f"{name}, {seed}")
    return model, curve, base_curve


def train(
    model: TTTLMModel,
    preset: Preset,
    *,
    seed: int,
    lr: float,
    label: str,
    ttt_lr: float | None = None,
    whole_text: bool = False,
    stop_at: float = 2.0,
) -> list[dict[str, float]]:
    """Train on the answers (or on all text), until two logged accuracies in a row are `stop_at` or
    more. Returns what was logged.

    Args:
        ttt_lr: of TTT parameters; None: the preset's.

    Raises:
        UserError: the loss is not finite.
    """
    model.train()
    optimizer = Optimizer(
        trainable_by_role(model),
        OptimArgs(
            lr=lr,
            ttt_lr=preset.ttt_lr if ttt_lr is None else ttt_lr,
            pct_start=preset.pct_start,
        ),
        max_steps=preset.num_steps,
    )
    world = World(0, 1, model.device)
    curve: list[dict[str, float]] = []
    for step in range(1, preset.num_steps + 1):
        streams = draw(preset.streams, batch=preset.batch_size, seed=seed * 1_000_000 + step)
        is_logged = step % LOG_STEPS == 0 or step in (1, preset.num_steps)
        with measuring(model, enabled=is_logged) as inner:
            loss, accuracy = _losses(model, streams, preset.streams.asked_stream, whole_text)
        loss.backward()
        result = optimizer.step(max_norm=1.0, world=world, is_loss_finite=True)
        if is_logged:
            curve.append(
                {
                    "step": step,
                    "loss": loss.item(),
                    "accuracy": accuracy.item(),
                    "grad_norm": result.grad_norm,
                    **{name: value.item() for name, value in inner.items()},
                }
            )
            logger.info(
                "%s: step %d/%d  loss %.3f  accuracy %.3f%s",
                label,
                step,
                preset.num_steps,
                curve[-1]["loss"],
                curve[-1]["accuracy"],
                _effects(curve[-1]),
            )
            if not loss.isfinite():
                raise UserError(f"{label}: the loss is not finite at step {step}. Lower the rates.")
            if min(record["accuracy"] for record in curve[-2:]) >= stop_at:
                break
    return curve


def _losses(
    model: TTTLMModel, streams: Streams, asked_stream: int, whole_text: bool
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy in nats and accuracy, of the answers or of all text."""
    read = read_codes(model, streams.codes.to(model.device))
    if whole_text:
        logits = model.forward_text(read[:, :, :-1])[1][:, 0]
        expected = read[:, 0, 1:]
    else:
        frames = streams.answers.to(model.device)
        logits = answer_logits(model, read, frames, asked_stream)
        expected = streams.codes.to(model.device)[:, asked_stream].gather(1, frames)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), expected.flatten())
    return loss, (logits.argmax(-1) == expected).float().mean()


def _effects(record: dict[str, float]) -> str:
    effects = [f"{v:.2g}" for k, v in record.items() if k.endswith("/effect")]
    return f"  effect {' '.join(effects)}" if effects else ""


def run(
    preset: Preset,
    out: Path,
    *,
    arms: Sequence[str],
    seeds: Sequence[int],
    device: torch.device,
    workers: int = 1,
) -> list[dict[str, Any]]:
    """Run the arms that have no result in `out` yet; all results, by seed and then arm.

    Raises:
        UserError: an unknown arm, streams that cannot be, or see `run_jobs`.
    """
    check_arms(arms)
    problems = preset.streams.problems()
    if problems:
        raise UserError("these streams cannot be made: " + "; ".join(problems) + ".")
    jobs = [
        Job(
            f"{name}_seed{seed}",
            _describe(preset, name, device),
            run_arm,
            (preset, name, seed, device),
        )
        for seed in seeds
        for name in arms
    ]
    return run_jobs(jobs, out, workers=workers)


def _describe(preset: Preset, name: str, device: torch.device) -> dict[str, Any]:
    """Return all that an arm's result depends on, but the seed."""
    config = dataclasses.asdict(preset)
    del config["arms"]
    config["lengths"] = preset.longer(name)
    config["ttt"] = dataclasses.asdict(preset.ttt_args(name))
    del config["mixer_lr"]
    config["ttt_lr"] = ARMS[name].ttt_lr(preset)
    config["device"] = device.type
    return config
