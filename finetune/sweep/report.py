"""The loss curves of a sweep as a picture, and all of its results as one page."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.monitoring import Kind, running_mean, series
from finetune.sweep.plan import Sweep
from finetune.sweep.table import Row, logged, shown, shown_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Safe for the colour-blind (Okabe and Ito); then again with other lines.
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#333333"]
START_SHARE = 0.25
"""Of the steps; what only they reach is above the axes: the differences are small beside it."""
DASHES: list[Any] = ["-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2))]


def plot_sweep(sweep: Sweep, out: Path) -> Path:
    """Draw the training and the evaluation losses of all runs into the PNG `out`.

    A run that starts from another one stands behind it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), dpi=130, layout="constrained")
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
    figure.savefig(out, format="png")
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
            color=COLORS[number % len(COLORS)],
            linestyle=DASHES[number // len(COLORS) % len(DASHES)],
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
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)


def write_page(sweep: Sweep, rows: Sequence[Row], picture: Path, out: Path) -> Path:
    """One HTML file with the table, the picture and what each run changes; needs no other file."""
    columns = shown_columns(rows)
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in columns)
    lines = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape(shown(row, name))}</td>" for name in columns.values())
        + "</tr>"
        for row in rows
    )
    changes = "".join(_changes(row) for row in rows)
    image = base64.b64encode(picture.read_bytes()).decode()
    out.write_text(
        _PAGE.format(
            title=html.escape(sweep.folder.name),
            file=html.escape(str(sweep.file)),
            base=html.escape(str(sweep.base)),
            head=head,
            lines=lines,
            changes=changes,
            image=image,
        ),
        encoding="utf-8",
    )
    return out


def _changes(row: Row) -> str:
    name = f"{row.run} (after {row.after})" if row.after else row.run
    own = row.changes or "the base, with the overrides of all runs"
    message = f"<pre>{html.escape(row.message)}</pre>" if row.message else ""
    return f"<dt>{html.escape(name)}</dt><dd><code>{html.escape(own)}</code>{message}</dd>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right; }}
th:nth-child(-n+2), td:nth-child(-n+2) {{ text-align: left; }}
img {{ max-width: 100%; }} pre {{ white-space: pre-wrap; color: #a00; }}
div {{ overflow-x: auto; }} dt {{ font-weight: bold; }}
</style></head><body>
<h1>{title}</h1>
<p>The runs of <code>{file}</code>, variations of <code>{base}</code>. Losses are in nats, text plus
audio; the training loss is a mean over the last tenth of the logged steps (best: over any). The
gradient's norm is before clipping: median, largest, and the share of steps that were clipped. Times
are medians without evaluations and checkpoints; memory is allocated on the GPU, or resident on the
CPU.</p>
<div><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>
<p><img alt="loss curves" src="data:image/png;base64,{image}"></p>
<h2>What each run changes</h2><dl>{changes}</dl>
</body></html>
"""
