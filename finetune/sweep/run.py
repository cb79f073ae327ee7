"""Runs a sweep: each run in a process of its own, so that one that fails does not end the others.

Beside the run folder NAME lie NAME.log, what the run has printed, and NAME.json, what became of it.
"""

import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from rich.status import Status as Spinner
from rich.text import Text

from finetune.errors import UserError
from finetune.interrupt import answer_to, stop_signals
from finetune.kept import make_folder, require_writable
from finetune.monitoring import console, format_duration
from finetune.safety import is_secret
from finetune.step import HAS_DIVERGED, lower_rates
from finetune.sweep.machine import machine_problems
from finetune.sweep.plan import PlannedRun, Sweep, option
from finetune.sweep.record import (
    Record,
    Status,
    came_to_nothing,
    changes_since,
    harmless_changes,
    is_to_replace,
    read_record,
    replacing,
    replacing_problems,
    write_record,
)

_POLL_SEC = 0.2
"""Between two looks at a run, in which a signal is answered."""
# How torchrun begins what it has to add to the error of one of its processes: "E1122 14:50:08".
_LAUNCHER_LINE = re.compile(r"[EW]\d{4} ")


def log_path(run: PlannedRun) -> Path:
    return run.run_dir.with_name(f"{run.name}.log")


def run_sweep(
    sweep: Sweep, only: Collection[str], *, force: bool = False, overwrite: bool = False
) -> int:
    """Run what is not finished of `only`, in order.

    Args:
        force: runs start although their estimated memory is more than there is.
        overwrite: runs of other settings are replaced.

    Returns:
        An exit status: 0, 1 if a run failed or was skipped, or 128 + the signal that ended it.

    Raises:
        UserError: what a run starts from is missing, a run would be replaced unasked, another
            process is at work here, or the folder cannot be written.
    """
    for problem in runnable_problems(sweep, only, overwrite=overwrite, here=True):
        raise UserError(problem)
    chosen = [run for name, run in sweep.runs.items() if name in only]
    require_writable(sweep.folder, "sweep_dir")
    try:
        make_folder(sweep.folder)
    except OSError as error:
        raise UserError(f"sweep_dir: cannot make {sweep.folder}: {error.strerror}.") from error
    failed = False
    with Children() as children:
        for number, run in enumerate(chosen, start=1):
            label = f"[{number}/{len(chosen)}] {run.name}"
            record = _run_one(sweep, run, label, children, force, overwrite)
            failed |= record.status != "finished"
            if record.status == "stopped" or children.signal_number:
                _say("stopped; the same command goes on from here")
                return 128 + (children.signal_number or signal.SIGTERM)
    return int(failed)


def runnable_problems(
    sweep: Sweep, only: Collection[str], *, overwrite: bool, here: bool
) -> Iterator[str]:
    """Yield why runs cannot be run: what one starts from is missing, one would be replaced unasked,
    or there is no such GPU, package or number of processes.

    Args:
        only: their names.
        overwrite: runs of other settings are replaced.
        here: they are to run on this machine.
    """
    chosen = []
    for run in (run for name, run in sweep.runs.items() if name in only):
        try:
            is_waiting = bool(
                run.after and run.after not in only and _done(sweep, run.after) != "finished"
            )
            changes_since(sweep, run)
        except UserError as error:  # what is known of it is damaged
            yield str(error)
            continue
        if is_waiting:
            yield f"{run.name} starts from {run.after}, which is not finished: run that."
        else:
            chosen.append(run)
    to_run = [run for run in chosen if _done(sweep, run.name) != "finished"]
    yield from machine_problems(sweep, to_run, here=here)
    if not overwrite:
        yield from replacing_problems(sweep, chosen)


def _done(sweep: Sweep, name: str) -> Status:
    """Return the status of a run, "new" where its result is of another configuration."""
    run = sweep.runs[name]
    return "new" if changes_since(sweep, run) else read_record(run).status


