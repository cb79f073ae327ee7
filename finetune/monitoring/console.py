"""The console shows log lines and the progress of training."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

logger = logging.getLogger(__name__)

# The log lines and the live bar share it, so that a line is put above the bar, never into it.
console = Console(highlight=False)


def setup_logging(rank: int = 0) -> None:
    """Send log records to standard output: pretty on a terminal, plain `HH:MM:SS message` else.

    Our own packages are heard from INFO on, all others from WARNING on. Ranks other than 0 only
    warn, with their rank in the line.
    """
    handler: logging.Handler
    if rank == 0 and _is_terminal():
        handler = RichHandler(
            console=console,
            highlighter=NullHighlighter(),
            show_path=False,
            show_level=False,
            omit_repeated_times=False,
            log_time_format="%H:%M:%S",
        )
        handler.setFormatter(LineFormatter("%(message)s", rank=rank))
    else:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(LineFormatter("%(asctime)s %(message)s", "%H:%M:%S", rank=rank))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for package in ("finetune", "ttt", "__main__"):
        logging.getLogger(package).setLevel(logging.INFO if rank == 0 else logging.WARNING)


class Progress:
    """The progress of training from step `start` to step `total`.

    On a terminal a live bar; elsewhere one log line for every `update` that brings metrics.
    Messages and lines go through `logging`, so `setup_logging` comes first.
    """

    def __init__(self, *, total: int, start: int = 0, enabled: bool = True) -> None:
        self._total = total
        self._enabled = enabled
        self._bar = _Bar(total, start) if enabled and _is_terminal() else None
        self._timed_from: tuple[int, float] | None = None

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
            # rich hides the cursor; a second Ctrl-C leaves too abruptly to show it again.
            console.show_cursor(True)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` is done. Without metrics (between log steps) only the bar moves."""
        if not self._enabled:
            return
        eta_sec = self._eta_sec(step)
        if self._bar:
            self._bar.show(step, describe(metrics), eta_sec)
        elif metrics:
            eta = f"  eta {format_duration(eta_sec)}" if eta_sec is not None else ""
            logger.info("step %d/%d  %s%s", step, self._total, describe(metrics), eta)

    def message(self, text: str) -> None:
        """A line to keep, above the bar: an evaluation, a checkpoint."""
        if self._enabled:
            logger.info("%s", text)

    def _eta_sec(self, step: int) -> float | None:
        """Return the seconds left at the pace since the first update: the first step, which
        compiles, misleads."""
        now = time.monotonic()
        if self._timed_from is None:
            self._timed_from = (step, now)
        timed_step, timed_at = self._timed_from
        if step == timed_step:
            return None
        return (self._total - step) * (now - timed_at) / (step - timed_step)


@contextmanager
def counting(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show on a terminal how many pieces of work are done, and nothing elsewhere. Yields what
    counts one more.

    Args:
        title: stands before the bar.
    """
    columns = (TextColumn(title), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
    shown = _is_terminal() and total > 1
    with RichProgress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


def describe(metrics: Mapping[str, float]) -> str:
    """`loss 5.31 (text 3.10 audio 2.21)  lr 1.0e-03  0.31 s/step  2.9k tokens/s`.

    Metrics that are not there are left out.
    """
    parts = []
    if "loss" in metrics:
        kinds = [
            f"{k} {format_loss(metrics[f'{k}_loss'])}"
            for k in ("text", "audio")
            if f"{k}_loss" in metrics
        ]
        loss = format_loss(metrics["loss"])
        parts.append(f"loss {loss}" + (f" ({' '.join(kinds)})" if kinds else ""))
    if "lr" in metrics:
        parts.append(f"lr {metrics['lr']:.1e}")
    if "step_sec" in metrics:
        parts.append(f"{metrics['step_sec']:.2f} s/step")
    if "tokens_per_sec" in metrics:
        parts.append(f"{format_count(metrics['tokens_per_sec'])} tokens/s")
    return "  ".join(parts)


def format_loss(value: float) -> str:
    """`5.31`; `2.35e+32` of a run that diverges."""
    return f"{value:.2f}" if abs(value) < 1e5 else f"{value:.2e}"


def format_count(value: float) -> str:
    """`940`, `2.9k`, `84k`, `1.2M`."""
    if not math.isfinite(value):
        return str(value)
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}" if value < 10 * size else f"{value / size:.0f}{unit}"
    return f"{value:.0f}"


def format_duration(duration_sec: float) -> str:
    """`0:58`, `12:05`, `3:07:00`."""
    minutes, seconds = divmod(round(duration_sec), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _Bar(RichProgress):
    """A line with the bar and the times, and below it a line with the latest metrics."""

    def __init__(self, total: int, start: int) -> None:
        self._metrics = Text(no_wrap=True, overflow="ellipsis", style="bold")
        super().__init__(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("eta {task.fields[eta]}"),
            console=console,
            expand=True,
        )
        self._task = self.add_task("", total=total, completed=start, eta="-:--")

    def show(self, step: int, metrics: str, eta_sec: float | None) -> None:
        if metrics:
            self._metrics.plain = metrics
        if eta_sec is not None:
            self.update(self._task, eta=format_duration(eta_sec))
        self.update(self._task, completed=step)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield self._metrics


class LineFormatter(logging.Formatter):
    """Puts the rank and the level before the message where they matter."""

    def __init__(self, fmt: str, datefmt: str | None = None, *, rank: int = 0) -> None:
        super().__init__(fmt, datefmt)
        self._prefix = f"[rank {rank}] " if rank else ""

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        record.message = self._prefix + level + record.message.rstrip()
        return super().formatMessage(record)


def _is_terminal() -> bool:
    # isatty first: FORCE_COLOR and the like make rich take a pipe for a terminal.
    return console.file.isatty() and console.is_interactive
