"""The loss curves of a sweep as a picture, and all of its results as one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finetune.kept import write_whole
from finetune.monitoring import Kind, running_mean, series
from finetune.report import (
    PICTURE,
    Entry,
    Page,
    Section,
    Table,
    html_page,
    line_style,
    png_element,
    save_png,
    tidy,
)
from finetune.sweep.plan import Sweep
from finetune.sweep.remarks import cautions, seed_remarks
from finetune.sweep.table import Row, logged, shown, shown_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

START_SHARE = 0.25
"""Of the steps; what only they reach is above the axes: the differences are small beside it."""


def plot_sweep(sweep: Sweep, out: Path) -> Path:
    """Draw the training and the evaluation losses of all runs into the PNG `out`.

    A run that starts from another one stands behind it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), **PICTURE)
    train, evaluation = figure.subplots(1, 2, sharex=True)
    _draw(train, sweep, "train", "Training (running mean)")
    _draw(evaluation, sweep, "eval", "Evaluation")
    title = f"Loss of the runs in {sweep.folder.name} (nats, text + audio)"
    figure.suptitle(title, x=0.01, ha="left")
    handles, labels = train.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside lower left", ncols=min(4, len(labels)), frameon=False
        )
    save_png(figure, out)
    return out


def _draw(axes: Axes, sweep: Sweep, kind: Kind, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    total = max(run.first_step + run.args.max_steps for run in sweep.runs.values())
    later: np.ndarray = np.empty(0)
    for number, run in enumerate(sweep.runs.values()):
        steps, losses = series(logged(sweep, run, kind), "loss")
        if not len(losses):
            continue
        steps = steps + run.first_step
        if kind == "train":
            losses = running_mean(losses, len(losses) // 20)
        later = np.append(later, losses[(steps >= START_SHARE * total) & np.isfinite(losses)])
        axes.plot(
            steps,
            losses,
            **line_style(number),
            marker="o" if kind == "eval" else "",
            markersize=4,
            linewidth=1.5,
            label=run.name,
        )
    if len(later) and np.ptp(later) > 0:
        margin = 0.08 * np.ptp(later)
        axes.set_ylim(later.min() - margin, later.max() + margin)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes)


def write_page(sweep: Sweep, rows: Sequence[Row], picture: Path, out: Path) -> Path:
    """Write one HTML file with the table, the picture and what each run changes; it needs no other
    file."""
    columns = shown_columns(rows)
    page = Page(
        title=sweep.folder.name,
        subtitle=(
            f"The runs of {sweep.file}, variations of {sweep.base}. Losses are in nats, text plus "
            "audio; the training loss is a mean over the last tenth of the logged steps (best: "
            "over any). The gradient's norm is before clipping: median, largest, and the share of "
            "steps that were clipped. Times are medians without evaluations and checkpoints; "
            "memory is allocated on the GPU, or resident on the CPU."
        ),
        sections=[
            Section(
                "",
                tables=[
                    Table(
                        list(columns),
                        [[shown(row, name) for name in columns.values()] for row in rows],
                        alarming=[
                            index for index, row in enumerate(rows) if row.message or row.caution
                        ],
                    )
                ],
                entries=[Entry(names, "", text) for names, text in cautions(rows)],
            ),
            *(Section("", note=text) for text in seed_remarks(sweep, rows)),
            Section("Losses", figure=png_element(picture.read_bytes(), alt="loss curves")),
            Section("What each run changes", entries=[_changes(row) for row in rows]),
        ],
    )
    write_whole(out, html_page(page))
    return out


def _changes(row: Row) -> Entry:
    return Entry(
        f"{row.run} (after {row.after})" if row.after else row.run,
        row.changes or "the base, with the overrides of all runs",
        row.message,
    )
