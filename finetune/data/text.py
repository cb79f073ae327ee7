"""Transcripts, and the text stream that is made of them: one token a frame."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finetune.safety import read_json

from .problems import FileProblem

FRAME_RATE_HZ = 12.5
MAIN_SPEAKER = "SPEAKER_MAIN"

_FORMAT = '{"alignments": [["word", [start_sec, end_sec], "SPEAKER_MAIN"], ...]}'


def count_frames(duration_sec: float) -> int:
    """Frames of a segment of this length, rounded up."""
    # The tolerance keeps rounding, as in 1.04 * 12.5 = 13.000000000000002, from adding a frame.
    return math.ceil(duration_sec * FRAME_RATE_HZ - 1e-6)


class Word(NamedTuple):
    """One alignment of a transcript; times from the start of the recording."""

    text: str
    start_sec: float
    end_sec: float
    speaker: str


class TimedTokens(NamedTuple):
    """The tokens of one word and when it starts, in frames from the start of the segment."""

    start_frames: float
    tokens: list[int]


def read_transcript(path: Path) -> list[Word]:
    """All alignments of a transcript, as they stand in the file.

    Raises:
        FileProblem: the file is missing, is not JSON, or does not have the expected form.
    """
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise FileProblem(
            f"transcript {path} is missing: make one with the word times, in the form {_FORMAT}; "
            "an empty list means that Moshi says nothing"
        ) from None
    except OSError as error:
        raise FileProblem(
            f"transcript {path} cannot be read ({error.strerror}): check the file and its "
            "permissions"
        ) from None
    except ValueError as error:
        raise FileProblem(
            f"transcript {path} is not valid JSON ({error}): make it again, in the form {_FORMAT}"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("alignments"), list):
        raise FileProblem(
            f'transcript {path} has no list "alignments": it must have the form {_FORMAT}'
        )
    for index, entry in enumerate(content["alignments"]):
        if not _is_alignment(entry):
            raise FileProblem(
                f"transcript {path} is malformed: alignments[{index}] is {_short(entry)}, "
                'expected ["word", [start_sec, end_sec], "SPEAKER_MAIN"]'
            )
    return [
        Word(text, start_sec, end_sec, speaker)
        for text, (start_sec, end_sec), speaker in content["alignments"]
    ]


def _is_alignment(entry: Any) -> bool:
    # Asked for every word of all data at the start.
    return (
        isinstance(entry, list)
        and len(entry) == 3
        and isinstance(entry[0], str)
        and isinstance(entry[1], list)
        and len(entry[1]) == 2
        and _is_time(entry[1][0])
        and _is_time(entry[1][1])
        and isinstance(entry[2], str)
    )


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def tokenize_segment(
    words: Iterable[Word],
    start_frame: int,
    num_frames: int,
    tokenize: Callable[[str], list[int]],
) -> list[TimedTokens]:
    """The words of the main speaker that start in a segment, sorted by start and tokenized.

    Words without a positive duration are left out. The segment covers the frames
    `start_frame … start_frame + num_frames − 1` of the recording.
    """
    selected = []
    for word in words:
        # Counting in frames from the recording's start, and subtracting a whole number, keeps a
        # word in the same frame wherever the segment begins.
        start_frames = word.start_sec * FRAME_RATE_HZ - start_frame
        audible = word.speaker == MAIN_SPEAKER and word.end_sec > word.start_sec
        if audible and 0 <= start_frames < num_frames:
            selected.append((start_frames, word.text))
    selected.sort(key=lambda item: item[0])
    return [TimedTokens(start_frames, tokenize(text)) for start_frames, text in selected]


def text_stream(
    words: Sequence[TimedTokens],
    num_frames: int,
    *,
    text_padding_id: int,
    end_of_text_padding_id: int,
) -> list[int]:
    """The text stream of a segment: `num_frames` tokens, one a frame.

    Every word that starts before the end of frame t replaces what is left of the word before.
    While tokens are left, one goes on each frame, and a padding on the frame before becomes
    end-of-padding. Everything else is padding.

    Args:
        words: sorted by start.
    """
    stream = [text_padding_id] * num_frames
    remaining: list[int] = []
    next_word = 0
    for frame in range(num_frames):
        while next_word < len(words) and words[next_word].start_frames < frame + 1:
            remaining = list(words[next_word].tokens)
            next_word += 1
        if remaining:
            if frame > 0 and stream[frame - 1] == text_padding_id:
                stream[frame - 1] = end_of_text_padding_id
            stream[frame] = remaining.pop(0)
    return stream
