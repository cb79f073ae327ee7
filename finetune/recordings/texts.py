"""Texts that lie beside recordings: what each speaker says, without times."""

import re
from pathlib import Path
from typing import Literal

from finetune.data import MonoPair, StereoFile
from finetune.recordings.spoken import spoken_form
from finetune.recordings.work import RecordingError
from finetune.safety import read_text

Channel = Literal["left", "right"]
CHANNELS: tuple[Channel, Channel] = ("left", "right")
FORMS = "NAME.left.txt and NAME.right.txt, or NAME.txt with lines that begin with A: or B:"

_SPEAKER = re.compile(r"\s*(A|B|left|right|Moshi|user)\s*:\s*(.*)", re.IGNORECASE)
_LEFT = {"left": {"a", "left", "moshi"}, "right": {"a", "left", "user"}}
"""Names of the speaker on the left, by where Moshi is."""
_NOISE = re.compile(r"\[[^\]]*\]|<[^>]*>")


Dialogue = StereoFile | MonoPair
"""What texts and transcripts lie beside: a stereo file, or two mono files."""


def text_paths(dialogue: Dialogue, main_channel: Channel = "left") -> list[Path]:
    """Return the texts that belong to a recording: of one or two channels, or one of both.

    Raises:
        RecordingError: there is none, or that of Moshi is missing.
    """
    audio = dialogue.path
    if isinstance(dialogue, MonoPair):
        return _texts_of_two(dialogue)
    sides = {side: audio.with_name(f"{audio.stem}.{side}.txt") for side in CHANNELS}
    both = audio.with_suffix(".txt")
    there = [path for path in sides.values() if path.is_file()]
    if there and sides[main_channel] not in there:
        raise RecordingError(
            f"{audio} has a text of the user, {there[0].name}, but none of Moshi: write "
            f"{sides[main_channel].name}; an empty one means that Moshi says nothing"
        )
    if there:
        return there
    if both.is_file():
        return [both]
    raise RecordingError(f"{audio} has no text: write {FORMS}")


def _texts_of_two(pair: MonoPair) -> list[Path]:
    moshi, user = (path.with_suffix(".txt") for path in (pair.path, pair.user_path))
    if not moshi.is_file():
        raise RecordingError(
            f"{pair.path} has no text: write {moshi.name}; an empty one means that Moshi says "
            "nothing"
        )
    return [moshi, user] if user.is_file() else [moshi]


def read_texts(dialogue: Dialogue, main_channel: Channel = "left") -> tuple[list[str], list[str]]:
    """Return the words of the left and the right channel, as they are written; of two files, those
    of Moshi and of the user.

    Marks that stand alone, and what is in [brackets] or <brackets>, are no words.

    Raises:
        RecordingError: no text, or one that cannot be read, or has words that are not English.
    """
    paths = text_paths(dialogue, main_channel)
    if isinstance(dialogue, MonoPair):
        moshi, *user = (_words(_read(path), path) for path in paths)
        return moshi, user[0] if user else []
    if paths == [dialogue.path.with_suffix(".txt")]:
        left, right = _by_speaker(paths[0], _LEFT[main_channel])
        return _words(left, paths[0]), _words(right, paths[0])
    words = {path.suffixes[-2]: _words(_read(path), path) for path in paths}
    return words.get(".left", []), words.get(".right", [])


def _read(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        raise RecordingError(f"{path} cannot be read as text: {error}") from None


def _by_speaker(path: Path, names_of_left: set[str]) -> tuple[str, str]:
    """Return what left and right say in a text of both; a line without a name goes on."""
    said: dict[bool, list[str]] = {True: [], False: []}
    is_left = None
    for number, line in enumerate(_read(path).splitlines(), 1):
        if match := _SPEAKER.fullmatch(line):
            is_left, line = match[1].lower() in names_of_left, match[2]
        if is_left is not None:
            said[is_left].append(line)
        elif line.strip():
            raise RecordingError(
                f"{path}, line {number}, does not say who speaks: begin it with A: (left) "
                "or B: (right), or write a text for each channel, "
                f"{path.stem}.left.txt and {path.stem}.right.txt"
            )
    return "\n".join(said[True]), "\n".join(said[False])


def _words(text: str, path: Path) -> list[str]:
    words = _NOISE.sub(" ", text).split()
    foreign = [word for word in words if not spoken_form(word) and any(map(str.isalnum, word))]
    if foreign:
        raise RecordingError(
            f"{path} has words that the English aligner cannot say, such as {foreign[0]!r}: write "
            "them in Latin letters, or use --engine whisper"
        )
    return [word for word in words if spoken_form(word)]
