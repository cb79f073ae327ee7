"""The picture of the health of generated speech."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from finetune.evaluation.tasks.base import Found, Json
from finetune.evaluation.tasks.health.measure import MEASURES
from finetune.report import ALARM, COLORS, MUTED, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURE_LABELS = {
    "entropy": "entropy of the first codebook\n(share of the largest possible)",
    "modal_share": "share of the most frequent\ncode of the first codebook",
    "padding_share": "share of padding in the text",
    "silence_share": "share of silence",
    "repeat_rate": "share of repeated segments",
}


def health_figure(results: Found, vocabulary: Mapping[str, int]) -> Figure:
    """Every measure of the continuations beside that of the recordings."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    alarming = {alarm["measure"] for alarm in results["alarms"]}
    for row, name in enumerate(MEASURES):
        scale = math.log(vocabulary["first_codebook"]) if name == "entropy" else 1.0
        color = ALARM if name in alarming else COLORS[0]
        for kind, offset, shade in (("generated", -0.14, color), ("recorded", 0.14, MUTED)):
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
    tidy(axes, grid="x")
    marks: Json = {"marker": "o", "linewidth": 1.8}
    handles = [
        Line2D([], [], color=COLORS[0], label="continuations", **marks),
        Line2D([], [], color=MUTED, markerfacecolor="white", label="recordings", **marks),
    ]
    if alarming:
        handles.append(Line2D([], [], color=ALARM, label="continuations, alarm", **marks))
    figure.legend(handles=handles, loc="outside lower center", frameon=False, ncols=3, fontsize=9)
    return figure
