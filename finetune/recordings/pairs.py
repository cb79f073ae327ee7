"""Two mono files of a dialogue, one a speaker: found by their names, and joined if wanted."""

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from finetune.data import OTHER_SPEAKER, MonoPair, Sides, inspect_audio
from finetune.errors import UserError
from finetune.kept import (
    MARK,
    Output,
    mark_of,
    require_not_read,
    write_wav,
    write_whole,
    writing,
)
from finetune.recordings.annotate import SPEAKERS
from finetune.recordings.work import RecordingError
from finetune.safety import AUDIO_SUFFIXES, all_files, find_files, parse_json

_MAX_WAV_BYTES = 2**32 - 2**16
_ID = "{id}"


@dataclass(frozen=True)
class Pair:
    """The two mono files of a dialogue, and the stereo file that can be made of them."""

    left: Path
    right: Path
    joined: Path
    overwrite: bool


@dataclass(frozen=True)
class Found:
    """A folder is found to have pairs of files, and files that are in none."""

    pairs: list[Pair]
    problems: list[str]
    """Of files that a side of the pattern names, and that are in no pair."""
    others: list[Path]
    """Audio files that neither side names; but for joined ones."""


def find_pairs(folder: Path, pattern: str, joined_dir: Path | None, overwrite: bool) -> Found:
    """Return the pairs of a folder by the names of their files, and what has no partner. Endings
    such as .wav and .WAV are the same.

    Args:
        pattern: `LEFT,RIGHT`, names from `folder` on with `{id}` in each.

    Raises:
        UserError: no such pattern, or nothing is called so.
    """
    left, right = _parse(pattern)
    problems: list[str] = []
    sides = [_by_id(folder, side, problems) for side in (left, right)]
    if not sides[0] and not sides[1]:
        raise UserError(
            f"--pair {pattern}: no file in {folder} is called so. Names start from there, as in "
            "'moshi/{id}.wav,user/{id}.wav'."
        )
    named = {path for side in sides for path in side.values()}
    made_in = joined_dir or folder / "stereo"
    pairs = []
    for name in sorted(sides[0].keys() | sides[1].keys()):
        if name in sides[0] and name in sides[1]:
            pairs.append(Pair(sides[0][name], sides[1][name], made_in / f"{name}.wav", overwrite))
        else:
            here, other = (0, right) if name in sides[0] else (1, left)
            missing = folder / other.replace(_ID, name)
            problems.append(f"{sides[here][name]} has no partner: there is no {missing}")
    audio, _ = find_files(folder, AUDIO_SUFFIXES)
    others = [path for path in audio if path not in named and not path.is_relative_to(made_in)]
    return Found(pairs, problems, others)


def _parse(pattern: str) -> tuple[str, str]:
    sides = [side.strip() for side in pattern.split(",")]
    if len(sides) != 2 or any(side.count(_ID) != 1 for side in sides) or sides[0] == sides[1]:
        raise UserError(
            f"--pair {pattern}: give two different names with a comma between them, Moshi's first, "
            "each with {id} once: '{id}_left.wav,{id}_right.wav'"
        )
    return sides[0], sides[1]


def _by_id(folder: Path, side: str, problems: list[str]) -> dict[str, Path]:
    """Return the files that one side of a pattern names, by what stands for `{id}`; what is wrong
    is added to `problems`."""
    before, after = side.split(_ID)
    stem, ending = os.path.splitext(after)
    name = re.compile(
        re.escape(before) + r"(?P<id>.+)" + re.escape(stem) + f"(?i:{re.escape(ending)})"
    )
    found: dict[str, Path] = {}
    for path in all_files(folder):
        match = name.fullmatch(path.relative_to(folder).as_posix())
        if match and not path.name.startswith("."):
            other = found.setdefault(match["id"], path)
            if other != path:
                problems.append(f"{path} is called as {other} is: give one another name")
    return found


def require_kept(pairs: Iterable[Pair]) -> None:
    """Check that no joined file would replace one that is to be joined.

    Raises:
        UserError: one would.
    """
    pairs = list(pairs)
    parts = [path for pair in pairs for path in (pair.left, pair.right)]
    require_not_read([Output(pair.joined, "--joined_dir") for pair in pairs], parts)


def join(pair: Pair) -> list[str]:
    """Write the stereo file of a pair, and its texts or transcript if both files have one.

    Samples are not changed: 16 bits stay 16 bits, everything else becomes 32-bit floats. What
    was joined from these two, as they are now, stays as it is, and gets words that are newer.
    Words that somebody has changed are never lost.

    Returns:
        what was done with such words, a line for each file.

    Raises:
        FileProblem: a file cannot be read.
        RecordingError: the two do not fit each other, or another file is in the way.
    """
    sides = Sides.of_two(pair.left, pair.right)
    info = sides.measure()
    rates = [inspect_audio(path, channels=(1,)).sample_rate_hz for path in (pair.left, pair.right)]
    if rates[0] != rates[1]:
        raise RecordingError(
            f"{pair.left} has {rates[0]} samples a second, but {pair.right} {rates[1]}: convert "
            f"one of them, as in `ffmpeg -i in.wav -ar {max(rates)} out.wav`, or leave out --join"
        )
    is_made = _is_made_already(pair)
    notes = _carry_words(pair, again=not is_made)
    if is_made:
        return notes
    samples = sides.read(0, info.num_samples, rates[0]).T.contiguous().numpy()
    _write_wav(pair, samples, rates[0])  # the last, as what says that all of it is made
    return notes


