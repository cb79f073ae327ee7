"""LoRA adapters, and a checkpoint's folder of weights, are often named as a base, and are none."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moshi.models import loaders

from finetune.errors import UserError

ADAPTERS = "lora.safetensors"
ALL_WEIGHTS = "consolidated.safetensors"


def no_base(what: str, adapters: Path | None = None) -> UserError:
    """Return the error that LoRA adapters were named as a model.

    Args:
        what: what they are, and which key named them: a clause.
        adapters: their folder; None: it is not known.
    """
    start = "their folder" if adapters is None else str(adapters)
    if adapters is not None and (adapters.parent / "args.yaml").is_file():
        start = str(adapters.parent)  # of a run of this project: the whole checkpoint
    return UserError(
        f"{what}, which are no model without the one that they were trained on. To train them "
        f"further, name that one as moshi_paths.hf_repo_id, and {start} as moshi_paths.init_from, "
        "which takes their TTT as well. For all else name the checkpoint of their run, or have "
        "them merged: `moshi-ttt export --form merged`, or save_adapters: false."
    )


def require_base(folder: Path, config: Mapping[str, Any]) -> None:
    """Check that a folder is a model's, and not the one in which a checkpoint has its weights.

    Args:
        config: its config.json.

    Raises:
        UserError: it is that one; the message says what to name in its place.
    """
    name = config.get("moshi_name", loaders.MOSHI_NAME)
    has_weights = isinstance(name, str) and (folder / name).is_file()
    if has_weights and not config.get("lora"):
        return
    if (folder / ADAPTERS).is_file():
        raise no_base(f"moshi_paths.hf_repo_id: {folder} holds LoRA adapters alone", folder)
    if (folder / ALL_WEIGHTS).is_file():
        raise UserError(
            f"moshi_paths.hf_repo_id: the config.json of {folder} is not about the weights in it, "
            f"as in checkpoints of moshi-finetune. Name as moshi_paths.hf_repo_id the model that "
            f"they were trained from, and {folder / ALL_WEIGHTS} as moshi_paths.moshi_path."
        )
