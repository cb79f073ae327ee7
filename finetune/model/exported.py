"""The folder of a model as `moshi-ttt export` writes it: weights of a stock Moshi, or adapters for
one, and `ttt.safetensors` beside them."""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from moshi.models import loaders
from safetensors import SafetensorError, safe_open

from finetune.config import DataArgs, LoraArgs, ModelPaths, TrainArgs
from finetune.errors import UserError
from finetune.model.adapters import ADAPTERS, require_base
from finetune.safety import stays_inside
from ttt import TTTArgs
from ttt.registry import METHODS

TTT_FILE = "ttt.safetensors"


def exported_args(folder: Path, config: Mapping[str, Any], paths: ModelPaths) -> TrainArgs:
    """Return a configuration that would have made an exported model.

    Args:
        config: its config.json.
        paths: where the base of adapters is; all weights are in the folder itself.

    Raises:
        UserError: the folder lacks a file that its config.json speaks of, or one is damaged.
    """
    lora = LoraArgs()
    if config.get("lora"):
        try:
            lora = LoraArgs(
                enable=True, rank=int(config["lora_rank"]), scaling=float(config["lora_scaling"])
            )
            with safe_open(folder / ADAPTERS, "pt") as file:
                lora.ft_embed = any(".lora_" not in key for key in file.keys())  # noqa: SIM118
        except (
            OSError,
            SafetensorError,
            LookupError,
            TypeError,
            ValueError,
            OverflowError,
        ) as error:
            if not (folder / ADAPTERS).is_file():
                require_base(folder, config)
            raise UserError(
                f"moshi_paths.init_from: the config.json of {folder} speaks of adapters (lora: "
                f"true), and they cannot be read: {error}. Copy or export the folder again."
            ) from error
    return TrainArgs(
        data=DataArgs(),
        run_dir="",
        lora=lora,
        ttt=exported_ttt_args(folder / TTT_FILE),
        moshi_paths=replace(paths, init_from=None, random_init=False),
    )


def exported_weights(folder: Path, config: Mapping[str, Any]) -> Path | None:
    """Return the file with all weights of an exported model; None: it has adapters alone.

    Raises:
        UserError: there is no such file.
    """
    if config.get("lora"):
        return None
    name = config.get("moshi_name", loaders.MOSHI_NAME)
    if not (isinstance(name, str) and stays_inside(name) and (folder / name).is_file()):
        raise UserError(
            f"moshi_paths.init_from: the config.json of {folder} names {name!r} as the file of its "
            "weights (moshi_name), and there is none of that name. Copy or export the folder again."
        )
    return folder / name


def unused_ttt(paths: ModelPaths) -> Path | None:
    """Return the TTT that lies beside the weights of a base, and that a run which starts from them
    does not take; None: there is none."""
    if paths.init_from or paths.random_init:
        return None
    folder = Path(paths.moshi_path).parent if paths.moshi_path else Path(paths.hf_repo_id or "")
    file = folder / TTT_FILE
    return file if file.is_file() else None


def exported_ttt_args(path: Path) -> TTTArgs:
    """Return the TTT that stands beside stock weights; without a file, none.

    Raises:
        UserError: the file is damaged, or of a later version.
    """
    if not path.is_file():
        return TTTArgs()
    try:
        with safe_open(path, "pt") as file:
            args = TTTArgs(**json.loads(file.metadata()["ttt_args"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not say how TTT is made here: {error}") from None
    if str(args.method) not in METHODS:
        raise UserError(
            f"{path} holds TTT of the method {args.method!r}, which is not in ttt/registry.py here "
            f"(only {', '.join(METHODS)}). Use the version of this program that it was trained "
            "with, or add the method."
        )
    # The file has all options, at the defaults of its time; these say nothing of this method.
    unread: dict[str, Any] = {
        field.name: field.default for field in fields(args) if not args.reads(field.name)
    }
    args = replace(args, **unread)
    if problems := args.problems():
        raise UserError(f"{path}: ttt.{problems[0][0]}: {problems[0][1]}")
    return args
