"""Data that a configuration names become checked recordings, cut into segments."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from finetune.config import parse_sources
from finetune.data.checks import Checks
from finetune.data.codes import ReadCodes
from finetune.data.inspection import Finding, inspect_listing, wrong_in_all
from finetune.data.layouts import Entry, list_entries, list_together
from finetune.data.reading import Reading
from finetune.data.recording import OtherSide, Recording, SegmentRef, cut
from finetune.data.store import Store
from finetune.data.text import TextEncoder
from finetune.errors import UserError, counted

logger = logging.getLogger(__name__)

_MAX_PROBLEMS_SHOWN = 20
_MAX_WARNINGS = 5
_NUM_CHECK_THREADS = 16

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class WeightedSource:
    """A weighted source is one `path[:weight]` with everything in it that can be used."""

    path: Path
    weight: float
    recordings: list[Recording]
    segments: list[SegmentRef]


class DataSet(NamedTuple):
    """A data set has all sources of a key, and how many of their entries were left out."""

    sources: list[WeightedSource]
    num_skipped: int
    segment_frames: list[int]
    """Frames of each segment that are of its recording."""

    @property
    def num_segments(self) -> int:
        return sum(len(source.segments) for source in self.sources)

    @property
    def segment_shares(self) -> list[float]:
        """Return the share of all draws that falls to each segment, by the weight of its source."""
        total = sum(source.weight for source in self.sources)
        return [
            source.weight / total / len(source.segments)
            for source in self.sources
            for _ in source.segments
        ]

    @property
    def recordings(self) -> list[Recording]:
        return [recording for source in self.sources for recording in source.recordings]

    @property
    def total_duration_sec(self) -> float:
        return sum(recording.duration_sec for recording in self.recordings)


class _Checked(NamedTuple):
    """An entry of a source after its check."""

    origin: str
    recording: Recording | None
    problems: list[str]
    warnings: list[Finding]


def load_sources(
    spec: str,
    *,
    key: str,
    num_frames: int,
    on_error: Literal["raise", "skip"],
    store: Store | None = None,
    text: TextEncoder | None = None,
    reads: ReadCodes | None = None,
    reading: Reading | None = None,
    said: set[str] | None = None,
    beside: Sequence[Recording] = (),
) -> DataSet:
    """Read and check everything that a configuration key names.

    Args:
        spec: the key's value, `path[:weight],…`.
        key: the key's dotted name, for messages.
        num_frames: length of a segment.
        store: remembers what was found, so that unchanged files are not opened again.
        text: makes tokens of the words; None: what tokens show is not looked at.
        reads: what codes the model reads; None: whether it reads these is not looked at.
        reading: what is done with the audio; None: nothing.
        said: what was warned of before, in other data of the run; it is not said again, and what
            is said here is added.
        beside: recordings of the run's other data: what has the words of one of them is broken.

    Raises:
        UserError: a path or weight is wrong, nothing usable is left, all of it is such that
            nothing would be learned right, or (`on_error="raise"`) anything at all is broken; the
            message lists the problems.
    """
    problems: list[str] = []
    everything: list[_Checked] = []
    warnings: list[tuple[str, Finding]] = []
    sources: list[WeightedSource] = []
    num_skipped = 0
    if store is not None:
        store.refresh(at_once=True)  # the other ranks have just checked their shares
    checks = Checks(store, text, reads)
    paths, weights = zip(*parse_sources(spec, key), strict=True)
    listed = list_together(paths, key, reading, beside)
    for path, weight, entries in zip(paths, weights, listed, strict=True):
        checked = _check_source(path, entries, checks, reading)
        recordings = [each.recording for each in checked if each.recording is not None]
        problems += [problem for each in checked for problem in each.problems]
        everything += checked
        warnings += [(each.origin, found) for each in checked for found in each.warnings]
        num_skipped += len(checked) - len(recordings)
        segments = [ref for recording in recordings for ref in cut(recording, num_frames)]
        sources.append(WeightedSource(path, weight, recordings, segments))
    checks.flush()
    # Of all sources together: what is listed in two of them is listed twice.
    usable = [recording for source in sources for recording in source.recordings]
    warnings += [("", found) for found in inspect_listing(usable)]

    wrong = _wrong_as_a_whole(everything)
    if problems and on_error == "raise":
        raise UserError(
            f"{_listing([*wrong, *problems])}\n"
            "Or set data.on_error=skip to train without what is broken."
        )
    if wrong:
        raise UserError(f"{key}: {_listing(wrong)}")
    said = set() if said is None else said
    _warn(_news(problems, problems, said), num_skipped, key)
    for source in sources:
        if not source.segments:
            raise UserError(
                f"{key}: no usable recording is left in {source.path}. {_listing(problems)}"
            )
    warn_of(_news(warnings, [f"{origin}: {each}" for origin, each in warnings], said), key)
    refs = (ref for source in sources for ref in source.segments)
    return DataSet(sources, num_skipped, [ref.num_valid_frames(num_frames) for ref in refs])


def check_share_of_sources(
    spec: str,
    *,
    key: str,
    store: Store,
    text: TextEncoder | None = None,
    reads: ReadCodes | None = None,
    reading: Reading | None = None,
    rank: int,
    world_size: int,
) -> None:
    """Check this rank's share of all recordings, for every rank to find in `store`.

    Problems are left to `load_sources`.
    """
    checks = Checks(store, text, reads)
    for path, _ in parse_sources(spec, key):
        share = list_entries(path, key, reading)[rank::world_size]
        _check_source(path, share, checks, reading)
    checks.flush()


def check_recordings(
    spec: str, *, key: str, text: TextEncoder | None = None, reading: Reading | None = None
) -> tuple[list[Recording], list[str]]:
    """Return all usable recordings that `spec` names, and what is wrong with each of the others.

    Raises:
        UserError: a path is wrong, or a file cannot be read or is empty.
    """
    checks = Checks(None, text)
    checked: list[_Checked] = []
    paths = [path for path, _ in parse_sources(spec, key)]
    for path, entries in zip(paths, list_together(paths, key, reading), strict=True):
        checked += _check_source(path, entries, checks, reading)
    recordings = [each.recording for each in checked if each.recording is not None]
    warn_of([(each.origin, found) for each in checked for found in each.warnings], key)
    return recordings, [problem for each in checked for problem in each.problems]


def _wrong_as_a_whole(checked: Sequence[_Checked]) -> list[str]:
    """Return what is wrong with all that can be used of a key's data."""
    usable = [each for each in checked if each.recording is not None]
    # What is read from its other side as well is judged by the side that it was made for.
    own = [each.warnings for each in usable if not isinstance(each.recording, OtherSide)]
    return [str(found) for found in wrong_in_all(own)]