def _is_made_already(pair: Pair) -> bool:
    if not pair.joined.exists() or pair.overwrite:
        return False
    made_at = pair.joined.stat().st_mtime_ns
    if any(path.stat().st_mtime_ns > made_at for path in (pair.left, pair.right)):
        raise RecordingError(
            f"{pair.joined} is there, but is older than {pair.left.name} or {pair.right.name}: "
            "--overwrite makes it again"
        )
    if _comment_of(pair.joined) != _mark(pair):
        raise RecordingError(
            f"{pair.joined} is there, but was not joined from {pair.left} and {pair.right} in this "
            "order and as they are now: --overwrite makes it again"
        )
    return True


def _mark(pair: Pair) -> str:
    """Return the comment of a joined file: another one if its two files are others, change, or
    change places. A folder that is moved keeps its marks."""
    paths = [path.absolute() for path in (pair.left, pair.right)]
    shared = os.path.commonpath(paths)
    parts = [
        (os.path.relpath(path, shared), status.st_size, int(status.st_mtime))
        for path, status in ((path, path.stat()) for path in paths)
    ]
    # A digest, as a comment of some thousand characters is not read again.
    return f"joined by moshi-ttt, {hashlib.sha256(ascii(parts).encode()).hexdigest()}"


def _comment_of(path: Path) -> str | None:
    try:
        with soundfile.SoundFile(path) as file:
            return str(file.comment)
    except soundfile.SoundFileError:
        return None


def _write_wav(pair: Pair, samples: np.ndarray, rate_hz: int) -> None:
    is_short = all(_is_16_bits(path) for path in (pair.left, pair.right))
    if samples.size * (2 if is_short else 4) > _MAX_WAV_BYTES:
        raise RecordingError(
            f"{pair.left} and {pair.right} are too long for one wav file: cut them into parts"
        )
    subtype = "PCM_16" if is_short else "FLOAT"
    write_wav(pair.joined, samples, rate_hz, subtype=subtype, comment=_mark(pair))


def _is_16_bits(path: Path) -> bool:
    try:
        return bool(soundfile.info(path).subtype == "PCM_16")
    except soundfile.SoundFileError:
        return False


def _carry_words(pair: Pair, *, again: bool) -> list[str]:
    """Put the texts or the transcripts of both files beside the joined one: if they are not there,
    if the files' own are newer, or `again`. Returns notes, see `join`."""

    def is_due(target: Path, sources: Iterable[Path]) -> bool:
        if again or not target.exists():
            return True
        made_at = target.stat().st_mtime_ns
        return any(source.stat().st_mtime_ns > made_at for source in sources)

    notes = []
    texts = [path.with_suffix(".txt") for path in (pair.left, pair.right)]
    if texts[0].is_file():
        for channel, text in zip(("left", "right"), texts, strict=True):
            target = pair.joined.with_name(f"{pair.joined.stem}.{channel}.txt")
            if text.is_file() and is_due(target, [text]):
                notes += _write_words(pair, target, text.read_bytes())
    name = str(pair.left)
    dialogue = MonoPair(pair.left, name, name, math.nan, user_path=pair.right)
    transcripts = [path for path in dialogue.transcript_paths if path.is_file()]
    target = pair.joined.with_suffix(".json")
    if dialogue.transcript_paths[0] not in transcripts or not is_due(target, transcripts):
        return notes
    # A transcript beside Moshi's file alone holds the words of both, and says who speaks.
    words = sorted(dialogue.load_transcript().words, key=lambda word: word.start_sec)
    called = {OTHER_SPEAKER: SPEAKERS[1]}
    alignments = [
        [word.text, [word.start_sec, word.end_sec], called.get(word.speaker, word.speaker)]
        for word in words
    ]
    marked = {MARK: _words_mark(alignments), "alignments": alignments}
    content = json.dumps(marked, ensure_ascii=False)
    return notes + _write_words(pair, target, f"{content}\n".encode())


def _write_words(pair: Pair, target: Path, content: bytes) -> list[str]:
    """Write words that were joined. Others that are there stay beside the recording that they are
    of; where that is made anew of other files, they are moved aside. Returns notes, see `join`.

    Raises:
        RecordingError: other words are there, and not of a joined file: somebody else's.
    """
    there = target.read_bytes() if target.exists() else None
    if there is not None and _words_in(there) == _words_in(content):
        return []
    if there is None or _is_as_joined(there):
        write_whole(target, content)
        return []
    if pair.joined.exists() and _comment_of(pair.joined) == _mark(pair):
        return [
            f"{target} stays, as it is not what was joined: move it away to have the words of "
            f"{pair.left.name} and {pair.right.name} instead"
        ]
    if not pair.overwrite:
        raise RecordingError(
            f"{target} is there, and there is no {pair.joined} that it is of: move it away, or "
            "--overwrite moves it aside"
        )
    names = (f"{target.name}.before{number or ''}" for number in itertools.count())
    aside = next(path for path in map(target.with_name, names) if not os.path.lexists(path))
    with writing(aside):
        target.rename(aside)
    write_whole(target, content)
    return [f"{target} is joined anew; what was there is {aside.name} now"]


def _words_mark(alignments: object) -> str:
    """Return the mark of a transcript that was joined, which fits no other words."""
    digest = hashlib.blake2b(json.dumps(alignments).encode(), digest_size=12).hexdigest()
    return f"{mark_of('data index')}, {digest}"


def _words_in(content: bytes) -> object:
    """Return the words of a transcript, and of all else the content."""
    found = _parsed(content)
    return found.get("alignments", content)


def _is_as_joined(content: bytes) -> bool:
    """Return whether a transcript is one that was joined, and has not been changed since."""
    found = _parsed(content)
    return MARK in found and found[MARK] == _words_mark(found.get("alignments"))


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        found = parse_json(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
