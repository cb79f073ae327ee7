"""Two mono files of a dialogue, one a speaker: found by their names, and joined if wanted."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from finetune.data import OTHER_SPEAKER, MonoPair, Sides, inspect_audio
from finetune.errors import UserError
from finetune.kept import Output, require_not_read, write_wav, write_whole
from finetune.recordings.annotate import SPEAKERS
from finetune.recordings.work import RecordingError
from finetune.safety import all_files

_MAX_WAV_BYTES = 2**32 - 2**16
_ID = "{id}"


@dataclass(frozen=True)
class Pair:
    """The two mono files of a dialogue, and the stereo file that can be made of them."""

    left: Path
    right: Path
    joined: Path
    overwrite: bool


def find_pairs(
    folder: Path, pattern: str, joined_dir: Path | None, overwrite: bool
) -> tuple[list[Pair], list[str]]:
    """Return the pairs of a folder by the names of their files, and what has no partner.

    Args:
        pattern: `LEFT,RIGHT`, names from `folder` on with `{id}` in each.

    Raises:
        UserError: no such pattern, or nothing is called so.
    """
    left, right = _parse(pattern)
    sides = [_by_id(folder, side) for side in (left, right)]
    if not sides[0] and not sides[1]:
        raise UserError(
            f"--pair {pattern}: no file in {folder} is called so. Names start from there, as in "
            "'moshi/{id}.wav,user/{id}.wav'."
        )
    pairs, problems = [], []
    for name in sorted(sides[0].keys() | sides[1].keys()):
        joined = (joined_dir or folder / "stereo") / f"{name}.wav"
        if name in sides[0] and name in sides[1]:
            pairs.append(Pair(sides[0][name], sides[1][name], joined, overwrite))
        else:
            here, other = (0, right) if name in sides[0] else (1, left)
            missing = folder / other.replace(_ID, name)
            problems.append(f"{sides[here][name]} has no partner: there is no {missing}")
    return pairs, problems


def _parse(pattern: str) -> tuple[str, str]:
    sides = [side.strip() for side in pattern.split(",")]
    if len(sides) != 2 or any(side.count(_ID) != 1 for side in sides) or sides[0] == sides[1]:
        raise UserError(
            f"--pair {pattern}: give two different names with a comma between them, Moshi's first, "
            "each with {id} once: '{id}_left.wav,{id}_right.wav'"
        )
    return sides[0], sides[1]


def _by_id(folder: Path, side: str) -> dict[str, Path]:
    """Return the files that one side of a pattern names, by what stands for `{id}`."""
    before, after = side.split(_ID)
    name = re.compile(re.escape(before) + r"(?P<id>.+)" + re.escape(after))
    found = {}
    for path in all_files(folder):
        match = name.fullmatch(path.relative_to(folder).as_posix())
        if match and not path.name.startswith("."):
            found[match["id"]] = path
    return found


def require_kept(pairs: Iterable[Pair]) -> None:
    """Check that no joined file would replace one that is to be joined.

    Raises:
        UserError: one would.
    """
    pairs = list(pairs)
    parts = [path for pair in pairs for path in (pair.left, pair.right)]
    require_not_read([Output(pair.joined, "--joined_dir") for pair in pairs], parts)


def join(pair: Pair) -> None:
    """Write the stereo file of a pair, and its texts or transcript if both files have one.

    Samples are not changed: 16 bits stay 16 bits, everything else becomes 32-bit floats. What
    was joined from these two, as they are now, stays as it is, and gets words that are newer.

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
    _carry_words(pair, again=not is_made)
    if is_made:
        return
    samples = sides.read(0, info.num_samples, rates[0]).T.contiguous().numpy()
    _write_wav(pair, samples, rates[0])  # the last, as what says that all of it is made


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


def _carry_words(pair: Pair, *, again: bool) -> None:
    """Put the texts or the transcripts of both files beside the joined one: if they are not there,
    if the files' own are newer, or `again`."""

    def is_due(target: Path, sources: Iterable[Path]) -> bool:
        if again or not target.exists():
            return True
        made_at = target.stat().st_mtime_ns
        return any(source.stat().st_mtime_ns > made_at for source in sources)

    texts = [path.with_suffix(".txt") for path in (pair.left, pair.right)]
    if texts[0].is_file():
        for channel, text in zip(("left", "right"), texts, strict=True):
            target = pair.joined.with_name(f"{pair.joined.stem}.{channel}.txt")
            if text.is_file() and is_due(target, [text]):
                _write_words(pair, target, text.read_bytes())
    name = str(pair.left)
    dialogue = MonoPair(pair.left, name, name, math.nan, user_path=pair.right)
    transcripts = [path for path in dialogue.transcript_paths if path.is_file()]
    target = pair.joined.with_suffix(".json")
    if dialogue.transcript_paths[0] not in transcripts or not is_due(target, transcripts):
        return
    # A transcript beside Moshi's file alone holds the words of both, and says who speaks.
    words = sorted(dialogue.load_transcript().words, key=lambda word: word.start_sec)
    called = {OTHER_SPEAKER: SPEAKERS[1]}
    alignments = [
        [word.text, [word.start_sec, word.end_sec], called.get(word.speaker, word.speaker)]
        for word in words
    ]
    content = json.dumps({"alignments": alignments}, ensure_ascii=False)
    _write_words(pair, target, f"{content}\n".encode())


def _write_words(pair: Pair, target: Path, content: bytes) -> None:
    """
    Raises:
        RecordingError: other words are there, and not of a joined file: somebody else's.
    """
    is_own = pair.overwrite or pair.joined.exists() or not target.exists()
    if not is_own and target.read_bytes() != content:
        raise RecordingError(
            f"{target} is there, and there is no {pair.joined} that it is of: move it away, or "
            "--overwrite replaces it"
        )
    write_whole(target, content)
