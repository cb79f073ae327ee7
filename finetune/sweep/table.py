"""Results of a sweep's runs are tables of numbers: for people, for spreadsheets, for programs."""

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from finetune.errors import UserError
from finetune.kept import write_whole
from finetune.monitoring import Kind, console, metrics_path, read_metrics
from finetune.plan import SUMMARY
from finetune.sweep.content import TABLE
from finetune.sweep.plan import PlannedRun, Sweep, option
from finetune.sweep.record import changes_since, read_record

FINAL_SHARE = 0.1
"""Of a run's logged steps, at its end: single batches differ too much to be compared."""


@dataclass
class Row:
    """A row is one run; None where it has not got so far, or is not evaluated.

    status: of its record, or "outdated": it was run with other settings, which `message` names.
    caution: why TTT could do nothing in it.
    Of a run that diverged there are no losses but the first: what it had before says nothing of it.
    eval_loss, eval_loss_first, eval_loss_best: after the last evaluation, before training, and the
        lowest; in nats, text plus audio. eval_loss_best_step: the step of the lowest.
    train_loss, train_loss_best: means over a tenth of the logged steps: the last, and the lowest.
    sec_per_step: the median; sec_per_epoch: that many for all training segments once. Without
        evaluations and checkpoints.
    total_sec: that its processes took, with starting, evaluations and checkpoints.
    grad_norm, grad_norm_max: of the whole gradient before clipping, median and largest.
    clipped_share: of the logged steps, whose gradient was larger than max_norm.
    peak_memory_gb: allocated on the GPU; on the CPU, resident in the main process.
    """

    run: str
    status: str
    message: str = ""
    caution: str = ""
    changes: str = ""
    after: str | None = None
    steps: int = 0
    max_steps: int = 0
    parameters: int | None = None
    trainable_parameters: int | None = None
    eval_loss: float | None = None
    eval_text_loss: float | None = None
    eval_audio_loss: float | None = None
    eval_loss_first: float | None = None
    eval_loss_best: float | None = None
    eval_loss_best_step: int | None = None
    train_loss: float | None = None
    train_loss_best: float | None = None
    sec_per_step: float | None = None
    sec_per_epoch: float | None = None
    total_sec: float = 0.0
    grad_norm: float | None = None
    grad_norm_max: float | None = None
    clipped_share: float | None = None
    nonfinite_steps: int | None = None
    peak_memory_gb: float | None = None


_LOSSES = (
    *("eval_loss", "eval_text_loss", "eval_audio_loss", "eval_loss_best", "eval_loss_best_step"),
    *("train_loss", "train_loss_best"),
)
"""Of a row: what runs are compared by."""


def collect(sweep: Sweep) -> list[Row]:
    """A row for each run, in the order in which they run."""
    return [_row(sweep, run) for run in sweep.runs.values()]


def logged(sweep: Sweep, run: PlannedRun, kind: Kind) -> list[dict[str, Any]]:
    """The lines of a run's metrics, none if it was not run as the file describes it now."""
    path = metrics_path(run.run_dir, kind)
    is_there = _was_run(run) and path.is_file() and not _outdated(sweep, run)
    return read_metrics(path) if is_there else []


def _was_run(run: PlannedRun) -> bool:
    return read_record(run).status not in ("new", "skipped")


def _outdated(sweep: Sweep, run: PlannedRun) -> list[str]:
    """Why what lies in a run's folder is not what the file describes now."""
    try:
        return changes_since(sweep, run)
    except UserError as error:  # a table of the other runs can still be had
        return [str(error)]


def _row(sweep: Sweep, run: PlannedRun) -> Row:
    record = read_record(run)
    status: str = record.status
    message = record.message
    if _was_run(run) and (changes := _outdated(sweep, run)):
        changes += [f"{status}: {message}"] if message else []
        status, message = "outdated", "; ".join(changes)
    row = Row(
        run.name,
        status,
        message,
        changes=" ".join(option(key, value) for key, value in run.own.items()),
        after=run.after,
        max_steps=run.args.max_steps,
        total_sec=0.0 if status == "outdated" else record.total_sec,
    )
    train, evaluation = logged(sweep, run, "train"), logged(sweep, run, "eval")
    summary_file = run.run_dir / SUMMARY
    if (train or evaluation) and summary_file.is_file():
        summary = json.loads(summary_file.read_text(encoding="utf-8"))
        row.parameters = summary["parameters"]
        row.trainable_parameters = summary["trainable_parameters"]
        row.caution = " ".join(summary.get("cautions", ()))
        if train:
            row.sec_per_step = float(np.median(_finite(train, "step_sec")))
            row.sec_per_epoch = row.sec_per_step * summary["steps_per_epoch"]
    if evaluation:
        _add_evaluation(row, evaluation)
    if train:
        _add_training(row, train, run.args.max_norm)
    if status == "diverged":
        for name in _LOSSES:
            setattr(row, name, None)
    return row


