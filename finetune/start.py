"""The weights that a run starts from: Moshi's, or those of an earlier run.

An earlier run has them in up to three parts: the base (its own, if all weights trained or LoRA was
merged; else the one that it started from), LoRA adapters, and TTT's parameters.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from finetune.args import TrainArgs
from finetune.config import Problem, list_problems, load_config
from finetune.errors import UserError
from ttt import TTTLMModel, ttt_parameters

# What TTT's trained parameters do not depend on; all other options say what they mean.
_TTT_MAY_CHANGE = {
    "enabled",
    "chunk_size",
    "learning_rate",
    "write_strength",
    "state_decay",
    "max_delta_norm",
    "base_lr",
    "gate_init",
    "scan_checkpoint_group_size",
    "attention_context",
}


def load_weights(model: TTTLMModel, path: Path, device: torch.device | str) -> None:
    """Load stock weights into a model on `meta`; TTT's own parameters get their start values.

    Raises:
        UserError: the file cannot be read, or does not fit.
    """
    dtype = model.text_emb.weight.dtype
    try:
        weights = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise UserError(f"moshi_paths.moshi_path: cannot read {path}: {error}") from error
    weights = {key: w.to(dtype) if w.is_floating_point() else w for key, w in weights.items()}
    expected = model.state_dict()
    own = ttt_parameters(model)
    wrong = {
        "missing": [key for key in expected if key not in weights and key not in own],
        "unknown": [key for key in weights if key not in expected],
        "of another shape": [
            key for key in weights if key in expected and weights[key].shape != expected[key].shape
        ],
    }
    if any(wrong.values()):
        found = [
            f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in wrong.items() if keys
        ]
        raise UserError(
            f"moshi_paths.moshi_path: {path} does not fit the model that its config.json (or "
            f"moshi_paths.config_path) describes. Of its weights are {', '.join(found)}."
        )
    model.load_state_dict(weights, strict=False, assign=True)
    for module in model.ttt_layers.values():
        for name, parameter in module.ttt_parameters().items():
            owner, _, leaf = name.rpartition(".")
            start = nn.Parameter(torch.empty_like(parameter, device=device))
            setattr(module.get_submodule(owner), leaf, start)
        module.reset_parameters()


@dataclass(frozen=True)
class EarlierRun:
    """A checkpoint to start from, with the configuration that made it and its config.json."""

    checkpoint: Path
    args: TrainArgs
    config: dict[str, Any]

    @property
    def base_weights(self) -> Path | None:
        """The file with all weights, if this run has written one."""
        file = self.checkpoint / "consolidated" / "consolidated.safetensors"
        return file if file.is_file() else None


def open_earlier_run(init_from: str) -> EarlierRun:
    """
    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    checkpoint = Path(init_from)
    require_checkpoint(checkpoint, "moshi_paths.init_from")
    file = checkpoint / "consolidated" / "config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"moshi_paths.init_from: cannot read {file}: {error}") from error
    return EarlierRun(checkpoint, load_config(checkpoint / "args.yaml"), config)


def require_checkpoint(checkpoint: Path, key: str) -> None:
    """
    Raises:
        UserError: it is none; if it is a run's folder, its latest checkpoint is suggested.
    """
    if not (checkpoint / "consolidated").is_dir():
        inside = sorted(str(path) for path in checkpoint.glob("checkpoints/checkpoint_*"))
        hint = f" Did you mean {inside[-1]}?" if inside else ""
        raise UserError(
            f"{key}: {checkpoint} is no checkpoint (it has no folder `consolidated`).{hint}"
        )


def require_fit(
    earlier: EarlierRun, args: TrainArgs, shape: Mapping[str, Any], earlier_shape: Mapping[str, Any]
) -> None:
    """
    Args:
        shape, earlier_shape: what `LMModel` takes for this run, and for the earlier one.

    Raises:
        UserError: this run's configuration cannot go on from the earlier one's weights.
    """
    problems = [
        f"{keys}: {text}" for keys, text in misfits(args, shape, earlier.args, earlier_shape)
    ]
    if problems:
        what = f"starting from {earlier.checkpoint} (moshi_paths.init_from)"
        raise UserError(list_problems(what, problems))


def misfits(
    args: TrainArgs,
    shape: Mapping[str, Any],
    earlier: TrainArgs,
    earlier_shape: Mapping[str, Any],
) -> Iterator[Problem]:
    """Why weights that `earlier` trained cannot be the start of `args`, key by key."""
    for key in sorted(shape.keys() | earlier_shape.keys()):
        there, here = earlier_shape.get(key), shape.get(key)
        if key != "context" and there != here:
            owner = (
                f"model.{key}" if hasattr(args.model, key) else f"moshi_paths.config_path, {key}"
            )
            yield owner, f"is {there} in the earlier run, and {here} here; they must be equal"
    if earlier.ttt.enabled and args.ttt.enabled:
        for field in dataclasses.fields(args.ttt):
            there, here = (getattr(each.ttt, field.name) for each in (earlier, args))
            if field.name not in _TTT_MAY_CHANGE and there != here:
                yield (
                    f"ttt.{field.name}",
                    f"is {there} in the earlier run, and {here} here: its TTT parameters mean "
                    f"something else; set it to {there}",
                )
    if earlier.lora.enable and earlier.save_adapters:
        there, here = ((a.lora.enable, a.lora.rank, a.lora.scaling) for a in (earlier, args))
        if there != here:
            yield (
                "lora.enable, lora.rank, lora.scaling",
                f"the earlier run's adapters have rank {there[1]} and scaling {there[2]:g}, and "
                "this run has "
                + (f"rank {here[1]} and scaling {here[2]:g}" if here[0] else "no LoRA")
                + "; set the same, or have the earlier run merge them (save_adapters: false)",
            )


@torch.no_grad()
def load_adapters_and_ttt(model: TTTLMModel, args: TrainArgs, earlier: EarlierRun) -> None:
    """Put the earlier run's LoRA and TTT, as far as it has them, into a model with its base.

    Raises:
        UserError: a file is missing or damaged.
    """
    needed: dict[str, set[str]] = {}
    if earlier.args.lora.enable and earlier.args.save_adapters:
        lora = (name for name in model.state_dict() if ".lora_" in name)
        needed["lora.safetensors"] = set(lora)
    if earlier.args.ttt.enabled and args.ttt.enabled:
        needed["ttt.safetensors"] = set(ttt_parameters(model))
    expected = model.state_dict()
    for name, keys in needed.items():
        path = earlier.checkpoint / "consolidated" / name
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"moshi_paths.init_from: cannot read {path}: {error}") from error
        wrong = sorted(keys - weights.keys()) + [
            key
            for key, weight in weights.items()
            if key not in expected or weight.shape != expected[key].shape
        ]
        if wrong:
            raise UserError(
                f"moshi_paths.init_from: {path} does not fit this model, though their "
                f"configurations agree: see {wrong[0]}. Was the file replaced?"
            )
        model.load_state_dict(weights, strict=False)


def describe_start(args: TrainArgs, earlier: EarlierRun) -> str:
    """A line for the log: where the weights come from, and what becomes of TTT."""
    ttt = {
        (True, True): "; its TTT goes on",
        (False, True): "; TTT is added, untrained",
        (True, False): "; its TTT is left out (ttt.enabled: false)",
        (False, False): "",
    }[earlier.args.ttt.enabled, args.ttt.enabled]
    return f"starting from the weights of {earlier.checkpoint}{ttt}"
