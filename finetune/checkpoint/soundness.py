"""Whether the weights that are loaded are those that were written, and lie on those that they were
trained on: the checksums of their checkpoint, or of the exported model, and the fingerprint of its
frozen weights say so, before a result is made of others."""

import logging
from collections.abc import Iterator
from pathlib import Path

from finetune.checkpoint import manifest
from finetune.checkpoint.resume_file import frozen_fingerprint_of
from finetune.config import ModelPaths, load_run_config
from finetune.distributed import World
from finetune.errors import UserError
from finetune.kept import is_stock
from finetune.model import (
    ALL_WEIGHTS,
    find_recorded,
    frozen_fingerprint,
    open_earlier_run,
    plan_model,
)

logger = logging.getLogger(__name__)

_WEIGHTS = "consolidated"
_CONFIGURATION = "args.yaml"
_EDITED = (".json", ".md")
"""Suffixes of files of an exported model that its owner may complete."""


def seal(folder: Path) -> None:
    """Write the list of the files of an exported model that nobody is to edit."""
    files = [file for file in folder.iterdir() if file.suffix not in _EDITED]
    manifest.write(folder, manifest.describe(folder, files))


def require_sound(checkpoint: Path) -> None:
    """Compare the weights and the configuration of a checkpoint, or of an exported model, with its
    list of files. What training alone continues from is not read, and may be missing.

    Each byte is read once; loading finds the file in memory afterwards.

    Raises:
        UserError: one of them is missing or damaged.
    """
    is_of_run = not is_stock(checkpoint)
    if not (checkpoint / manifest.NAME).is_file():
        if is_of_run:
            logger.warning(
                "%s has no %s: whether its files are damaged is not known",
                checkpoint,
                manifest.NAME,
            )
        return
    if not is_of_run and not manifest.is_own(checkpoint):
        logger.warning(
            "%s is no list of files as exported models have it: whether they are damaged is not "
            "known",
            checkpoint / manifest.NAME,
        )
        return
    problem = problem_of_weights(checkpoint) if is_of_run else manifest.first_problem(checkpoint)
    if problem is not None:
        raise UserError(f"{problem}: copy it again, or use another one.")


def require_own_base(checkpoint: Path) -> None:
    """Compare the frozen weights that a run's checkpoint would be loaded with, with those that it
    was trained on, as far as it says which they were.

    Raises:
        UserError: they were replaced, or are not there.
    """
    trained_on, file = frozen_fingerprint_of(checkpoint), checkpoint / _CONFIGURATION
    if trained_on is None or (checkpoint / _WEIGHTS / ALL_WEIGHTS).is_file():
        return
    args = load_run_config(file)
    info = find_recorded(file, args.moshi_paths)
    if frozen_fingerprint(plan_model(args, info), args, info) != trained_on:
        raise UserError(
            f"{checkpoint} was trained on other frozen weights than these: the files that "
            f"moshi_paths names in {file} were replaced. Put back those that it was trained on."
        )


def problem_of_weights(checkpoint: Path) -> str | None:
    """Return what is wrong with what is loaded of a run's checkpoint where nothing is resumed."""
    return manifest.first_problem(checkpoint, chosen=lambda names: filter(_is_loaded, names))


def require_sound_start(paths: ModelPaths, world: World) -> list[Path]:
    """Do both with all checkpoints and exported models that a run's weights are read from, on the
    first of its processes; return them.

    Raises:
        UserError: one is damaged, or is none, or lies on other weights; on all processes.
    """

    def compare() -> list[Path]:
        found = list(_checkpoints_below(paths))
        for checkpoint in found:
            require_sound(checkpoint)
        for checkpoint in found:
            if not is_stock(checkpoint):
                require_own_base(checkpoint)
        return found

    return world.done_by_first(compare)


def _is_loaded(name: str) -> bool:
    return name == _CONFIGURATION or name.startswith(f"{_WEIGHTS}/")


def _checkpoints_below(paths: ModelPaths) -> Iterator[Path]:
    """Yield the earlier runs' checkpoints, the last one's first, as far down as weights are read
    from them, and the folder of the base, if something here has written it."""
    while paths.init_from:
        earlier = open_earlier_run(paths)
        yield earlier.checkpoint
        if earlier.base_weights is not None:
            return
        paths = earlier.args.moshi_paths
    if not paths.random_init and (paths.moshi_path or paths.hf_repo_id):
        folder = Path(paths.moshi_path or f"{paths.hf_repo_id}/config.json").resolve().parent
        if folder.name == _WEIGHTS and (folder.parent / _CONFIGURATION).is_file():
            yield folder.parent
        elif is_stock(folder):
            yield folder
