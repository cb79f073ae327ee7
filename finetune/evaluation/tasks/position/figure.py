"""The picture of loss by position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.evaluation.streams import STREAM_TITLES, STREAMS
from finetune.evaluation.tasks.base import Found
from finetune.report import COLORS, DARK, MUTED, duration_text, tidy, time_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Json = dict[str, Any]

# Told apart by their markers in print.
ARM_STYLE: dict[str, tuple[str, str]] = {
    "on": (COLORS[0], "o"),
    "off": (DARK, "s"),
    "reset": (COLORS[2], "^"),
    "carried": (COLORS[1], "D"),
    "baseline": (COLORS[3], "v"),
}
ARM_LABELS = {
    "on": "TTT on",
    "off": "TTT off",
    "reset": "TTT reset every {reset}",
    "carried": "TTT carried over from another recording",
    "baseline": "baseline: {baseline}",
}
_OFF_SCALE = 1.5
"""The loss of guessing is drawn where it is no farther from the curves than this times their
span; else it is named at the edge, or the curves would be flat."""


def arm_label(arm: str, results: Found) -> str:
    baseline = (results.get("baseline") or {}).get("name", "an earlier evaluation")
    return ARM_LABELS[arm].format(reset=duration_text(results["reset_sec"]), baseline=baseline)


def position_figure(results: Found) -> Figure:
    """Above: the loss by position of each arm. Below: its difference to the arm `off`."""
    from matplotlib.figure import Figure

    differences = [d for d in results["differences"] if d["arms"][1] == "off"]
    num_rows = 2 if differences else 1
    figure = Figure(figsize=(14, 3.9 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, len(STREAMS), sharex=True, squeeze=False)
    for column, stream in enumerate(STREAMS):
        top, bottom = axes[0, column], axes[-1, column]
        for arm, of_stream in results["arms"].items():
            label = arm_label(arm, results)
            _draw_curve(top, of_stream[stream]["curve"], arm, label, band=0.07)
        _draw_guessing(top, results["guessing"][stream])
        top.set_title(STREAM_TITLES[stream], loc="left", fontsize=11, fontweight="bold")
        for difference in differences:
            _draw_curve(bottom, difference[stream]["curve"], difference["arms"][0], "", band=0.2)
        if differences:
            bottom.axhline(0, color=ARM_STYLE["off"][0], linewidth=1.2, zorder=1)
        for row in range(num_rows):
            _mark_window(axes[row, column], results, named=row == 0)
        bottom.set_xlabel("position in the recording")
    time_axis(axes[0, 0], results["longest_sec"])
    axes[0, 0].set_ylabel("loss, nats per token")
    if differences:
        axes[1, 0].set_ylabel("loss minus that of TTT off\n(below 0: better)")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        title="bands: 95 % intervals, bootstrap over recordings (below: paired)",
        title_fontsize=9,
        fontsize=10,
        loc="outside lower center",
        frameon=False,
        ncols=len(results["arms"]),
    )
    return figure


def _draw_curve(axes: Axes, curve: Sequence[Json], arm: str, label: str, *, band: float) -> None:
    color, marker = ARM_STYLE[arm]
    middle = np.array([(p["start_sec"] + p["stop_sec"]) / 2 for p in curve])
    value, low, high = (
        np.array([math.nan if p[name] is None else p[name] for p in curve])
        for name in ("value", "low", "high")
    )
    axes.plot(middle, value, color=color, marker=marker, markersize=4, linewidth=1.5, label=label)
    axes.fill_between(middle, low, high, color=color, alpha=band, linewidth=0)
    tidy(axes, grid="y")


def _draw_guessing(axes: Axes, guessing: float) -> None:
    """The loss of a model that takes all tokens for equally likely: ln(vocabulary)."""
    low, high = axes.get_ylim()
    span = high - low
    label = f"guessing: ln {round(math.exp(guessing))} = {guessing:.2f}"
    style: Json = {"color": MUTED, "linewidth": 1, "linestyle": (0, (4, 3))}
    small: Json = {"fontsize": 8, "color": MUTED, "transform": axes.get_yaxis_transform()}
    if guessing <= high + _OFF_SCALE * span:
        axes.axhline(guessing, **style)
        axes.text(0.99, guessing, label, ha="right", va="bottom", **small)
        axes.set_ylim(low, max(high, guessing + 0.12 * span))
    else:
        top = high + 0.12 * span
        axes.set_ylim(low, top)
        axes.text(0.99, top, f"{label} ↑ (off the scale)", ha="right", va="top", **small)


def _mark_window(axes: Axes, results: Found, *, named: bool) -> None:
    window_sec = results["attention_window_sec"]
    if window_sec >= results["longest_sec"]:
        return
    axes.axvline(window_sec, color=MUTED, linewidth=1, linestyle=(0, (1, 2)), zorder=0)
    if named:
        axes.annotate(
            f"attention sees {duration_text(window_sec)}",
            (window_sec, 0),
            xycoords=("data", "axes fraction"),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=8,
            color=MUTED,
        )
