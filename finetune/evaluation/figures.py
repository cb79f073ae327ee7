"""The pictures of an evaluation, as matplotlib figures."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .health import MEASURES
from .position import STREAMS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Json = dict[str, Any]

# Safe for the colour-blind, and told apart by their markers in print.
ARM_STYLE: dict[str, tuple[str, str]] = {
    "on": ("#0072b2", "o"),
    "off": ("#444444", "s"),
    "reset": ("#009e73", "^"),
    "carried": ("#d55e00", "D"),
    "baseline": ("#cc79a7", "v"),
}
ARM_LABELS = {
    "on": "TTT on",
    "off": "TTT off",
    "reset": "TTT reset every {reset}",
    "carried": "TTT carried over from another recording",
    "baseline": "baseline",
}
STREAM_TITLES = {
    "text": "text, with padding",
    "words": "text, words only",
    "first_codebook": "first codebook",
    "other_codebooks": "other codebooks",
}
MEASURE_LABELS = {
    "entropy": "entropy of the first codebook\n(share of the largest possible)",
    "modal_share": "share of the most frequent\ncode of the first codebook",
    "padding_share": "share of padding in the text",
    "silence_share": "share of silence",
    "repeat_rate": "share of repeated segments",
}
_TICKS_SEC = (1, 3, 10, 30, 60, 180, 600, 1800, 3600, 10800, 36000)
_FEWER_TICKS_SEC = (1, 10, 60, 600, 3600, 36000)
_OFF_SCALE = 1.5
"""The loss of guessing is drawn where it is no farther from the curves than this times their
span; else it is named at the edge, or the curves would be flat."""


def arm_label(arm: str, results: Json) -> str:
    return ARM_LABELS[arm].format(reset=_duration(results["reset_sec"]))


def position_figure(results: Json) -> Figure:
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
    _time_axis(axes[0, 0], results["longest_sec"])
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
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_guessing(axes: Axes, guessing: float) -> None:
    """The loss of a model that takes all tokens for equally likely: ln(vocabulary)."""
    low, high = axes.get_ylim()
    span = high - low
    label = f"guessing: ln {round(math.exp(guessing))} = {guessing:.2f}"
    style: Json = {"color": "#999999", "linewidth": 1, "linestyle": (0, (4, 3))}
    small: Json = {"fontsize": 8, "color": "#666666", "transform": axes.get_yaxis_transform()}
    if guessing <= high + _OFF_SCALE * span:
        axes.axhline(guessing, **style)
        axes.text(0.99, guessing, label, ha="right", va="bottom", **small)
        axes.set_ylim(low, max(high, guessing + 0.12 * span))
    else:
        top = high + 0.12 * span
        axes.set_ylim(low, top)
        axes.text(0.99, top, f"{label} ↑ (off the scale)", ha="right", va="top", **small)


def _mark_window(axes: Axes, results: Json, *, named: bool) -> None:
    window_sec = results["attention_window_sec"]
    if window_sec >= results["longest_sec"]:
        return
    axes.axvline(window_sec, color="#bbbbbb", linewidth=1, linestyle=(0, (1, 2)), zorder=0)
    if named:
        axes.annotate(
            f"attention sees {_duration(window_sec)}",
            (window_sec, 0),
            xycoords=("data", "axes fraction"),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=8,
            color="#666666",
        )


def _time_axis(axes: Axes, longest_sec: float) -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    known = _TICKS_SEC if high / low < 300 else _FEWER_TICKS_SEC
    ticks = [float(tick) for tick in known if low <= tick <= high] or [longest_sec]
    axes.set_xticks(ticks, [_duration(tick) for tick in ticks])
    axes.minorticks_off()


def _duration(duration_sec: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if duration_sec >= size:
            return f"{duration_sec / size:.3g} {unit}"
    return f"{duration_sec:.3g} s"


def pairs_figure(results: Json) -> Figure:
    """Accuracy of every group and of all, with intervals, beside chance."""
    from matplotlib.figure import Figure

    groups = {f"all ({results['all']['num_scored']})": results["all"]}
    if len(results["groups"]) > 1:
        by_accuracy = sorted(
            results["groups"].items(), key=lambda item: -(item[1]["accuracy"]["value"] or 0)
        )
        groups |= {f"{name} ({group['num_scored']})": group for name, group in by_accuracy}
    figure = Figure(figsize=(8, 1.2 + 0.34 * len(groups)), layout="constrained")
    axes = figure.subplots()
    for row, group in enumerate(groups.values()):
        accuracy = group["accuracy"]
        if accuracy["value"] is not None:
            color = "#222222" if row == 0 else "#0072b2"
            axes.plot([accuracy["low"], accuracy["high"]], [row, row], color=color, linewidth=2)
            axes.plot(accuracy["value"], row, "o", color=color, markersize=6)
            axes.text(1.03, row, f"{accuracy['value']:.3f}", va="center", fontsize=9)
    axes.axvline(0.5, color="#999999", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlim(0, 1.01)
    axes.set_xlabel("accuracy (dashed: chance), with its 95 % interval")
    _plain(axes)
    return figure


def health_figure(results: Json, vocabulary: Mapping[str, int]) -> Figure:
    """Every measure of the continuations beside that of the recordings."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    alarming = {alarm["measure"] for alarm in results["alarms"]}
    for row, name in enumerate(MEASURES):
        scale = math.log(vocabulary["first_codebook"]) if name == "entropy" else 1.0
        color = "#c62828" if name in alarming else "#0072b2"
        for kind, offset, shade in (("generated", -0.14, color), ("recorded", 0.14, "#777777")):
            estimate = results["measures"][name][kind]
            face = shade if kind == "generated" else "white"
            if estimate["low"] is not None:
                ends = [estimate["low"] / scale, estimate["high"] / scale]
                axes.plot(ends, [row + offset] * 2, color=shade, linewidth=1.8)
            axes.plot(
                estimate["value"] / scale, row + offset, "o", color=shade, markerfacecolor=face
            )
    axes.set_yticks(range(len(MEASURES)), [MEASURE_LABELS[name] for name in MEASURES])
    axes.set_ylim(len(MEASURES) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("share, with its 95 % interval", fontsize=9)
    _plain(axes)
    marks: Json = {"marker": "o", "linewidth": 1.8}
    handles = [
        Line2D([], [], color="#0072b2", label="continuations", **marks),
        Line2D([], [], color="#777777", markerfacecolor="white", label="recordings", **marks),
    ]
    if alarming:
        handles.append(Line2D([], [], color="#c62828", label="continuations, alarm", **marks))
    figure.legend(handles=handles, loc="outside lower center", frameon=False, ncols=3, fontsize=9)
    return figure


def _plain(axes: Axes) -> None:
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(left=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def to_svg(figure: Figure) -> str:
    """The figure as an element to put into a page."""
    import matplotlib

    target = io.StringIO()
    # The salt makes ids, and so the page, the same for the same results.
    with matplotlib.rc_context({"svg.hashsalt": "moshi-ttt"}):
        figure.savefig(target, format="svg", metadata={"Date": None})
    svg = target.getvalue()
    return svg[svg.index("<svg") :]
