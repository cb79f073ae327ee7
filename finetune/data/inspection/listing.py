"""Checks of a list of recordings, which no single one of them shows."""

import os
import unicodedata
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import accumulate
from pathlib import Path
from typing import Protocol, TypeVar

from finetune.data.inspection.copies import copies
from finetune.data.inspection.findings import Finding
from finetune.errors import counted

_TOUCHING_SEC = 0.01
"""Parts that overlap by no more than this only meet: their times may be rounded."""


class Listed(Protocol):
    """A recording, by what a list says of it."""

    @property
    def origin(self) -> str: ...

    @property
    def location(self) -> str: ...

    @property
    def part(self) -> tuple[str, float, float]: ...

    @property
    def title(self) -> str: ...

    @property
    def audio_files(self) -> tuple[Path, ...]: ...

    def moved(self, places: Mapping[Path, Path]) -> "Listed": ...


_Listed = TypeVar("_Listed", bound=Listed)


def inspect_listing(
    recordings: Sequence[Listed],
    evaluation: Sequence[Listed] = (),
    digests: Mapping[Listed, str] | None = None,
) -> list[Finding]:
    """Inspect the recordings of a source, or of all training data, together.

    Args:
        recordings: what trains.
        evaluation: what is evaluated; empty: that is not looked at.
        digests: of their audio, where it was listened to; the same audio under two names is found
            by it.
    """
    files = {r: os.path.realpath(r.location) for r in recordings}
    heard = {r: digest for r, digest in (digests or {}).items() if digest}
    return [
        *_listed_twice(recordings, files),
        *_same_audio(recordings, files, heard),
        *_other_unicode_forms(recordings),
        *_evaluated_and_trained(recordings, evaluation, heard),
    ]


def _listed_twice(recordings: Sequence[Listed], files: Mapping[Listed, str]) -> Iterator[Finding]:
    times = Counter(files[r] for r in recordings)
    again = {file: number for file, number in times.items() if number > 1}
    if again:
        first = next(r for r in recordings if files[r] in again)
        yield Finding(
            "listed-twice",
            "warning",
            f"{_number(again)} listed more than once, and {_count(again)} as often ("
            f"{first.title} {again[files[first]]} times, first in {first.origin})",
            "list each once, or give a weight to what is to come more often",
        )


def _same_audio(
    recordings: Sequence[Listed], files: Mapping[Listed, str], heard: Mapping[Listed, str]
) -> Iterator[Finding]:
    of_digest: dict[str, dict[str, Listed]] = {}
    for recording in recordings:
        if digest := heard.get(recording):
            of_digest.setdefault(digest, {}).setdefault(files[recording], recording)
    same = [list(copies.values()) for copies in of_digest.values() if len(copies) > 1]
    if same:
        first, second = same[0][:2]
        yield Finding(
            "same-audio",
            "warning",
            f"{_number(same)} there under more than one name, sample by sample the same "
            f"({first.title} and {second.title}, first in {second.origin})",
            "list one of them, or give a weight to what is to come more often",
        )


def _other_unicode_forms(recordings: Sequence[Listed]) -> Iterator[Finding]:
    by_form: dict[str, set[str]] = {}
    for recording in recordings:
        name = recording.title
        if not name.isascii():
            by_form.setdefault(unicodedata.normalize("NFC", name), set()).add(name)
    same = {form: names for form, names in by_form.items() if len(names) > 1}
    if same:
        yield Finding(
            "same-name-in-unicode",
            "warning",
            f"{_number(same)} listed under names that look the same and differ in their Unicode "
            f"form alone (for example {next(iter(same))})",
            "check whether they are copies of one recording; rename one of them, or remove a line",
        )


def _evaluated_and_trained(
    recordings: Sequence[Listed],
    evaluation: Sequence[Listed],
    heard: Mapping[Listed, str],
) -> Iterator[Finding]:
    both = in_training(recordings, evaluation, heard)
    if both:
        total = num_different(evaluation)
        yield Finding(
            "evaluation-in-training",
            "warning",
            f"{len(both)} of {total} recordings of data.eval_data are in data.train_data as well, "
            f"whole, in part or as a copy ({both[0].title}, by {both[0].origin}), so the "
            "evaluation does not show how well other speech is modeled",
            "take them out of data.train_data (a folder stands for all .jsonl files in it)",
        )


def in_training(
    recordings: Sequence[Listed],
    evaluation: Sequence[_Listed],
    heard: Mapping[Listed, str] | None = None,
) -> list[_Listed]:
    """Return the recordings of `evaluation`, each once, that are in what trains, whole or in part,
    also where that lies in other files of the same bytes.

    Args:
        recordings: what trains.
        heard: digests of their audio, where it was listened to.
    """
    heard = heard or {}
    trained = _Parts(recordings)
    trained_audio = {heard[r] for r in recordings if r in heard}
    originals = copies(
        (file for r in evaluation for file in r.audio_files),
        (file for r in recordings for file in r.audio_files),
    )
    both = {
        os.path.realpath(r.location): r
        for r in evaluation
        if r in trained
        or r.moved(originals) in trained
        or (r in heard and heard[r] in trained_audio)
    }
    return list(both.values())


def num_different(recordings: Iterable[Listed]) -> int:
    """Return how many recordings there are, each counted once, as `in_training` does."""
    return len({os.path.realpath(r.location) for r in recordings})


class _Parts:
    """Parts of recordings: `r in parts` says whether one of them overlaps with r."""

    def __init__(self, recordings: Iterable[Listed]) -> None:
        parts: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for recording in set(recordings):
            whole, start, end = recording.part
            parts[os.path.realpath(whole)].append((start, end))
        self._starts: dict[str, list[float]] = {}
        self._ends: dict[str, list[float]] = {}
        """At each place the latest end of the parts up to there, which begin in this order."""
        for whole, spans in parts.items():
            spans.sort()
            self._starts[whole] = [start for start, _ in spans]
            self._ends[whole] = list(accumulate((end for _, end in spans), max))

    def __contains__(self, recording: Listed) -> bool:
        whole, start, end = recording.part
        whole = os.path.realpath(whole)
        before = bisect_left(self._starts.get(whole, ()), end - _TOUCHING_SEC)
        return before > 0 and self._ends[whole][before - 1] > start + _TOUCHING_SEC


def _number(some: Sized) -> str:
    return counted(len(some), "recording is", "recordings are")


def _count(some: Sized) -> str:
    return "counts" if len(some) == 1 else "count"