def _run_one(
    sweep: Sweep,
    run: PlannedRun,
    label: str,
    children: "Children",
    force: bool,
    overwrite: bool,
) -> Record:
    record = read_record(run)
    changes = changes_since(sweep, run)
    if record.status == "finished" and not changes:
        kept = harmless_changes(run)
        taken = f", and taken as it is: {'; '.join(kept)}" if kept else ""
        _say(f"{label}: finished before{taken}")
        return record
    if run.after and (earlier := read_record(sweep.runs[run.after])).status != "finished":
        record.status, record.total_sec = "skipped", 0.0
        record.message = f"not run: {run.after}, which it starts from, {earlier.status}"
        write_record(run, record)
        _say(f"{label}: {record.message}")
        return record
    options = {"resume": "auto", "overwrite_run_dir": "false"}
    if changes:
        is_nothing = came_to_nothing(run, record)
        what = ", as it failed before its first checkpoint" if is_nothing else ""
        _say(f"{label}: runs again from its beginning{what}: {'; '.join(changes)}")
        record = replacing(run, record)
        replaces = str(overwrite or is_nothing).lower()
        options = {"resume": "false", "overwrite_run_dir": replaces}
    else:
        record.replaces, record.replaces_from = None, ""
    if force:
        options["force"] = "true"
    with _locked(log_path(run)) as log:
        record.status, record.message, record.ended_at = "running", "", ""
        if run.after:
            record.started_from = read_record(sweep.runs[run.after]).ended_at
        write_record(run, record)
        _say(f"{label}: running; tail -f {shlex.quote(log.name)}")
        started_at, log_start = time.monotonic(), log.tell()
        code = children.run(_command(sweep, run, options), log, label, _environment(run))
        took_sec = time.monotonic() - started_at
    record.total_sec += took_sec
    record.status = _status_of(code, children)
    record.ended_at = datetime.now(timezone.utc).isoformat() if code == 0 else ""
    if code == 0 or not is_to_replace(run, record):
        record.replaces, record.replaces_from = None, ""
    if record.status == "failed":
        record.message = _reason(log_path(run), log_start, code)
        said, has_diverged, _ = record.message.partition(HAS_DIVERGED)
        if has_diverged:  # what follows is for those who run it alone
            record.status = "diverged"
            record.message = f"{said}{HAS_DIVERGED} {_remedy(sweep, run, record)}"
    write_record(run, record)
    detail = f": {record.message}" if record.message else ""
    _say(f"{label}: {record.status} after {format_duration(took_sec)}{detail}")
    return record


def _command(sweep: Sweep, run: PlannedRun, options: dict[str, str]) -> list[str]:
    launcher = [sys.executable, "-m"]
    if sweep.processes > 1:
        launcher += ["torch.distributed.run", "--standalone"]
        launcher += [f"--nproc-per-node={sweep.processes}", "-m"]
    given = run.overrides | options
    # Everybody on the machine can read a command line: see `_environment`.
    overrides = [f"--{option(key, value)}" for key, value in given.items() if not is_secret(key)]
    return [*launcher, "finetune", "train", str(sweep.base), *overrides]


def _environment(run: PlannedRun) -> dict[str, str]:
    """Return the environment of a run's process: the key of wandb reaches it so."""
    key = run.args.wandb.key
    return dict(os.environ) | ({"WANDB_API_KEY": key} if key else {})


def _status_of(code: int, children: "Children") -> Status:
    if code == 0:
        return "finished"
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    was_signaled = code in [128 + s for s in signals] + [-s for s in signals]
    return "stopped" if children.signal_number or was_signaled else "failed"


def _remedy(sweep: Sweep, run: PlannedRun, record: Record) -> str:
    """Return what to do about a run that diverged."""
    option = "" if came_to_nothing(run, record) else " with --overwrite_run_dir"
    return f"{lower_rates(run.args)} in {sweep.file}, and run that again{option}."


def _reason(log: Path, start: int, code: int) -> str:
    """Return what a run that failed had to say: its error message, or the last line that it
    printed."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    with log.open(errors="replace") as file:
        file.seek(start)
        printed = file.read()
    _, mark, message = printed.rpartition("\nerror: ")
    lines = (message if mark else printed).strip().splitlines()
    if not mark:
        return lines[-1] if lines else f"exit status {code}"
    of_launcher = (i for i, line in enumerate(lines) if _LAUNCHER_LINE.match(line))
    return "\n".join(lines[: next(of_launcher, len(lines))])


@contextmanager
def _locked(path: Path) -> Iterator[TextIO]:
    """The log of a run, open at its end. The run's process inherits the lock: as long as it lives,
    also without the process that started it, nobody else may run the same."""
    with path.open("a", encoding="utf-8") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{path.stem} is being run by another process, which writes to {path}. Wait for "
                "it, or end it."
            ) from error
        yield log


class Children:
    """Runs one process at a time and hands on to it the signals that ask to stop.

    A Ctrl-C reaches the child from the terminal as well; it takes two that close for one.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Children":
        for number in stop_signals():
            self._previous[number] = signal.signal(number, self._hand_on)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def run(self, command: list[str], log: TextIO, label: str, environment: dict[str, str]) -> int:
        """The exit status; negative for the signal that killed it."""
        self._process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            if self.signal_number:  # it came while this one was being started
                self._process.send_signal(self.signal_number)
            with console.status(label) if console.is_terminal else nullcontext() as shown:
                return self._wait(self._process, log, label, shown)
        finally:
            self._process = None

    def _wait(
        self, process: subprocess.Popen[bytes], log: TextIO, label: str, shown: Spinner | None
    ) -> int:
        """Wait for a run's end; say at once what a signal leads to, which stands in its log."""
        is_told = False
        while True:
            try:
                return process.wait(timeout=_POLL_SEC)
            except subprocess.TimeoutExpired:
                if self.signal_number and not is_told:
                    is_told = True
                    _say(f"{label}: {answer_to(self.signal_number)}")
                if shown is not None:
                    line = f"{label}  {_last_line(Path(log.name))}"
                    shown.update(Text(line[: console.width - 4]))

    def _hand_on(self, number: int, frame: object) -> None:
        self.signal_number = number
        if self._process is not None:
            self._process.send_signal(number)


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 400))
        lines = file.read().decode(errors="replace").splitlines()
    return lines[-1].strip() if lines else ""


def _say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)
