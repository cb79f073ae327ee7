"""An earlier evaluation's report lies in the output folder, and this one would replace it."""

import json
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.config import resolved_sources
from finetune.errors import UserError
from finetune.evaluation.tasks import TASKS
from finetune.kept import Kept, fingerprint_of
from finetune.safety import without_nan

logger = logging.getLogger(__name__)

RESULTS = "results.json"
REPORT = "report.html"
KEPT_CONFIGURATION = "checkpoint.yaml"
"""The copy of the checkpoint's configuration in the output folder. That may be a run's folder,
which has an `args.yaml` of its own."""
_OF_NO_RESULT = {
    *("checkpoint", "out", "overwrite", "device", "batch_size", "block_frames"),
    *("recall.max_minutes", "wandb.project", "wandb.offline", "wandb.run_name"),
}
"""Options in which two calls may differ that are the same evaluation. Of the checkpoint its
fingerprint counts, and not its place; what was not heard in time the next call hears."""


def files_of(tasks: Iterable[str]) -> list[str]:
    """Return the names of the files that an evaluation writes when all is measured."""
    of_tasks = (name for task in tasks for name in (f"{task}.csv", *TASKS[task].more_files))
    return [RESULTS, REPORT, KEPT_CONFIGURATION, *of_tasks]


def require_nothing_replaced(out: Path, model: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Check that what lies in the folder is of the same evaluation, which goes on.

    Args:
        model: what `results.json` will say of the checkpoint: `name` and `fingerprint`.
        told: the options by name, as `results.json` will have them.

    Raises:
        UserError: it is of another checkpoint, other data or other settings, or of no evaluation.
    """
    kept = Kept(out / RESULTS).read()
    if kept is None:
        # One that was stopped has left results of its tasks, and may have left more.
        is_begun = any(fingerprint_of(out / f"{task}.jsonl") for task in TASKS)
        names = [] if is_begun else files_of(told["tasks"])
        changes = [f"{name} is of something else" for name in names if (out / name).exists()]
    elif isinstance(kept.get("model"), dict) and isinstance(kept.get("options"), dict):
        changes = list(_changes(kept, model, json.loads(json.dumps(without_nan(dict(told))))))
    else:
        changes = [f"{RESULTS} is of something else"]
    if changes:
        raise UserError(
            f"--out: {out} holds another report, which would be replaced: {'; '.join(changes)}. "
            f"Give another --out, or --overwrite to replace it."
        )


def remove_others(out: Path, fingerprint: str, tasks: Collection[str]) -> None:
    """Remove what an earlier evaluation, whose report was replaced, has left of other tasks.

    Results of the same checkpoint stay: an evaluation with that task goes on with them.

    Args:
        fingerprint: of the checkpoint of this one.
        tasks: of this one.

    Raises:
        UserError: something cannot be removed.
    """
    removed, kept = [], []
    for name in TASKS.keys() - set(tasks):
        results = out / f"{name}.jsonl"
        depends_on = fingerprint_of(results)
        if depends_on is None:
            continue  # what else is called so is somebody else's
        left = [out / f"{name}.csv", *(out / more for more in TASKS[name].more_files)]
        if depends_on.get("checkpoint") == fingerprint:
            kept.append(results.name)
        else:
            left.append(results)
        for path in left:
            if path.is_file():
                _remove(path)
                removed.append(path.name)
    if removed:
        logger.info("removed from %s, as of the report that was replaced: %s", out, _list(removed))
    if kept:
        logger.info("kept in %s, as results of this checkpoint: %s", out, _list(kept))


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        raise UserError(f"--out: {path} cannot be removed: {error.strerror}.") from error


def _changes(
    kept: Mapping[str, Any], model: Mapping[str, Any], told: Mapping[str, Any]
) -> Iterator[str]:
    """Yield in what an earlier evaluation was another one."""
    name, earlier_name = model["name"], kept["model"].get("name")
    if kept["model"].get("fingerprint") != model["fingerprint"]:
        if name == earlier_name:
            yield f"{name} is no longer the same checkpoint"
        else:
            yield f"checkpoint was {earlier_name}, is {name}"
    earlier = kept["options"]
    for key in sorted(told.keys() & earlier.keys()):
        if key not in _OF_NO_RESULT and _is_other(earlier[key], told[key], key):
            yield f"{key} was {_shown(earlier[key])}, is {_shown(told[key])}"


def _is_other(earlier: Any, told: Any, key: str) -> bool:
    """Return whether two values of an option differ, and not only in how a path was typed, as
    earlier versions kept it."""
    if isinstance(earlier, str) and isinstance(told, str):
        return resolved_sources(earlier, f"--{key}") != resolved_sources(told, f"--{key}")
    return bool(earlier != told)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "null" if value is None else str(value)
