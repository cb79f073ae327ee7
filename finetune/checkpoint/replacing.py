"""A new run in the place of an older one, such that at every moment one of them is whole.

The older run is moved into a folder inside the run folder, file by file of its record; what nobody
of us wrote stays where it is. There it waits until the new run has earned its place by a complete
checkpoint, or by coming to its end. If the new run ends before, or is killed, the older one is put
back: at once, or by the next start.

What is going on stands in the record at the top, which changes in one step:

    the older run's, "aside"      it is being moved away, or back: whatever lies aside belongs back
    the new run's, "replaces"     the older run lies aside as a whole, with its own record
    the new run's, "earned"       what lies aside is being deleted
"""

import logging
import os
import shutil
from pathlib import Path, PurePosixPath

from finetune.checkpoint import manifest
from finetune.checkpoint.run_dir import list_checkpoints
from finetune.checkpoint.run_record import (
    NAME,
    Content,
    Found,
    RunRecord,
    delete_units,
    fsync,
    remove_empty,
)
from finetune.errors import counted
from finetune.kept import step_of

logger = logging.getLogger(__name__)

_ASIDE = ".replaced"


def set_aside(run_dir: Path, found: Found) -> None:
    """Move an older run away and begin the record of the new one.

    Args:
        found: the older run's files, by `RunRecord.found`.

    Raises:
        OSError: something cannot be moved; `settle` undoes what was done.
    """
    logger.info(
        "replaces the run in %s (%s), which is deleted once this one has a checkpoint or has ended",
        run_dir,
        _described(run_dir),
    )
    record = RunRecord(run_dir)
    aside = _free_name(run_dir)
    record.note(aside=aside)
    os.mkdir(run_dir / aside)
    for unit in found.units:
        target = run_dir / aside / unit
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(run_dir / unit, target)
        remove_empty(run_dir, PurePosixPath(unit).parent)
    shutil.copyfile(record.path, run_dir / aside / NAME)
    for path in (run_dir / aside / NAME, run_dir / aside, run_dir):
        fsync(path)
    record.create(replaces=aside)


def settle(run_dir: Path) -> None:
    """End what a start has left half done: the older run is put back, or, where the new one has
    earned its place, deleted. Does nothing where there is nothing to do."""
    record = RunRecord(run_dir)
    record.remove_half_made()
    content = record.read()
    if content.aside is not None:
        _move_back(run_dir, content.aside)
    elif content.replaces is not None:
        if content.earned or _has_checkpoint(run_dir, content):
            delete_replaced(run_dir)
        else:
            _put_back(run_dir, content.replaces)


def delete_replaced(run_dir: Path) -> None:
    """Delete the older run: the new one has earned its place."""
    record = RunRecord(run_dir)
    aside = record.read().replaces
    if aside is None:
        return
    record.note(earned=True)
    if (run_dir / aside).is_dir():
        older = RunRecord(run_dir / aside)
        if older.exists():
            found = older.found()
            delete_units(run_dir / aside, found.units)
            if found.foreign:
                logger.warning("kept %s: no run wrote it", run_dir / aside / found.foreign[0])
            os.unlink(older.path)
        if not any((run_dir / aside).iterdir()):
            os.rmdir(run_dir / aside)
    record.note(replaces=None)


def _described(run_dir: Path) -> str:
    """Return what there is of a run."""
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        return "without a checkpoint"
    return f"{counted(len(checkpoints), 'checkpoint')}, the last of step {step_of(checkpoints[-1])}"


def _put_back(run_dir: Path, aside: str) -> None:
    """Delete the new run, which has come to nothing, and move the older one back."""
    if not RunRecord(run_dir / aside).exists():
        logger.warning("%s is not there any more: nothing to put back", run_dir / aside)
        RunRecord(run_dir).note(replaces=None)
        return
    delete_units(run_dir, RunRecord(run_dir).found(without=aside).units)
    # From here on the record at the top is the older run's, which says `aside`.
    os.replace(run_dir / aside / NAME, run_dir / NAME)
    fsync(run_dir)
    _move_back(run_dir, aside)


def _move_back(run_dir: Path, aside: str) -> None:
    if (run_dir / aside).is_dir() and not (run_dir / aside).is_symlink():
        (run_dir / aside / NAME).unlink(missing_ok=True)  # a copy
        _merge(run_dir / aside, run_dir)
        os.rmdir(run_dir / aside)
        logger.warning("the earlier run is back in %s; nothing of it is lost", run_dir)
    RunRecord(run_dir).note(aside=None)


def _merge(source: Path, target: Path) -> None:
    """Move all that is in one folder into another; folders that both have become one."""
    for path in sorted(source.iterdir()):
        there = target / path.name
        if path.is_dir() and not path.is_symlink() and there.is_dir() and not there.is_symlink():
            _merge(path, there)
            os.rmdir(path)
        elif there.exists() or there.is_symlink():
            raise FileExistsError(f"{path} belongs at {there}, and something else is there")
        else:
            os.rename(path, there)


def _has_checkpoint(run_dir: Path, content: Content) -> bool:
    """Return whether the run has completed a checkpoint."""
    folders = (run_dir / "checkpoints").glob("checkpoint_*")
    return any(
        content.owns(f"checkpoints/{folder.name}/{manifest.NAME}") and manifest.is_whole(folder)
        for folder in folders
        if not folder.name.endswith(".incomplete")
    )


def _free_name(run_dir: Path) -> str:
    """A name that nothing in the folder has: what is called so is not ours."""
    names = (_ASIDE, *(f"{_ASIDE}_{number}" for number in range(2, 1000)))
    return next(name for name in names if not os.path.lexists(run_dir / name))
