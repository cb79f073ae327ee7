"""Statistics say how much there is in a data set, and of what: `moshi-ttt data stats`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from finetune.data import FRAME_RATE_HZ, FileProblem, Recording, Word
from finetune.errors import UserError, counted
from finetune.monitoring import console
from finetune.recordings.annotate import SPEAKERS
from finetune.recordings.encoder import WordStart, text_encoder
from finetune.recordings.files import listed
from finetune.recordings.listing import list_data
from finetune.recordings.options import STATS, StatsOptions
from finetune.recordings.work import do_all
from finetune.report import COLORS, save_png, tidy

_MAX_PAUSE_SEC = 0.5
"""Words of a speaker this close belong together: speech goes on between them."""


@dataclass(frozen=True)
class Amounts:
    """Amounts in one recording, of Moshi and of all others; times in seconds.

    overlap_sec: both speak.
    num_tokens: of Moshi's words, -1: not known. num_lost: those of them that find no frame.
    """

    duration_sec: float
    speech_sec: tuple[float, float]
    overlap_sec: float
    num_words: tuple[int, int]
    num_tokens: int = -1
    num_lost: int = 0


@dataclass
class Statistics:
    """Statistics of a data set."""

    each: list[Amounts]
    problems: list[str] = field(default_factory=list)

    def total(self, name: str) -> np.ndarray:
        """Return the sum of a quantity over all recordings."""
        return np.sum([getattr(each, name) for each in self.each], axis=0)

    @property
    def has_tokens(self) -> bool:
        return bool(self.each) and all(each.num_tokens >= 0 for each in self.each)


def describe_data(options: StatsOptions, overrides: Mapping[str, Any]) -> Iterator[str]:
    """Show a table of what is in a data set, and draw it. Yields lines to print.

    Raises:
        UserError: nothing is there, or no recording can be read.
    """
    listing = list_data(options.data, overrides)
    tokenizer = options.tokenizer or listing.tokenizer
    if tokenizer is not None:
        text_encoder(tokenizer, listing.word_start)  # what is wrong with it is said once, and here
    statistics = Statistics([], [f"{origin}: {problem}" for origin, problem in listing.problems])
    work = partial(measure, tokenizer=tokenizer, word_start=listing.word_start)
    for done in do_all(work, listing.all, title="measuring", workers=options.workers):
        if done.result is not None:
            statistics.each.append(done.result)
        else:
            statistics.problems.append(f"{done.job.origin}: {done.problem}")
    if statistics.problems:
        yield f"left out {listed(statistics.problems)}"
    if not statistics.each:
        raise UserError(f"{options.data} has no recording that can be read.")
    console.print(table_of(statistics))
    if options.out is not None:
        draw(statistics, options.out)
        yield f"wrote {options.out}"


def measure(
    recording: Recording, *, tokenizer: Path | None = None, word_start: WordStart = "auto"
) -> Amounts:
    """Return what is in a recording.

    Raises:
        FileProblem: it or its transcript cannot be read.
    """
    found = recording.inspect()
    unreadable = [each for each in found.findings if each.severity == "error"]
    if unreadable:
        raise FileProblem(unreadable[0].message, unreadable[0].remedy, code=unreadable[0].code)
    words = [word for word in recording.read_words() if word.end_sec > word.start_sec]
    sides = [
        [w for w in words if (w.speaker == SPEAKERS[0]) == is_main] for is_main in (True, False)
    ]
    spoken = [_speech(side) for side in sides]
    num_tokens, num_lost = -1, 0
    if tokenizer is not None:
        encoder = text_encoder(tokenizer, word_start)
        num_tokens = sum(len(encoder.tokenize(word.text)) for word in sides[0])
        num_frames = int(found.duration_sec * FRAME_RATE_HZ)
        stream = encoder.stream(words, 0, num_frames)
        special = {encoder.text_padding_id, encoder.end_of_text_padding_id}
        num_lost = num_tokens - sum(token not in special for token in stream)
    return Amounts(
        found.duration_sec,
        (_length(spoken[0]), _length(spoken[1])),
        _length(spoken[0]) + _length(spoken[1]) - _length(_union([*spoken[0], *spoken[1]])),
        (len(sides[0]), len(sides[1])),
        num_tokens,
        num_lost,
    )


Spans = list[tuple[float, float]]


def _speech(words: Sequence[Word]) -> Spans:
    """Return when a speaker speaks: words, and short pauses between them."""
    return _union([(word.start_sec, word.end_sec) for word in words], _MAX_PAUSE_SEC)


def _union(spans: Spans, gap_sec: float = 0.0) -> Spans:
    joined: Spans = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1] + gap_sec:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _length(spans: Spans) -> float:
    return sum(end - start for start, end in spans)


def table_of(statistics: Statistics) -> Table:
    """Return the totals, for a terminal."""
    duration_sec = float(statistics.total("duration_sec"))
    speech_sec, num_words = statistics.total("speech_sec"), statistics.total("num_words")
    lengths = np.array([each.duration_sec for each in statistics.each])
    table = Table(show_header=False, show_edge=False, pad_edge=False)
    rows = [
        ("recordings", f"{len(statistics.each)}"),
        ("hours", f"{duration_sec / 3600:.2f}"),
        (
            "length",
            f"{lengths.min():.1f} to {lengths.max():.1f} s, median {np.median(lengths):.1f} s",
        ),
    ]
    for name, speech, words in zip(("Moshi", "the user"), speech_sec, num_words, strict=True):
        rate = f"{words / (speech / 60):.0f} words a minute of it" if speech else "no words"
        rows.append((f"{name} speaks", f"{speech / duration_sec:.1%} of the time, {rate}"))
    rows.append(("both speak", f"{statistics.total('overlap_sec') / duration_sec:.1%} of the time"))
    silent = sum(not each.num_words[0] for each in statistics.each)
    if silent:
        rows.append(("Moshi silent", f"in {counted(silent, 'recording')}"))
    if statistics.has_tokens:
        tokens, lost = int(statistics.total("num_tokens")), int(statistics.total("num_lost"))
        pace = tokens / speech_sec[0] if speech_sec[0] else 0.0
        share = lost / tokens if tokens else 0.0
        rows.append(
            (
                "text tokens",
                f"{tokens}: {pace:.1f} a second of Moshi's speech, of {FRAME_RATE_HZ} that there "
                f"are frames for; {share:.1%} find no frame",
            )
        )
    for row in rows:
        table.add_row(*row)
    return table


def draw(statistics: Statistics, out: Path) -> None:
    """Draw the distributions over recordings into a PNG.

    Raises:
        UserError: it cannot be written.
    """
    from matplotlib.figure import Figure

    each = statistics.each
    figure = Figure(figsize=(11, 6), dpi=110, layout="constrained")
    length, shares, overlap, rates = figure.subplots(2, 2).flat
    _histogram(length, [[e.duration_sec for e in each]], "length of a recording (s)")
    sides = [[100 * e.speech_sec[side] / e.duration_sec for e in each] for side in (0, 1)]
    _histogram(shares, sides, "share of the time that each speaks (%)", ["Moshi", "the user"])
    both = [100 * e.overlap_sec / e.duration_sec for e in each]
    _histogram(overlap, [both], "share of the time that both speak (%)")
    paces = [
        [60 * e.num_words[side] / e.speech_sec[side] for e in each if e.speech_sec[side]]
        for side in (0, 1)
    ]
    _histogram(rates, paces, "words a minute of speech", ["Moshi", "the user"])
    save_png(figure, out, STATS)


def _histogram(
    axes: Any, values: Sequence[Sequence[float]], label: str, names: Sequence[str] = ()
) -> None:
    colors = COLORS[: len(values)] if names else COLORS[2:3]
    axes.hist([list(some) for some in values], bins=20, color=colors, label=names or None)
    axes.set_xlabel(label)
    axes.set_ylabel("recordings")
    axes.yaxis.get_major_locator().set_params(integer=True)
    tidy(axes)
    if names:
        axes.legend(frameon=False)
