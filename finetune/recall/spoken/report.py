"""Results of the spoken experiment as tables and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.data import FRAME_RATE_HZ
from finetune.recall.arms import ARMS
from finetune.recall.report import accuracies, interval
from finetune.recall.spoken.presets import SpokenPreset
from finetune.report import (
    ALARM,
    DARK,
    MUTED,
    PICTURE,
    Table,
    line_style,
    markdown_lines,
    save_png,
    tidy,
    time_axis,
)
from finetune.spoken import KINDS

Result = dict[str, Any]
_PARTS = {
    "trained_length": "",
    "nothing_written": ", nothing written",
    "reset": ", reset before the question",
    "another_past": ", another dialogue's past",
}


def lines(preset: SpokenPreset, results: Sequence[Result]) -> list[str]:
    """Return the report, in Markdown."""
    data, model = preset.data, preset.model
    dialogues = data.dialogues
    sizes = sorted({result["parameters"] for result in results})
    seeds = ", ".join(str(seed) for seed in sorted({result["seed"] for result in results}))
    tuned = any(ARMS[result["arm"]].is_finetuned for result in results)
    found = [
        f"Recall of spoken facts: a user tells {dialogues.num_facts} facts "
        f"({', '.join(data.bank.kinds)}), and asks for each once, in random order, in talks of "
        f"{dialogues.num_frames / FRAME_RATE_HZ:.0f} s. Questions come more than "
        f"{dialogues.reach_frames / FRAME_RATE_HZ:.1f} s after the fact's last mention, which is "
        f"as far as {model.num_layers} windows of {model.context} frames reach. Chance is "
        f"{_chance(preset):.3f}; always the oldest fact not yet asked for is right "
        f"{results[0]['queue']:.2f} of the time. {sizes[0] / 1e6:.3g} to {sizes[-1] / 1e6:.3g} "
        f"million parameters, {preset.num_steps} steps of {preset.batch_size} talks"
        + (f", and {preset.finetune_steps} more of the fine-tuned" if tuned else "")
        + f". Seeds {seeds}.",
        "",
        'The value\'s token is the likeliest of all, by teacher forcing. "Moshi": it had repeated '
        'the fact; "user": only the user\'s audio had it.',
        "",
        *_memory_table(results),
        "",
        "Moshi speaks on its own, and the first value after a question counts:",
        "",
        *_free_table(results),
        "",
        *_rest_table(results),
    ]
    longer = _longer_table(results)
    if longer:
        found += ["", "On longer talks, with the same number of facts:", "", *longer]
    return found


def _values(summaries: Sequence[dict[str, Any]]) -> str:
    return accuracies([summary["accuracy"] for summary in summaries])


def _interval(summaries: Sequence[dict[str, Any]]) -> str:
    return interval([summary["accuracy"] for summary in summaries])


def _lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return markdown_lines(Table(columns=columns, rows=rows))


def _arms(results: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result["arm"], []).append(result)
    return found


def _memory_table(results: Sequence[Result]) -> list[str]:
    rows = []
    for arm, group in _arms(results).items():
        for part, suffix in _PARTS.items():
            measured = [result[part] for result in group if part in result]
            if measured:
                row = [arm + suffix]
                for speaker in ("moshi", "user"):
                    summaries = [each[speaker] for each in measured]
                    row += [_values(summaries), _interval(summaries)]
                rows.append(row)
    return _lines(["arm", "Moshi", "95 % intervals", "user", "95 % intervals"], rows)


def _free_table(results: Sequence[Result]) -> list[str]:
    columns = (
        "moshi", "user", "right name", "right, if the name is", "no value", "repeated rightly",
    )  # fmt: skip
    rows = [
        [arm, *(_values([result["free"][c] for result in group]) for c in columns)]
        for arm, group in _arms(results).items()
        if all("free" in result for result in group)
    ]
    return _lines(["arm", "Moshi", "user", *columns[2:]], rows)


def _rest_table(results: Sequence[Result]) -> list[str]:
    rows = []
    for arm, group in _arms(results).items():
        parts = [result["trained_length"] for result in group]
        rows.append(
            [
                arm,
                *(_values([p[n] for p in parts]) for n in ("known pairs", "new pairs", "hearing")),
                *(
                    ", ".join(f"{p[name]:.2f}" for p in parts)
                    for name in ("words_loss", "audio_loss")
                ),
            ]
        )
    head = ["arm", "known pairs", "new pairs", "value repeated", "words (nats)", "audio (nats)"]
    return _lines(head, rows)


def _longer_table(results: Sequence[Result]) -> list[str]:
    rows = []
    for arm, group in _arms(results).items():
        for times in group[0]["longer"]:
            parts = [result["longer"][times] for result in group]
            rows.append(
                [
                    arm,
                    times,
                    f"{parts[0]['mean_distance_sec'] / 60:.1f}",
                    _values([p["moshi"] for p in parts]),
                    _values([p["user"] for p in parts]),
                ]
            )
    head = ["arm", "times the length", "minutes from fact to question", "Moshi", "user"]
    return _lines(head, rows) if rows else []


def plot(preset: SpokenPreset, results: Sequence[Result], path: Path) -> None:
    """Draw accuracy by the time from fact to question, on and beyond the trained length, into a
    PNG.

    Raises:
        UserError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.2), **PICTURE)
    axes = figure.subplots()
    for place, (arm, group) in enumerate(_arms(results).items()):
        for result in group:
            label = arm if result is group[0] else None
            axes.plot(*_distances(result), marker=".", label=label, **line_style(place))
    axes.axhline(_chance(preset), color=MUTED, linewidth=1, linestyle=":", label="chance")
    trained_sec = preset.data.dialogues.num_frames / FRAME_RATE_HZ
    reach_sec = preset.data.dialogues.reach_frames / FRAME_RATE_HZ
    axes.axvline(trained_sec, color=DARK, linewidth=1, linestyle="--", label="length in training")
    axes.axvline(reach_sec, color=ALARM, linewidth=1, label="attention ends here")
    axes.set_title("Values said rightly, of facts that were told", loc="left")
    axes.set_xlabel("from the fact to the question")
    axes.set_ylim(-0.03, 1.03)
    tidy(axes)
    time_axis(axes, reach_sec)
    axes.legend(frameon=False, bbox_to_anchor=(1.02, 1.0), loc="upper left")
    save_png(figure, path)


def _chance(preset: SpokenPreset) -> float:
    """Return how often a guess among the values of a kind is right."""
    return 1 / len(KINDS[preset.data.bank.kinds[0]].values)


def _distances(result: Result) -> tuple[list[float], list[float]]:
    """Return seconds from fact to question, and accuracy."""
    points = [
        (summary["mean_distance_sec"], summary["accuracy"][0])
        for summary in result["trained_length"]["by_distance"].values()
        if summary["accuracy"]
    ]
    points += [
        (each["mean_distance_sec"], each["all"]["accuracy"][0])
        for each in result["longer"].values()
    ]
    return [x for x, _ in points], [y for _, y in points]
