"""From `data.train_data` to checked recordings, cut into segments."""

import logging
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from finetune.errors import UserError
from finetune.safety import is_recording_name, parse_json, path_problem, shown

from .checks import FileChecks
from .problems import FileProblem
from .store import Store
from .text import FRAME_RATE_HZ, MAIN_SPEAKER

logger = logging.getLogger(__name__)

_MAX_DURATION_ERROR_SEC = 0.1
_MAX_PROBLEMS_SHOWN = 20
_MAX_WARNINGS = 5
_NUM_CHECK_THREADS = 16

_WEIGHT = re.compile(r"(?P<path>.+):(?P<weight>[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)", re.IGNORECASE)


@dataclass(frozen=True)
class Recording:
    """One usable line of a `.jsonl` file."""

    path: Path
    path_as_written: str
    origin: str
    """`file:line`, for messages."""
    duration_sec: float

    @property
    def transcript_path(self) -> Path:
        return self.path.with_suffix(".json")


class SegmentRef(NamedTuple):
    """Which part of a recording: the frames from `start_frame` on."""

    recording: Recording
    start_frame: int


@dataclass(frozen=True)
class Source:
    """One `path[:weight]` with everything in it that can be used."""

    path: Path
    weight: float
    recordings: list[Recording]
    segments: list[SegmentRef]


class DataSet(NamedTuple):
    """All sources of a key, and how many of their lines were left out."""

    sources: list[Source]
    num_skipped: int

    @property
    def num_segments(self) -> int:
        return sum(len(source.segments) for source in self.sources)

    @property
    def total_duration_sec(self) -> float:
        recordings = (recording for source in self.sources for recording in source.recordings)
        return sum(recording.duration_sec for recording in recordings)


class _Line(NamedTuple):
    """One line of a `.jsonl` file after its check."""

    recording: Recording | None
    problems: list[str]
    lacks_main_speaker: bool = False


def load_sources(
    spec: str,
    *,
    key: str,
    num_frames: int,
    on_error: Literal["raise", "skip"],
    store: Store | None = None,
) -> DataSet:
    """Read and check everything that a configuration key names.

    Args:
        spec: the key's value, `path[:weight],…`.
        key: the key's dotted name, for messages.
        num_frames: length of a segment.
        store: remembers what was found, so that unchanged files are not opened again.

    Raises:
        UserError: a path or weight is wrong, nothing usable is left, or (`on_error="raise"`)
            anything at all is broken; the message lists the problems.
    """
    problems: list[str] = []
    sources: list[Source] = []
    num_skipped = num_without_main_speaker = 0
    if store is not None:
        store.refresh(at_once=True)  # the other ranks have just checked their shares
    checks = FileChecks(store)
    for path, weight in parse_sources(spec, key):
        lines = [line for file in _jsonl_files(path, key) for line in _check_file(file, checks)]
        recordings = [line.recording for line in lines if line.recording is not None]
        problems += [problem for line in lines for problem in line.problems]
        num_skipped += len(lines) - len(recordings)
        num_without_main_speaker += sum(line.lacks_main_speaker for line in lines)
        segments = [ref for recording in recordings for ref in cut(recording, num_frames)]
        sources.append(Source(path, weight, recordings, segments))
    checks.flush()

    if problems and on_error == "raise":
        raise UserError(
            f"{_listing(problems)}\nOr set data.on_error=skip to train without what is broken."
        )
    _warn(problems, num_skipped)
    for source in sources:
        if not source.segments:
            raise UserError(
                f"{key}: no usable recording is left in {source.path}. {_listing(problems)}"
            )
    if num_without_main_speaker:
        logger.warning(
            "%s: %d transcripts hold words, but none of %s: there Moshi says nothing. Check the "
            "speaker names.",
            key,
            num_without_main_speaker,
            MAIN_SPEAKER,
        )
    return DataSet(sources, num_skipped)


def check_share_of_files(spec: str, *, key: str, store: Store, rank: int, world_size: int) -> None:
    """Check this rank's share of all recordings, for every rank to find in `store`.

    Problems are left to `load_sources`.
    """
    checks = FileChecks(store)
    for path, _ in parse_sources(spec, key):
        for file in _jsonl_files(path, key):
            _check_file(file, checks, slice(rank, None, world_size))
    checks.flush()


def check_recordings(spec: str, *, key: str) -> tuple[list[Recording], list[str]]:
    """All usable recordings that `spec` names, and what is wrong with each of the others.

    Raises:
        UserError: a path is wrong, or a file cannot be read or is empty.
    """
    files = (file for path, _ in parse_sources(spec, key) for file in _jsonl_files(path, key))
    checks = FileChecks(None)
    lines = [line for file in files for line in _check_file(file, checks)]
    recordings = [line.recording for line in lines if line.recording is not None]
    return recordings, [problem for line in lines for problem in line.problems]


