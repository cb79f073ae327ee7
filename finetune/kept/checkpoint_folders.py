"""Checkpoints are known by what lies in their folders; nothing is opened to tell."""

from pathlib import Path

from finetune.errors import UserError
from finetune.kept.checkpoint_names import DIVERGED, checkpoints_in
from finetune.safety import start_of


def is_stock(checkpoint: Path) -> bool:
    """Return whether a folder is of a stock Moshi, laid out as on Hugging Face."""
    has_weights = any(checkpoint.glob("*.safetensors"))
    is_part = checkpoint.name == "consolidated" and (checkpoint.parent / "args.yaml").is_file()
    return has_weights and not is_part and not (checkpoint / "consolidated").is_dir()


def require_checkpoint(checkpoint: Path, key: str) -> None:
    """Check that a folder is a checkpoint of a run that has not diverged.

    Args:
        key: what has named it, for messages.

    Raises:
        UserError: it is none; where it is a level too high or too low, the right one is named.
    """
    if (checkpoint / "consolidated").is_dir():
        _require_not_diverged(checkpoint, key)
        if (checkpoint / "args.yaml").is_file():
            return
        weights = checkpoint / "consolidated"
        way = (
            f"a run starts from its adapters with moshi_paths.init_from: {weights}"
            if (weights / "lora.safetensors").is_file()
            else f"a run starts from its weights with moshi_paths.moshi_path: "
            f"{weights / 'consolidated.safetensors'}"
        )
        raise UserError(
            f"{key}: {checkpoint} has no args.yaml, as checkpoints of this project have. If it is "
            f"moshi-finetune's, which have none, {way}."
        )
    inside = [*checkpoints_in(checkpoint / "checkpoints"), *checkpoints_in(checkpoint)]
    above = next((p for p in checkpoint.absolute().parents if (p / "consolidated").is_dir()), None)
    if above is None and not checkpoint.exists():
        hint = _for_a_repository(checkpoint) or start_of(checkpoint, key)
        raise UserError(f"{key}: there is no folder {checkpoint}; correct the path.{hint}")
    if checkpoint.is_dir() and inside:
        hint = f" Did you mean {inside[-1]}?"
    elif above is not None:
        hint = f" It is inside a checkpoint: did you mean {above}?"
    elif checkpoint.is_dir() and (checkpoint / "lora.safetensors").is_file():
        hint = (
            " It holds the weights of a checkpoint alone: its folder `consolidated`, or a copy of "
            "that. The folder that it was in is needed, with its args.yaml."
        )
    else:
        hint = ""
    raise UserError(
        f"{key}: {checkpoint} is no checkpoint (it has no folder `consolidated`).{hint}"
    )


def require_part(file: Path) -> None:
    """Check that a checkpoint has one of its files.

    Raises:
        UserError: it has not.
    """
    if not file.is_file():
        raise UserError(
            f"{file} is missing, so the checkpoint is damaged: copy it again, or use another one."
        )


def _require_not_diverged(checkpoint: Path, key: str) -> None:
    if not checkpoint.absolute().name.endswith(DIVERGED):
        return
    earlier = checkpoints_in(checkpoint.absolute().parent)
    other = f"name an earlier one, {earlier[-1]}, or" if earlier else "there is no earlier one;"
    raise UserError(
        f"{key}: {checkpoint} is of a run that has diverged at its end, and nothing goes on from "
        f"it: {other} train again with a lower optim.lr or optim.ttt_lr. To look at it all the "
        f"same, name a copy without {DIVERGED} in its name, outside that run's folder."
    )


def _for_a_repository(checkpoint: Path) -> str:
    is_repository = len(checkpoint.parts) == 2 and not checkpoint.parent.exists()
    if is_repository or checkpoint.parts[:1] == ("hf:",):
        return (
            " A repository of Hugging Face is not read from here: download it "
            "(hf download OWNER/NAME --local-dir FOLDER) and name the folder."
        )
    return ""
