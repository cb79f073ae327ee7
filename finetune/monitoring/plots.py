"""The loss curve of a run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.errors import UserError
from finetune.monitoring.metrics import metrics_path, read_metrics
from finetune.report import COLORS, DARK, MUTED, PICTURE, save_png, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = {"loss": "total", "text_loss": "text", "audio_loss": "audio"}
CURVE_COLORS = {"total": DARK, "text": COLORS[0], "audio": COLORS[1]}
EVAL_STYLE: dict[str, Any] = {
    "linestyle": (0, (2, 2)),
    "linewidth": 1.0,
    "marker": "o",
    "markersize": 6,
    "markerfacecolor": "white",
    "markeredgewidth": 1.5,
}
SMOOTH_FROM_POINTS = 100


def plot_losses(run_dir: Path, out: Path) -> Path:
    """Draw the training and evaluation losses of `run_dir` into the PNG `out`; returns `out`.

    Raises `UserError` if the run has logged nothing, or `out` cannot be written.
    """
    train = _read(metrics_path(run_dir, "train"))
    evaluation = _read(metrics_path(run_dir, "eval"))
    if not train and not evaluation:
        raise UserError(
            f"{run_dir} holds no metrics: neither metrics.train.jsonl nor metrics.eval.jsonl has a "
            "line. Give the run_dir of a run that has logged at least one step."
        )
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.8), **PICTURE)
    axes = figure.add_subplot()
    for name, label in CURVES.items():
        _draw_train(axes, *series(train, name), CURVE_COLORS[label])
        axes.plot(*series(evaluation, name), color=CURVE_COLORS[label], zorder=3, **EVAL_STYLE)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats)")
    axes.set_title(f"Loss of {run_dir.resolve().name}", loc="left")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes)
    _add_legend(axes, n_train=len(train), has_eval=bool(evaluation))
    save_png(figure, out, "plot")
    return out


def _read(path: Path) -> list[dict[str, Any]]:
    return read_metrics(path) if path.exists() else []


def series(records: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric; infinities become gaps, as NaN is one already."""
    points = [(record["step"], record[name]) for record in records if name in record]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, np.where(np.isfinite(values), values, np.nan)


def _draw_train(axes: Axes, steps: np.ndarray, losses: np.ndarray, color: str) -> None:
    marker = "." if len(steps) < 40 else ""
    if len(steps) < SMOOTH_FROM_POINTS:
        axes.plot(steps, losses, color=color, marker=marker, linewidth=1.6)
        return
    axes.plot(steps, losses, color=color, linewidth=0.7, alpha=0.25)
    axes.plot(steps, running_mean(losses, len(losses) // 40), color=color, linewidth=1.6)


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean over `reach` points to either side, fewer at the ends; NaN counts nowhere."""
    window = np.ones(2 * reach + 1)
    known = np.isfinite(values)
    # "full" and cut, not "same": that one has the length of the longer input, maybe the window.
    total = np.convolve(np.where(known, values, 0.0), window)[reach : reach + len(values)]
    count = np.convolve(known.astype(float), window)[reach : reach + len(values)]
    return np.where(known, total / np.maximum(count, 1.0), np.nan)


def _add_legend(axes: Axes, *, n_train: int, has_eval: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=color, linewidth=3, label=name) for name, color in CURVE_COLORS.items()
    ]
    if n_train:
        label = "training" if n_train < SMOOTH_FROM_POINTS else "training (running mean)"
        handles.append(Line2D([], [], color=MUTED, linewidth=1.6, label=label))
    if has_eval:
        handles.append(Line2D([], [], color=MUTED, label="evaluation", **EVAL_STYLE))
    below: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, -0.25)}
    axes.legend(handles=handles, frameon=False, ncols=len(handles), **below)
