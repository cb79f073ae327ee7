"""Whether the weights that are loaded are those that a run has written: the checksums of their
checkpoint say so, before a result is made of others."""

import logging
from collections.abc import Iterator
from pathlib import Path

from finetune.checkpoint import manifest
from finetune.config import ModelPaths
from finetune.distributed import World
from finetune.errors import UserError
from finetune.kept import is_stock
from finetune.model import open_earlier_run

logger = logging.getLogger(__name__)

_WEIGHTS = "consolidated"
_CONFIGURATION = "args.yaml"


def require_sound(checkpoint: Path) -> None:
    """Compare a checkpoint's weights and configuration with its list of files. What training alone
    continues from is not read, and may be missing.

    Each byte is read once; loading finds the file in memory afterwards.

    Raises:
        UserError: one of them is missing or damaged.
    """
    if not (checkpoint / manifest.NAME).is_file():
        logger.warning(
            "%s has no %s: whether its files are damaged is not known", checkpoint, manifest.NAME
        )
        return
    problem = manifest.first_problem(checkpoint, chosen=lambda names: filter(_is_loaded, names))
    if problem is not None:
        raise UserError(f"{problem}: copy it again, or use another one.")


def require_sound_start(paths: ModelPaths, world: World) -> list[Path]:
    """Do the same with all checkpoints that a run's weights are read from, on the first of its
    processes; return them.

    Raises:
        UserError: one is damaged, or is none; on all processes.
    """

    def compare() -> list[Path]:
        found = list(_checkpoints_below(paths))
        for checkpoint in found:
            require_sound(checkpoint)
        return found

    return world.done_by_first(compare)


def _is_loaded(name: str) -> bool:
    return name == _CONFIGURATION or name.startswith(f"{_WEIGHTS}/")


def _checkpoints_below(paths: ModelPaths) -> Iterator[Path]:
    """Yield the earlier runs' checkpoints, the last one's first, as far down as weights are read
    from them; exported models have no list of their files."""
    while paths.init_from:
        earlier = open_earlier_run(paths)
        if not is_stock(earlier.checkpoint):
            yield earlier.checkpoint
        if earlier.base_weights is not None:
            return
        paths = earlier.args.moshi_paths
    if not paths.random_init and (paths.moshi_path or paths.hf_repo_id):
        file = Path(paths.moshi_path or f"{paths.hf_repo_id}/config.json").resolve()
        if file.parent.name == _WEIGHTS and (file.parents[1] / _CONFIGURATION).is_file():
            yield file.parents[1]
