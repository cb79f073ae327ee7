"""The picture of the accuracy of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.evaluation.tasks.base import Found
from finetune.report import COLORS, DARK, MUTED, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def pairs_figure(results: Found) -> Figure:
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
            color = DARK if row == 0 else COLORS[0]
            axes.plot([accuracy["low"], accuracy["high"]], [row, row], color=color, linewidth=2)
            axes.plot(accuracy["value"], row, "o", color=color, markersize=6)
            axes.text(1.03, row, f"{accuracy['value']:.3f}", va="center", fontsize=9)
    axes.axvline(0.5, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlim(0, 1.01)
    axes.set_xlabel("accuracy (dashed: chance), with its 95 % interval")
    tidy(axes, grid="x")
    return figure
