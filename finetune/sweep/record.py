"""What is known of a sweep's runs: what became of each, in NAME.json beside its run folder NAME,
and whether the folder has the run that the file describes now.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from finetune.checkpoint import holds_something, list_checkpoints, replaced_run
from finetune.config import TrainArgs, changed_keys, keys_that
from finetune.errors import UserError
from finetune.kept import Kept
from finetune.plan import SUMMARY
from finetune.sweep.plan import PlannedRun, Sweep
from ttt.options import HARMLESS

Status = Literal["new", "running", "finished", "failed", "diverged", "stopped", "skipped"]


@dataclass
class Record:
    """Record of what is known of a run.

    status: "running" if the process that ran it died without a word; "diverged" if it failed
        because its loss or its weights were no longer finite.
    message: why it failed or was skipped.
    ended_at: when it finished; what started from it knows it by that.
    started_from: `ended_at` of the run that it started from.
    replaces: the checkpoints, as `_checkpoints` names them, of the run in its folder that it was to
        replace, and that comes back if this one ends before its first. None: there was none, or it
        is gone.
    replaces_from: `started_from` of that run.
    total_sec: that its processes took, starting included.
    """

    status: Status = "new"
    message: str = ""
    ended_at: str = ""
    started_from: str = ""
    replaces: list[str] | None = None
    replaces_from: str = ""
    total_sec: float = 0.0


def read_record(run: PlannedRun) -> Record:
    """Return what is known of a run; one that finished, and whose folder was deleted, is new."""
    kept = _kept(run)
    try:
        record = Record(**(kept.read() or {}))
    except TypeError as error:
        raise UserError(
            f"{kept.path} is damaged ({error}): delete it to run this again."
        ) from error
    if record.status == "finished" and not (run.run_dir / "args.yaml").is_file():
        # What started from it is none the older for it, until it is run again.
        return Record(ended_at=record.ended_at)
    return record


def has_record(run: PlannedRun) -> bool:
    """Return whether anything is known of a run."""
    return _kept(run).path.is_file()


def write_record(run: PlannedRun, record: Record) -> None:
    _kept(run).write(dataclasses.asdict(record))


def _kept(run: PlannedRun) -> Kept:
    return Kept(run.run_dir.with_name(f"{run.name}.json"))


def changes_since(sweep: Sweep, run: PlannedRun) -> list[str]:
    """Return why what lies in the run's folder is another experiment than the file describes."""
    record = read_record(run)
    if _lies_aside(run, record):
        return [f"it has not come to its first checkpoint, or was killed before it{_aside(run)}"]
    config = run.run_dir / "args.yaml"
    if not config.is_file():
        return []
    found = _changed(run, harmless=False)
    processes = _processes(run)
    if processes not in (None, sweep.processes):
        found.append(f"processes was {processes} and is {sweep.processes} now")
    if run.after:
        earlier = sweep.runs[run.after]
        if _started_from(run, record) != read_record(earlier).ended_at:
            found.append(f"{run.after}, which it starts from, was run again")
        elif changes_since(sweep, earlier):
            found.append(f"{run.after}, which it starts from, is outdated")
    return found


def harmless_changes(run: PlannedRun) -> list[str]:
    """Return what is not as it was when the run in the folder began, and changes no result."""
    return _changed(run, harmless=True)


def _changed(run: PlannedRun, *, harmless: bool) -> list[str]:
    keys = keys_that(TrainArgs, HARMLESS)
    return [
        f"{key} was {old} and is {new} now"
        for key, (old, new) in changed_keys(run.run_dir / "args.yaml", run.args).items()
        if (key in keys) == harmless
    ]


def _processes(run: PlannedRun) -> int | None:
    """Return how many processes trained what is in the run's folder; None: it does not say."""
    return (Kept(run.run_dir / SUMMARY).read() or {}).get("processes")


def _started_from(run: PlannedRun, record: Record) -> str:
    """Return `started_from` of the run that is in the folder."""
    return record.replaces_from if is_to_replace(run, record) else record.started_from


def is_to_replace(run: PlannedRun, record: Record) -> bool:
    """Return whether the run that it was to replace is in the folder, or lies aside there."""
    return record.replaces is not None and not _checkpoints(run) - {*record.replaces}


def _lies_aside(run: PlannedRun, record: Record) -> bool:
    """Return whether the run that it was to replace is not back yet: the process that moved it
    aside was killed, and whatever trains in the folder next brings it back first."""
    return is_to_replace(run, record) and _checkpoints(run) != {*(record.replaces or ())}


def _aside(run: PlannedRun) -> str:
    """Return where the run that it was to replace lies, if that is there."""
    folder = replaced_run(run.run_dir)
    if folder is None or not folder.is_dir():
        return ""
    return f"; the run that it was to replace lies whole in {folder}: move that away to keep it"


def _checkpoints(run: PlannedRun) -> set[str]:
    """Return the checkpoints in the run's folder, each by its name and the time at which it was
    written; one that is moved aside and back keeps both."""
    files = [checkpoint / "args.yaml" for checkpoint in list_checkpoints(run.run_dir)]
    return {f"{file.parent.name} {file.stat().st_mtime_ns}" for file in files if file.is_file()}


def replacing_problems(sweep: Sweep, chosen: Iterable[PlannedRun]) -> Iterator[str]:
    """Yield, in one message, which runs lie there already, of other settings, and would begin anew.

    Args:
        chosen: what is to be run, in order.
    """
    lines, again = [], set()
    for run in chosen:
        record, changes = read_record(run), changes_since(sweep, run)
        if run.after in again and not changes:
            changes = [f"{run.after}, which it starts from, is to be run again"]
        if changes or record.status != "finished":
            again.add(run.name)
        if changes and _holds_something(run, record):
            became = "" if record.status == "new" else f" ({record.status})"
            lines.append(f"  - {run.name}{became}: {'; '.join(changes)}")
    if lines:
        listed = "\n".join(lines)
        yield (
            f"sweep_dir: {sweep.folder} already holds runs of other settings, which would be "
            f"replaced; nothing was run:\n{listed}\nChoose another folder with "
            "--sweep_dir, leave these out with --only, or replace them with --overwrite_run_dir."
        )


def _holds_something(run: PlannedRun, record: Record) -> bool:
    if came_to_nothing(run, record):
        return False
    return _lies_aside(run, record) or holds_something(run.run_dir)


def came_to_nothing(run: PlannedRun, record: Record) -> bool:
    """Return whether the run in the folder failed before its first checkpoint: nothing goes on
    from it."""
    has_failed = record.status in ("failed", "diverged")
    return has_failed and record.replaces is None and not _checkpoints(run)


def replacing(run: PlannedRun, record: Record) -> Record:
    """Return the record of a run that begins anew in the place of what lies in its folder."""
    if came_to_nothing(run, record):
        return Record()
    if _lies_aside(run, record):
        return Record(replaces=record.replaces, replaces_from=record.replaces_from)
    return Record(replaces=sorted(_checkpoints(run)), replaces_from=_started_from(run, record))
