"""A person is shown the memory: two transcripts side by side, answers, sounds, a picture."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from finetune.demo.memory import ARMS, Arm, Memory, Reply, Shown
from finetune.kept import write_wav
from finetune.report import COLORS, MUTED, PICTURE, save_png, tidy
from finetune.spoken import SAMPLE_RATE_HZ

LABELS: dict[Arm, str] = {"on": "with TTT", "off": "without TTT"}
PICTURE_NAME = "fast_weights.png"
WIDTH = 80
"""Of the tables, in columns of a terminal."""
_REPLIES: dict[Reply, str] = {
    "repeated": "had repeated the fact",
    "misheard": "had repeated something else",
    "silent": "had only heard the fact",
}


def sound_name(arm: Arm) -> str:
    """Return the name of the recording with TTT, or without."""
    return f"{LABELS[arm].replace(' ', '_').lower()}.wav"


def transcripts(memory: Memory) -> Table:
    """Return the first dialogue, line by line as the user speaks, with what each Moshi said."""
    table = _table()
    table.add_column("sec", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("the user", ratio=1)
    for arm in ARMS:
        table.add_column(f"Moshi {LABELS[arm]}", ratio=1)
    for start_sec, mark, text, said in _lines(memory):
        moshi = [said[arm] for arm in ARMS]
        table.add_row(f"{start_sec:.0f}", mark, text, *moshi, style="bold" if mark else None)
    return table


def _lines(memory: Memory) -> Iterator[tuple[float, str, str, dict[Arm, str]]]:
    """Yield when a turn of the user begins, whether he tells or asks, what he says, and what Moshi
    begins to say before his next turn."""
    shown = memory.shown
    marks = dict.fromkeys((at_sec for at_sec, _ in shown.told_sec), "tells")
    marks |= dict.fromkeys((asked.asked_sec for asked in memory.asked[0]), "asks")
    turns = [(0.0, ""), *shown.user, (float("inf"), "")]
    for (start_sec, text), (end_sec, _) in pairwise(turns):
        said: dict[Arm, str] = {
            arm: " ".join(
                words for at_sec, words in shown.moshi[arm] if start_sec <= at_sec < end_sec
            )
            for arm in ARMS
        }
        if text or any(said.values()):
            # A turn begins at a whole sample, an exchange in between.
            mark = next((m for at_sec, m in marks.items() if abs(at_sec - start_sec) < 1e-3), "")
            yield start_sec, mark, text, said


def answers(memory: Memory) -> Table:
    """Return the facts of the first dialogue, and what was answered when they were asked for."""
    table = _table()
    table.add_column("the user told", ratio=3)
    table.add_column("asked after", justify="right", no_wrap=True)
    for arm in ARMS:
        table.add_column(LABELS[arm], ratio=2)
    for asked in memory.asked[0]:
        table.add_row(
            asked.fact.sentence,
            f"{asked.asked_sec - asked.told_sec:.0f} s",
            *(
                f"{asked.said[arm] or 'no answer'}: {'right' if asked.is_right(arm) else 'wrong'}"
                for arm in ARMS
            ),
        )
    return table


def accuracy(memory: Memory) -> Table:
    """Return how many questions of all dialogues were answered rightly, by what Moshi had said when
    the fact was told."""
    table = _table()
    table.add_column("right answers, where Moshi", ratio=2)
    for arm in ARMS:
        table.add_column(LABELS[arm], justify="right", ratio=1)
    for reply, label in _REPLIES.items():
        counts = [memory.count(arm, reply) for arm in ARMS]
        table.add_row(label, *(f"{right} of {total}" for right, total in counts))
    counts = [memory.count(arm) for arm in ARMS]
    together = [f"{right} of {total}, {right / max(1, total):.0%}" for right, total in counts]
    table.add_row("together", *together, style="bold")
    return table


def _table() -> Table:
    return Table(width=WIDTH, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def write_memory(memory: Memory, folder: Path) -> None:
    """Write the sounds of the first dialogue and its picture into `folder`."""
    for arm in ARMS:
        sound = memory.shown.audio[arm].clamp(-1, 1)
        write_wav(folder / sound_name(arm), sound.T.numpy(), SAMPLE_RATE_HZ)
    draw_fast_weights(memory, folder / PICTURE_NAME)


def draw_fast_weights(memory: Memory, out: Path) -> None:
    """Draw what the fast weights did in the first dialogue, over its facts and questions and what
    attention reaches from each question."""
    from matplotlib.figure import Figure

    shown, asked = memory.shown, memory.asked[0]
    figure = Figure(figsize=(9, 6), **PICTURE)
    weights, facts = figure.subplots(2, 1, sharex=True, height_ratios=(1.2, 1))
    for color, (layer, change) in zip(COLORS * 9, shown.changes.items(), strict=False):
        weights.step(
            shown.change_sec, change, where="post", color=color, label=f"layer {layer}", lw=1.8
        )
    weights.set_yscale("log")
    weights.set_ylabel("change of the fast weights\n‖S‖ / ‖W0‖")
    weights.set_title("What TTT wrote while Moshi listened", loc="left")
    for start_sec, _ in shown.told_sec:
        weights.axvline(start_sec, color=MUTED, lw=0.8, ls=(0, (1, 2)), zorder=0)
    weights.legend(frameon=False, ncols=len(shown.changes), loc="lower right")
    tidy(weights)

    rows = {fact: row for row, (_, fact) in enumerate(reversed(shown.told_sec))}
    starts_sec = {fact: start_sec for start_sec, fact in shown.told_sec}
    for number, question in enumerate(asked):
        row = rows[question.fact]
        since_told = [starts_sec[question.fact], question.asked_sec]
        facts.plot(since_told, [row, row], color=MUTED, lw=0.8, zorder=1)
        start_sec = max(0.0, question.asked_sec - memory.reach_sec)
        facts.plot(
            [start_sec, question.asked_sec], [row, row], color=COLORS[5], lw=9, alpha=0.45,
            solid_capstyle="butt", label="" if number else "what attention reaches when asked",
        )  # fmt: skip
        facts.text(question.asked_sec + 1.0, row, _verdict(question.said), va="center", fontsize=8)
    told = [(at, rows[fact]) for at, fact in shown.told_sec]
    facts.plot(*zip(*told, strict=True), "o", color=COLORS[0], label="told")
    points = [(question.asked_sec, rows[question.fact]) for question in asked]
    if points:
        facts.plot(*zip(*points, strict=True), "D", color=COLORS[1], label="asked")
    facts.set_yticks(list(rows.values()), [fact.sentence for fact in rows])
    facts.set_ylim(-0.7, len(rows) - 0.3)
    facts.set_xlim(0, _end_sec(shown) * 1.16)
    facts.set_xlabel("seconds")
    figure.legend(
        *facts.get_legend_handles_labels(), frameon=False, ncols=3, loc="outside lower left"
    )
    tidy(facts, grid="x")
    save_png(figure, out)


def _verdict(said: dict[Arm, str | None]) -> str:
    return "\n".join(f"{LABELS[arm]}: {said[arm] or '–'}" for arm in ARMS)


def _end_sec(shown: Shown) -> float:
    return shown.audio["on"].shape[-1] / SAMPLE_RATE_HZ
