"""The experiment's results as tables, CSV and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.kept import write_whole
from finetune.report import PICTURE, line_style, save_png, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = dict[str, Any]
Summary = list[Any]
"""[value, low, high]; low and high may be None."""
NOTHING_WRITTEN = ", nothing written"
COLUMNS = [
    "arm", "seed", "times_the_length", "kind", "distance", "answers",
    "accuracy", "accuracy_low", "accuracy_high", "loss", "loss_low", "loss_high", "state_ratio",
]  # fmt: skip


def rows(results: Sequence[Result]) -> Iterator[dict[str, Any]]:
    """Everything measured, a row for each number with its interval."""
    for result in results:
        for part, suffix in (("trained_length", ""), ("nothing_written", NOTHING_WRITTEN)):
            if part not in result:
                continue
            found = result[part]
            where = {"arm": result["arm"] + suffix, "seed": result["seed"], "times_the_length": 1}
            for kind in ("all", "in one chunk", "straddling"):
                yield where | {"kind": kind, "distance": "all"} | _flat(found[kind])
            for distance, summary in found["by_distance"].items():
                yield where | {"kind": "all", "distance": distance} | _flat(summary)
        for times, kinds in result["longer"].items():
            for kind, summary in kinds.items():
                where = {"arm": result["arm"], "seed": result["seed"], "distance": "all"}
                yield where | {"times_the_length": int(times), "kind": kind} | _flat(summary)


def _flat(summary: dict[str, Any]) -> dict[str, Any]:
    flat = {"answers": summary["count"], "state_ratio": summary.get("state_ratio")}
    for name in ("accuracy", "loss"):
        value, low, high = summary[name] or (None, None, None)
        flat |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return flat


def arms_of(results: Sequence[Result]) -> list[str]:
    """Return the arms in their order, each once."""
    return list(dict.fromkeys(result["arm"] for result in results))


def write_csv(results: Sequence[Result], path: Path) -> None:
    """
    Raises:
        UserError: it cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows(results))
    write_whole(path, text.getvalue())


