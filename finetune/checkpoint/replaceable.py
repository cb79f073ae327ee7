"""Whether a new run may take the place of what a folder holds."""

from collections.abc import Iterator
from pathlib import Path

from finetune.checkpoint.run_record import NAME as RECORD_NAME
from finetune.checkpoint.run_record import RunRecord
from finetune.config import TrainArgs, parse_sources
from finetune.errors import UserError
from finetune.kept import CHECKPOINT_NAME
from finetune.monitoring import KINDS, metrics_path
from finetune.plan import SUMMARY

_METRICS = (metrics_path(Path(), kind).name for kind in KINDS)
OWN_FILES = ("args.yaml", "log.train.txt", "wandb_run_id", SUMMARY, *_METRICS)
"""What a run writes beside its checkpoints."""


def require_replaceable(record: RunRecord, args: TrainArgs, config: Path | None) -> None:
    """Check that a new run may take the place of what a folder holds.

    Args:
        record: of the folder that is to be replaced.
        config: the file of the configuration, where there is one.

    Raises:
        UserError: overwriting would delete, or mix with, what is no earlier run's.
    """
    run_dir, where = record.run_dir, record.run_dir.resolve()
    if run_dir.is_symlink():
        raise UserError(
            f"run_dir: {run_dir} is a symbolic link to {where}, and nothing is overwritten "
            f"through a link. Name that folder itself."
        )
    if not record.exists():
        raise UserError(
            f"run_dir: {run_dir} holds files, but no record of a run ({RECORD_NAME}): it is no "
            f"run folder, so it is not deleted. Choose another folder, or empty it yourself."
        )
    here = Path.cwd().resolve()
    if where == here or where in here.parents:
        raise UserError(
            f"run_dir: {run_dir} is the folder that this was started in, or holds it, so it is "
            f"not overwritten. Start from elsewhere, or choose another folder."
        )
    for key, path in _inputs(args, config):
        if where in (path.resolve(), *path.resolve().parents, *path.absolute().parents):
            raise UserError(
                f"run_dir, {key}: {path} is inside {run_dir}, which would be overwritten. "
                f"Choose another run_dir, or move that out of it."
            )
    for name in record.found().foreign:
        if _is_in_the_way(name):
            raise UserError(
                f"run_dir: {run_dir / name} was not written by the run in {run_dir}, so it is "
                f"not deleted, and the new run would write there. Move it away."
            )


def _inputs(args: TrainArgs, config: Path | None) -> Iterator[tuple[str, Path]]:
    """Yield what the run reads, by the key that names it."""
    if config is not None:
        yield "config", config
    for key, spec in (
        ("data.train_data", args.data.train_data),
        ("data.eval_data", args.data.eval_data if args.do_eval else ""),
    ):
        for path, _ in parse_sources(spec, key) if spec else []:
            yield key, path
    if args.data.cache_dir:
        yield "data.cache_dir", Path(args.data.cache_dir)
    for key, value in vars(args.moshi_paths).items():
        if isinstance(value, str) and Path(value).exists():
            yield f"moshi_paths.{key}", Path(value)


def _is_in_the_way(name: str) -> bool:
    """Return whether a run would write to, or read, what somebody else has put there."""
    first, *rest = name.split("/")
    if first == "checkpoints":
        # A link in place of the folder, or what would count as a checkpoint.
        return (
            not rest or CHECKPOINT_NAME.fullmatch(rest[0].removesuffix(".incomplete")) is not None
        )
    return first in OWN_FILES or name in ("tb", "profile", "wandb")