def listed_recordings(spec: str, *, key: str) -> list[Recording]:
    """Return all recordings that `spec` names, as they are listed: none is opened.

    Raises:
        UserError: a path is wrong, or a list cannot be read or is empty.
    """
    sources = [list_entries(path, key) for path, _ in parse_sources(spec, key)]
    listed = [entry.recording for entries in sources for entry in entries]
    return [recording for recording in listed if recording is not None]


def warn_of(found: Sequence[tuple[str, Finding]], key: str) -> None:
    """Say what may be wrong with the data, each kind once with an example and a count.

    Args:
        found: findings, and where each of them is; nothing: in the data as a whole.
        key: the configuration's key that names the data.
    """
    of_code: dict[str, list[tuple[str, Finding]]] = {}
    for origin, finding in found:
        of_code.setdefault(finding.code, []).append((origin, finding))
    for code, all_ in of_code.items():
        origin, first = all_[0]
        more = f" The same of {len(all_) - 1} more." if len(all_) > 1 else ""
        where = f"{key}: {origin}" if origin else key
        logger.warning("%s: %s: %s. [%s]%s", where, *first[2:], code, more)


def _check_source(
    path: Path,
    entries: Sequence[Entry],
    checks: Checks,
    reading: Reading | None,
) -> list[_Checked]:
    """Check entries of a source."""
    logger.info("checking %s of %s", counted(len(entries), "recording"), path)
    with ThreadPoolExecutor(_NUM_CHECK_THREADS) as pool:
        checked = list(pool.map(lambda entry: _check(entry, checks), entries))
        if reading is None or not reading.swap_channels:
            return checked
        good = [each.recording for each in checked if each.recording is not None]
        other_sides = [Entry(each.origin, OtherSide.of(each)) for each in good]
        return checked + list(pool.map(lambda entry: _check(entry, checks), other_sides))


def _check(entry: Entry, checks: Checks) -> _Checked:
    if entry.recording is None:
        return _Checked(entry.origin, None, [f"{entry.origin}: {entry.problem}"], [])
    found = checks.inspect(entry.recording)
    problems = [f"{entry.origin}: {finding}" for finding in found.errors]
    recording = None if problems else entry.recording.lasting(found.duration_sec)
    return _Checked(entry.origin, recording, problems, found.warnings)


def _listing(problems: Sequence[str]) -> str:
    shown = "\n".join(f"  {problem}" for problem in problems[:_MAX_PROBLEMS_SHOWN])
    rest = len(problems) - _MAX_PROBLEMS_SHOWN
    more = f"\n  … and {rest} more" if rest > 0 else ""
    return f"{counted(len(problems), 'problem')} in the data:\n{shown}{more}"


def _warn(problems: Sequence[str], num_skipped: int, key: str) -> None:
    for problem in problems[:_MAX_WARNINGS]:
        logger.warning("skipped %s", problem)
    if num_skipped:
        skipped = counted(num_skipped, "recording")
        logger.warning("%s: skipped %s because of data.on_error=skip", key, skipped)


def _news(found: Sequence[_Found], texts: Sequence[str], said: set[str]) -> list[_Found]:
    """Return what is not in `said` yet by its text, and add it there."""
    news = [each for each, text in zip(found, texts, strict=True) if text not in said]
    said.update(texts)
    return news