def _add_evaluation(row: Row, evaluation: list[dict[str, Any]]) -> None:
    best = min(evaluation, key=lambda line: np.nan_to_num(line["loss"], nan=np.inf))
    last = evaluation[-1]
    row.eval_loss, row.eval_loss_first = last["loss"], evaluation[0]["loss"]
    row.eval_text_loss, row.eval_audio_loss = last["text_loss"], last["audio_loss"]
    row.eval_loss_best, row.eval_loss_best_step = best["loss"], best["step"]


def _add_training(row: Row, train: list[dict[str, Any]], max_norm: float) -> None:
    row.steps = train[-1]["step"]
    losses = np.array([line["loss"] for line in train])
    width = max(1, round(len(losses) * FINAL_SHARE))
    means = np.convolve(losses, np.full(width, 1 / width), mode="valid")
    row.train_loss = float(means[-1])
    row.train_loss_best = float(np.fmin.reduce(means))
    norms = _finite(train, "grad_norm")
    if len(norms):
        row.grad_norm, row.grad_norm_max = float(np.median(norms)), float(norms.max())
        row.clipped_share = float((norms > max_norm).mean())
    row.nonfinite_steps = int(train[-1]["nonfinite_steps"])
    row.peak_memory_gb = max(line.get("peak_memory_gb", 0.0) for line in train) or None


def _finite(lines: list[dict[str, Any]], name: str) -> np.ndarray:
    values = np.array([line[name] for line in lines], dtype=float)
    return values[np.isfinite(values)]


# --- for people -----------------------------------------------------------------------------------

COLUMNS: dict[str, str] = {
    "run": "run",
    "status": "status",
    "eval loss": "eval_loss",
    "best (step)": "eval_loss_best",
    "train loss": "train_loss",
    "parameters": "parameters",
    "s/step": "sec_per_step",
    "min/epoch": "sec_per_epoch",
    "grad norm": "grad_norm",
    "max": "grad_norm_max",
    "clipped": "clipped_share",
    "peak GB": "peak_memory_gb",
}


_BOUNDLESS = Console(width=1000)


def shown_columns(rows: Sequence[Row]) -> dict[str, str]:
    """Return those of `COLUMNS` in which anything stands."""
    return {
        heading: name
        for heading, name in COLUMNS.items()
        if any(getattr(row, name) is not None for row in rows)
    }


def shown(row: Row, name: str) -> str:
    """Return one value as people read it."""
    value = getattr(row, name)
    if value is None:
        return "–"
    if name == "status" and value not in ("finished", "new", "skipped", "outdated"):
        return f"{value} at {row.steps}/{row.max_steps}"
    if name == "eval_loss_best":
        return f"{value:.3f} ({row.eval_loss_best_step})"
    if name == "parameters":
        return f"{value / 1e6:.3f}M"
    if name == "sec_per_epoch":
        return f"{value / 60:.2f}"
    if name == "clipped_share":
        return f"{value:.0%}"
    if name in ("sec_per_step", "grad_norm", "grad_norm_max", "peak_memory_gb"):
        return f"{value:.2f}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def print_table(rows: Sequence[Row]) -> None:
    table = Table(show_edge=False, pad_edge=False)
    columns = shown_columns(rows)
    for heading in columns:
        is_text = heading in ("run", "status")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(shown(row, name) for name in columns.values()))
    # As wide as it is: rich would cut it to the terminal, or to 80 columns in a file.
    width = Measurement.get(_BOUNDLESS, _BOUNDLESS.options, table).maximum
    wide = Console(file=console.file, width=width)
    wide.print(table)
    for row in rows:
        if row.message:
            console.print(f"{row.run}: {row.message}", markup=False, soft_wrap=True)


# --- for programs ---------------------------------------------------------------------------------


def table_is_there(folder: Path) -> bool:
    """Return whether a folder has the table of a sweep, also of an earlier version."""
    try:
        return (folder / f"{TABLE}.csv").read_bytes().startswith(b"run,status,")
    except OSError:
        return False


def only_in_file(rows: Sequence[Row], folder: Path) -> list[str]:
    """Return the runs of which the table in a folder has losses, and these rows have none; those of
    a run that has diverged since are of no use."""
    path = folder / f"{TABLE}.csv"
    if not path.is_file():
        return []
    known = {
        row.run
        for row in rows
        if row.status == "diverged" or row.eval_loss is not None or row.train_loss is not None
    }
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        there = [
            r["run"] for r in csv.DictReader(file) if r.get("eval_loss") or r.get("train_loss")
        ]
    return [name for name in there if name not in known]


def write_tables(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write table.csv and table.json: all columns, numbers unrounded."""
    records = [dataclasses.asdict(row) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Row)])
    writer.writeheader()
    writer.writerows(records)
    written = {
        folder / f"{TABLE}.csv": text.getvalue(),
        folder / f"{TABLE}.json": json.dumps(_json(records), indent=2, allow_nan=False) + "\n",
    }
    for path, content in written.items():
        write_whole(path, content)
    return list(written)


def _json(value: Any) -> Any:
    """Return a value with NaN and infinity, which JSON has not, as text."""
    if isinstance(value, list):
        return [_json(item) for item in value]
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value
