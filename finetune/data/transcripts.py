"""Transcripts: the words of a recording with their times."""

import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from finetune.data.problems import FileProblem
from finetune.kept import MARK
from finetune.safety import parse_json, read_text

MAIN_SPEAKER = "SPEAKER_MAIN"
USER_SPEAKER = "SPEAKER_USER"
OTHER_SPEAKER = "SPEAKER_OTHER"
"""Moshi, where a recording is read from its other side."""

_FORMAT = '{"alignments": [["word", [start_sec, end_sec], "SPEAKER_MAIN"], ...]}'
_AGAIN = f"make it again, in the form {_FORMAT}"
_MAX_TIME_SEC = 1e12
"""Far beyond any time, in any unit; with what is far beyond this, arithmetic overflows."""


class Word(NamedTuple):
    """A word is one alignment of a transcript; times from the start of the recording."""

    text: str
    start_sec: float
    end_sec: float
    speaker: str


class Transcript(NamedTuple):
    """Content of a transcript, in the order of the file."""

    words: list[Word]
    unused: frozenset[str] = frozenset()
    """Keys, and elements of alignments, that are there and mean nothing here."""


def read_transcript(path: Path) -> list[Word]:
    """Return all alignments of a transcript, as they stand in the file.

    Raises:
        FileProblem: see `load_transcript`.
    """
    return load_transcript(path).words


def load_transcript(path: Path) -> Transcript:
    """Read a transcript: UTF-8 or UTF-16, with a byte order mark or without, also gzipped.

    Raises:
        FileProblem: the file is missing, is not JSON, or does not have the expected form.
    """
    try:
        content = parse_json(read_text(path))
    except FileNotFoundError:
        remedy = (
            "make it with moshi-ttt data annotate, or write one with the word times, in the form "
            f"{_FORMAT}; an empty list means that Moshi says nothing"
        )
        if (alike := in_capitals(path)) is not None:
            remedy = f"rename {alike.name}, which is there, to {path.name}"
        raise FileProblem(
            f"transcript {path} is missing",
            remedy,
            code="transcript-missing",
        ) from None
    except OSError as error:
        raise FileProblem(
            f"transcript {path} cannot be read ({error.strerror or error})",
            "check the file and its permissions",
            code="transcript-unreadable",
        ) from None
    except ValueError as error:
        raise FileProblem(
            f"transcript {path} is not valid JSON ({error})", _AGAIN, code="transcript-malformed"
        ) from None
    return transcript_of(content, f"transcript {path}")


def in_capitals(path: Path) -> Path | None:
    """Return the file that a transcript is taken for where its ending is in capitals."""
    # Of a whole folder it would be asked for each recording that has none.
    alike = path.with_suffix(path.suffix.upper())
    return alike if alike.is_file() else None


def transcript_of(content: Any, name: str) -> Transcript:
    """Return what a transcript says, from what JSON holds.

    Args:
        name: what messages call it.

    Raises:
        FileProblem: it does not have the expected form.
    """
    if not isinstance(content, dict) or not isinstance(content.get("alignments"), list):
        raise FileProblem(
            f'{name} has no list "alignments"',
            f"it must have the form {_FORMAT}",
            code="transcript-malformed",
        )
    unused = {str(key) for key in content if key not in ("alignments", MARK)}
    words = []
    for index, entry in enumerate(content["alignments"]):
        if not _is_alignment(entry):
            raise FileProblem(
                f"{name} is malformed: alignments[{index}] is {_short(entry)}, "
                'expected ["word", [start_sec, end_sec], "SPEAKER_MAIN"]',
                _AGAIN,
                code="transcript-malformed",
            )
        text, (start_sec, end_sec), speaker = entry[:3]
        words.append(Word(text, start_sec, end_sec, speaker))
        if len(entry) > 3:
            unused.add("alignments[…][3]")
    return Transcript(words, frozenset(unused))


def shared_transcripts(transcripts: Iterable[tuple[Path, Path]], leave_out: str) -> dict[Path, str]:
    """Return what is wrong with files whose transcript is that of another as well, such as `x.wav`
    and `x.flac` in one folder, by file.

    Args:
        transcripts: files of audio, or names of codes, each with its transcript.
        leave_out: how to do without one of them, for messages.
    """
    folder = functools.cache(os.path.realpath)  # lists may name one by several paths
    first: dict[str, Path] = {}
    sharing: dict[str, list[Path]] = {}
    for file, transcript in transcripts:
        place = os.path.join(folder(transcript.parent), transcript.name)
        if first.setdefault(place, file) != file:
            sharing.setdefault(place, [first[place]]).append(file)
    problems = {}
    for place, files in sharing.items():
        by_file = {os.path.realpath(file): file for file in files}  # a link is no other file
        for file in files if len(by_file) > 1 else ():
            own = os.path.realpath(file)
            other = next(each for found, each in by_file.items() if found != own)
            problems[file] = (
                f"{file} and {other} share the transcript {place}, which can be of one of them "
                f"alone: give the other another name, or {leave_out}"
            )
    return problems


def _is_alignment(entry: Any) -> bool:
    # Asked for every word of all data at the start. moshi-finetune takes the first three elements
    # as well, whatever follows (a confidence, for example).
    return (
        isinstance(entry, list)
        and len(entry) >= 3
        and isinstance(entry[0], str)
        and isinstance(entry[1], list)
        and len(entry[1]) == 2
        and _is_time(entry[1][0])
        and _is_time(entry[1][1])
        and isinstance(entry[2], str)
    )


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and -_MAX_TIME_SEC <= value <= _MAX_TIME_SEC


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
