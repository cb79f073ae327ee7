"""The picture of spoken recall."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from finetune.evaluation.tasks.base import Found
from finetune.report import COLORS, DARK, MUTED, duration_text, tidy, time_axis
from finetune.spoken import ARM_LABELS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = {"on": (COLORS[0], "o"), "off": (DARK, "s"), "reset": (COLORS[2], "^")}
_APART = {"on": 1.0, "off": 1.03, "reset": 0.97}
"""Arms stand a little beside one another, so that equal ones are seen."""


def recall_figure(found: Found) -> Figure:
    """Draw the share of right answers by distance for each arm, with intervals, beside chance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for arm, of in found["arms"].items():
        color, marker = _STYLE[arm]
        points = of["by_distance"]
        at = [point["distance_sec"] * _APART[arm] for point in points]
        value, low, high = ([_number(p[name]) for p in points] for name in ("value", "low", "high"))
        axes.plot(at, value, color=color, marker=marker, markersize=5, linewidth=1.5,
                  label=ARM_LABELS[arm])  # fmt: skip
        axes.vlines(at, low, high, color=color, linewidth=1.2)
    dashes: Any = (0, (4, 3))
    axes.axhline(found["chance"], color=MUTED, linewidth=1, linestyle=dashes, label="chance")
    axes.plot(found["distances_sec"], found["baselines"]["oldest"]["by_distance"], "x",
              color=MUTED, markersize=5, label="the oldest fact not yet asked for")  # fmt: skip
    time_axis(axes, found["distances_sec"][-1])
    window_sec, limits = found["window_sec"], axes.get_xlim()
    if window_sec is not None and limits[0] < window_sec < limits[1]:
        axes.axvline(window_sec, color=MUTED, linewidth=1, linestyle=(0, (1, 2)), zorder=0)
        axes.annotate(f"attention's window, {duration_text(window_sec)}", (window_sec, 1.0),
                      xycoords=("data", "axes fraction"), fontsize=8, color=MUTED,
                      ha="center", va="bottom")  # fmt: skip
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("from the end of the fact to the end of the question")
    axes.set_ylabel("share of right answers")
    tidy(axes, grid="y")
    figure.legend(
        title="lines: 95 % intervals", title_fontsize=9, fontsize=9, frameon=False,
        loc="outside lower center", ncols=3,
    )  # fmt: skip
    return figure


def _number(value: float | None) -> float:
    return math.nan if value is None else value
