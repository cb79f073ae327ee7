"""Train and measure the arms of the spoken experiment, one result file each."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from finetune.errors import UserError
from finetune.kept import write_whole
from finetune.recall.arms import ARMS, check_arms
from finetune.recall.jobs import Job, kept_results, refuse_others, run_jobs
from finetune.recall.measure import nothing_written
from finetune.recall.spoken import measure
from finetune.recall.spoken.presets import SpokenPreset
from finetune.recall.spoken.training import train_arm, untrained
from finetune.spoken import DATA_VERSION, Dataset, build_dataset
from ttt import TTTLMModel

BASE = "off"
"""The arm that fine-tuned arms start from."""

logger = logging.getLogger(__name__)


def run_arm(
    preset: SpokenPreset, name: str, seed: int, device: torch.device, out: Path, data: Path
) -> dict[str, Any]:
    """Train the arm `name` and measure it; everything that is known of it.

    Beside the result there will be its weights, and what it said. Weights that lie there already,
    as measuring was interrupted, are measured as they are.
    """
    dataset = Dataset(data, preset.data)
    text = dataset.text
    model, curve, train_sec = _trained(preset, name, seed, device, out, dataset)
    trained_at = time.monotonic()
    model.eval()
    held_out = dataset.load("eval")
    result: dict[str, Any] = {
        "arm": name,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "curve": curve,
        "queue": measure.queue_accuracy(held_out),
        "trained_length": measure.trained_length(model, held_out, text, preset),
    }
    if any(module.write_gates() for module in model.ttt_layers.values()):
        with nothing_written(model):
            result["nothing_written"] = measure.trained_length(model, held_out, text, preset)
    if model.ttt_layers:
        for key, other in (("reset", False), ("another_past", True)):
            result[key] = measure.without_the_past(model, held_out, preset, other=other)
    if preset.num_free and not ARMS[name].is_full_attention:
        result["free"], said = measure.free(model, held_out, text, preset.num_free)
        path = out / f"{name}_seed{seed}.said.safetensors"
        write_whole(path, save({"said": said.to(torch.int16)}))
    result["longer"] = {}
    for times in preset.longer(name):
        result["longer"][str(times)] = measure.longer(model, dataset.load(f"x{times}"))
        logger.info("%s, seed %d: measured at %d times the length", name, seed, times)
    result["train_sec"] = train_sec
    result["measure_sec"] = time.monotonic() - trained_at
    return result


def _trained(
    preset: SpokenPreset, name: str, seed: int, device: torch.device, out: Path, dataset: Dataset
) -> tuple[TTTLMModel, list[dict[str, Any]], float]:
    """Return the trained model, its curve, and the seconds that training took."""
    started_at = time.monotonic()
    path = _weights(out, name, seed)
    described = _describe(preset, name, device)
    if path.is_file():
        with safe_open(path, "pt") as kept:
            metadata = kept.metadata() or {}
        if "config" not in metadata:
            raise UserError(f"{path} is not a result of this program; move it away.")
        refuse_others(path, json.loads(metadata["config"]), described)
        logger.info("%s, seed %d: its weights are in %s already", name, seed, path)
        model = untrained(preset, name, seed=seed, device=device)
        model.load_state_dict(load_file(path))
        return model, json.loads(metadata["curve"]), float(metadata["train_sec"])
    base = _base_weights(out, seed) if ARMS[name].is_finetuned else None
    model, curve = train_arm(preset, name, dataset, seed=seed, device=device, base=base)
    weights = {key: value.contiguous().cpu() for key, value in model.state_dict().items()}
    train_sec = time.monotonic() - started_at
    metadata = {
        "config": json.dumps(described),
        "curve": json.dumps(curve),
        "train_sec": str(train_sec),
    }
    write_whole(path, save(weights, metadata))
    return model, curve, train_sec


def _weights(out: Path, name: str, seed: int) -> Path:
    return out / f"{name}_seed{seed}.model.safetensors"


def _base_weights(out: Path, seed: int) -> dict[str, Tensor]:
    path = _weights(out, BASE, seed)
    if not path.is_file():
        raise UserError(
            f"{path} is gone, which fine-tuned arms start from: delete {BASE}_seed{seed}.json "
            "beside it, and it is trained again."
        )
    return load_file(path)


def run(
    preset: SpokenPreset,
    out: Path,
    *,
    arms: Sequence[str],
    seeds: Sequence[int],
    device: torch.device,
    workers: int,
    data_workers: int,
) -> list[dict[str, Any]]:
    """Results of all arms and seeds; those that are in `out` already are not run again.

    Raises:
        UserError: an unknown arm, dialogues that cannot be, or see `run_jobs`.
    """
    check_arms(arms)
    data = out.parent / "data"
    tuned = [name for name in arms if ARMS[name].is_finetuned]
    first = [name for name in arms if name not in tuned]
    if tuned and BASE not in first:
        first.insert(0, BASE)
    stages = [
        [
            Job(
                f"{name}_seed{seed}",
                _describe(preset, name, device),
                run_arm,
                (preset, name, seed, device, out, data),
            )
            for seed in seeds
            for name in stage
        ]
        for stage in (first, tuned)
    ]
    # Before the data of what is there are replaced by others.
    kept_results([job for jobs in stages for job in jobs], out)
    build_dataset(data, preset.data, device, workers=data_workers)
    results: dict[str, dict[str, Any]] = {}
    for jobs in stages:
        found = run_jobs(jobs, out, workers=workers)
        results |= {job.name: result for job, result in zip(jobs, found, strict=True)}
    return [results[f"{name}_seed{seed}"] for seed in seeds for name in arms]


def _describe(preset: SpokenPreset, name: str, device: torch.device) -> dict[str, Any]:
    """Return all that an arm's result depends on, but the seed."""
    config = dataclasses.asdict(preset)
    del config["arms"]
    config["ttt"] = dataclasses.asdict(preset.ttt_args(name))
    del config["mixer_lr"]
    config["ttt_lr"] = ARMS[name].ttt_lr(preset)
    config["device"] = device.type
    config["data_version"] = DATA_VERSION
    return config