def trained_length_table(results: Sequence[Result]) -> list[str]:
    """Markdown: arms by what they answer at the trained length, a number for each seed."""
    seeds = sorted({result["seed"] for result in results})
    bins = list(results[0]["trained_length"]["by_distance"])
    lines = [
        f"| arm | accuracy, seeds {', '.join(map(str, seeds))} "
        "| 95 % intervals, lowest to highest bound over seeds | loss (nats) | within one chunk "
        f"| straddling | {' | '.join(f'{b} frames' for b in bins)} |",
        "| --- " * (6 + len(bins)) + "|",
    ]
    for name, found in _by_arm(results).items():
        cells = [
            accuracies([f["all"]["accuracy"] for f in found]),
            interval([f["all"]["accuracy"] for f in found]),
            accuracies([f["all"]["loss"] for f in found]),
            _mean([f["in one chunk"]["accuracy"] for f in found]),
            _mean([f["straddling"]["accuracy"] for f in found]),
            *(_mean([f["by_distance"][b]["accuracy"] for f in found]) for b in bins),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _by_arm(results: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result["arm"], []).append(result["trained_length"])
        if "nothing_written" in result:
            name = result["arm"] + NOTHING_WRITTEN
            found.setdefault(name, []).append(result["nothing_written"])
    return found


def longer_table(results: Sequence[Result]) -> list[str]:
    """Markdown: accuracy on longer sequences by kind, and ‖S‖ / ‖W0‖; a number for each seed."""
    lengths = sorted({int(times) for result in results for times in result["longer"]})
    if not lengths:
        return []
    results = [result for result in results if result["longer"]]
    kinds = list(results[0]["longer"][str(lengths[0])])
    lines = [
        f"| arm | times the length | {' | '.join(kinds)} | ‖S‖/‖W0‖ |",
        "| --- " * (3 + len(kinds)) + "|",
    ]
    for name in arms_of(results):
        for times in lengths:
            found = [r["longer"][str(times)] for r in results if r["arm"] == name]
            cells = [accuracies([f[kind]["accuracy"] for f in found]) for kind in kinds]
            ratios = [max(f[kind]["state_ratio"] or 0 for kind in kinds) for f in found]
            state = ", ".join(f"{r:.2f}" for r in ratios) if any(ratios) else ""
            lines.append(f"| {name} | {times} | {' | '.join(cells)} | {state} |")
    return lines


def inner_loss_table(results: Sequence[Result]) -> list[str]:
    """Markdown: what the inner loop of `linear` and `mlp` did at the start and end of training."""
    lines: list[str] = []
    for result in results:
        for label, record in zip(("first", "last"), _ends(result["curve"]), strict=True):
            layers = sorted({k.split("/")[0] for k in record if k.endswith("inner_loss_before")})
            for layer in layers:
                numbers = [
                    record[f"{layer}/{name}"]
                    for name in (
                        "effect",
                        "inner_loss_initial",
                        "inner_loss_before",
                        "inner_loss_after",
                    )
                ]
                cells = " | ".join(f"{number:.3g}" for number in numbers)
                lines.append(
                    f"| {result['arm']} | {result['seed']} | {layer} | {label} | {cells} |"
                )
    if lines:
        head = "| arm | seed | layer | step | effect | inner loss, initial | before | after |"
        lines = [head, "| --- " * 8 + "|", *lines]
    return lines


def _ends(curve: list[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    return curve[0], curve[-1]


def accuracies(summaries: Sequence[Summary | None]) -> str:
    """Return the values of seeds, one after the other."""
    return ", ".join("–" if s is None else f"{s[0]:.2f}" for s in summaries)


def _mean(summaries: Sequence[Summary | None]) -> str:
    known = [s[0] for s in summaries if s is not None]
    return f"{sum(known) / len(known):.2f}" if known else "–"


def interval(summaries: Sequence[Summary | None]) -> str:
    """The lowest and the highest bound of the seeds' intervals."""
    known = [s for s in summaries if s is not None and s[1] is not None]
    return f"{min(s[1] for s in known):.2f} to {max(s[2] for s in known):.2f}" if known else "–"


def plot(results: Sequence[Result], path: Path) -> None:
    """Accuracy by distance, over training, and on longer sequences, into a PNG.

    Raises:
        UserError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6), **PICTURE)
    by_distance, over_training, longer = figure.subplots(1, 3)
    names = arms_of(results)
    for result in results:
        label = result["arm"] if result["seed"] == results[0]["seed"] else None
        style = line_style(names.index(result["arm"])) | {"label": label, "marker": "."}
        _draw_distances(by_distance, result, style)
        curve = result["curve"]
        over_training.plot([r["step"] for r in curve], [r["accuracy"] for r in curve], **style)
        lengths = list(result["longer"])
        worst = [min(k["accuracy"][0] for k in result["longer"][t].values()) for t in lengths]
        one_chunk = result["trained_length"]["in one chunk"]["accuracy"][0]
        longer.plot([1, *map(int, lengths)], [one_chunk, *worst], **style)
    for axes, title, label in (
        (by_distance, "Accuracy by distance", "frames from the fact to the question"),
        (over_training, "Accuracy in training", "optimizer step"),
        (longer, "Longer sequences, the worst kind", "times the trained length"),
    ):
        axes.set_title(title, loc="left")
        axes.set_xlabel(label)
        axes.set_ylim(-0.03, 1.03)
        tidy(axes)
    longer.set_xscale("log", base=2)
    longer.legend(frameon=False, bbox_to_anchor=(1.02, 1.0), loc="upper left")
    save_png(figure, path)


def _draw_distances(axes: Axes, result: Result, style: dict[str, Any]) -> None:
    points = [
        (sum(map(float, name.split(" to "))) / 2, *summary["accuracy"])
        for name, summary in result["trained_length"]["by_distance"].items()
        if summary["accuracy"] is not None
    ]
    middle, value, low, high = zip(*points, strict=True)
    axes.plot(middle, value, **style)
    if None not in (*low, *high):
        axes.fill_between(middle, low, high, color=style["color"], alpha=0.15, linewidth=0)