def parse_sources(spec: str, key: str) -> list[tuple[Path, float]]:
    """Split `path[:weight],…`. Only a number after the last colon is a weight.

    Raises:
        UserError: there is no path, or a weight is not positive and finite.
    """
    pairs = []
    for item in filter(None, (item.strip() for item in spec.split(","))):
        match = _WEIGHT.fullmatch(item)
        path, weight = (match["path"], float(match["weight"])) if match else (item, 1.0)
        if not 0 < weight < math.inf:
            raise UserError(
                f"{key}: the weight of {path} is {weight:g}, but weights must be positive "
                "numbers. Remove the source or give it a positive weight."
            )
        pairs.append((Path(path).expanduser(), weight))
    if not pairs:
        raise UserError(
            f"{key} is empty: give a .jsonl file or a folder of them, as path[:weight],…"
        )
    return pairs


def cut(recording: Recording, num_frames: int) -> list[SegmentRef]:
    """Segments of `num_frames` frames, one after the other; a last one may be shorter.

    A rest of less than one frame is left out.
    """
    num_whole_frames = math.floor(recording.duration_sec * FRAME_RATE_HZ + 1e-6)
    return [SegmentRef(recording, start) for start in range(0, num_whole_frames, num_frames)]


def _jsonl_files(path: Path, key: str) -> list[Path]:
    if path.is_dir():
        files = sorted(path.rglob("*.jsonl"))
        if not files:
            raise UserError(f"{key}: the folder {path} holds no .jsonl file.")
        return files
    if not path.is_file():
        raise UserError(
            f"{key}: {path} does not exist. Give a .jsonl file or a folder of them, optionally "
            "with a weight: path:0.5"
        )
    return [path]


def _check_file(jsonl: Path, checks: FileChecks, part: slice = slice(None)) -> list[_Line]:
    """Check all lines of a file, or part of them; blank lines do not count."""
    numbered = _numbered_lines(jsonl)[part]
    logger.info("checking %d recordings of %s", len(numbered), jsonl)
    with ThreadPoolExecutor(_NUM_CHECK_THREADS) as pool:
        return list(pool.map(lambda item: _check_line(jsonl, item[0], item[1], checks), numbered))


def _numbered_lines(jsonl: Path) -> list[tuple[int, str]]:
    try:
        texts = jsonl.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{jsonl} cannot be read as UTF-8 text: {error}") from None
    numbered = [(number, text) for number, text in enumerate(texts, 1) if text.strip()]
    if not numbered:
        raise UserError(
            f'{jsonl} is empty: it needs one line {{"path": "a.wav", "duration": 12.3}} for each '
            "recording."
        )
    return numbered


def _check_line(jsonl: Path, number: int, text: str, checks: FileChecks) -> _Line:
    origin = f"{jsonl}:{number}"
    try:
        fields = parse_json(text)
        written, promised_sec = fields["path"], fields["duration"]
        well_formed = isinstance(written, str) and type(promised_sec) in (int, float)
    except (ValueError, KeyError, TypeError):
        well_formed = False
    if not well_formed:
        problem = 'malformed line: expected {"path": "a.wav", "duration": 12.3} (seconds)'
        return _Line(None, [f"{origin}: {problem}"])
    if (wrong := path_problem(written)) is not None:
        return _Line(None, [f"{origin}: the path {wrong}"])
    if not is_recording_name(written):
        problem = (
            f"the path {shown(written)} leads out of the folder of {jsonl.name}: put that file "
            f"above the recordings, or give absolute paths"
        )
        return _Line(None, [f"{origin}: {problem}"])

    recording = Recording(jsonl.parent / written, written, origin, 0.0)
    problems: list[str] = []
    lacks_main_speaker = False
    try:
        duration_sec = checks.audio_info(recording.path).duration_sec
        _check_duration(recording.path, promised_sec, duration_sec)
        recording = Recording(recording.path, written, origin, duration_sec)
    except FileProblem as problem:
        problems.append(f"{origin}: {problem}")
    try:
        lacks_main_speaker = checks.lacks_main_speaker(recording.transcript_path)
    except FileProblem as problem:
        problems.append(f"{origin}: {problem}")
    return _Line(None if problems else recording, problems, lacks_main_speaker)


def _check_duration(path: Path, promised_sec: float, duration_sec: float) -> None:
    # Written so that a promise of NaN fails as well.
    if not abs(promised_sec - duration_sec) <= _MAX_DURATION_ERROR_SEC:
        raise FileProblem(
            f"wrong duration: the line says {promised_sec} s, but {path} lasts "
            f"{duration_sec:.3f} s: write the true duration, or check that it is the right file"
        )
    if duration_sec * FRAME_RATE_HZ < 1:
        raise FileProblem(
            f"recording {path} is shorter than one frame of {1 / FRAME_RATE_HZ} s: remove the line"
        )


def _listing(problems: Sequence[str]) -> str:
    shown = "\n".join(f"  {problem}" for problem in problems[:_MAX_PROBLEMS_SHOWN])
    rest = len(problems) - _MAX_PROBLEMS_SHOWN
    more = f"\n  … and {rest} more" if rest > 0 else ""
    number = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{number} in the data:\n{shown}{more}"


def _warn(problems: Sequence[str], num_skipped: int) -> None:
    for problem in problems[:_MAX_WARNINGS]:
        logger.warning("skipped %s", problem)
    if num_skipped:
        logger.warning("skipped %d recordings because of data.on_error=skip", num_skipped)
