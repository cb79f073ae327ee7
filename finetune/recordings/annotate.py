"""Word times for recordings: `moshi-ttt data annotate`."""

import json
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from finetune.data import (
    HOP_SEC,
    MAIN_SPEAKER,
    USER_SPEAKER,
    FileProblem,
    MonoPair,
    Recording,
    StereoFile,
    power_of,
    wordless_speech,
)
from finetune.errors import UserError, counted
from finetune.kept import write_whole
from finetune.recordings.align import SAMPLE_RATE_HZ, Aligner
from finetune.recordings.files import listed
from finetune.recordings.listing import list_data
from finetune.recordings.options import AnnotateOptions
from finetune.recordings.texts import CHANNELS, Channel, Dialogue, read_texts, text_paths
from finetune.recordings.work import RecordingError, do_all

SPEAKERS = (MAIN_SPEAKER, USER_SPEAKER)
"""Moshi and the user, who are on the left and the right unless it is the other way round."""

_MANY_WORDS = 5
_FEWEST_TO_TELL, _MOST_UNKNOWN = 10, 0.2
"""From so many words on, their language shows in how many of them the English dictionary lacks:
some 4 percent of everyday English, and 35 to 60 of other European languages."""
_OLDER = "transcript is older than its text", "transcripts are older than their texts"

Entry = tuple[str, tuple[float, float], str]
Transcriber = Callable[[np.ndarray], list[tuple[str, float, float]]]
"""From a channel at 16 kHz to its words with their times."""


class _Written(NamedTuple):
    """A transcript was written for a recording.

    Args:
        wordless: the side of which much is said without words, and how much, if there is one.
        unknown: the side whose words are mostly not English, and how many, if there is one.
    """

    num_words: int
    wordless: str = ""
    unknown: str = ""


def annotate_data(options: AnnotateOptions) -> Iterator[str]:
    """Write a transcript beside each recording that has none. Yields lines to print.

    It may be stopped at any time: what is written is whole, and is not made again.

    Raises:
        UserError: the JSONL cannot be read, the engine is not installed, or, at the end, some
            recordings have no transcript; all of them are named.
    """
    listing = list_data(options.data)
    problems = [f"{origin}: {problem}" for origin, problem in listing.problems]
    dialogues = list(dict.fromkeys(filter(_is_dialogue, listing.recordings)))
    if len(dialogues) < len(set(listing.recordings)):
        raise UserError(
            f"{options.data}: transcripts are written beside audio files; in this layout the words "
            "stand in the data themselves, see docs/data.md."
        )
    main_channel = _main_channel(options, listing.main_channel)
    # A transcript says who is on which side of the file, wherever the run takes Moshi from.
    dialogues = [
        replace(each, reading=replace(each.reading, main_channel="left")) for each in dialogues
    ]
    missing = [
        each for each in dialogues if options.overwrite or not transcript_path(each.path).exists()
    ]
    if len(missing) < len(dialogues):
        some = f"of {len(dialogues)} recordings"
        already = counted(len(dialogues) - len(missing), f"{some} has", f"{some} have")
        yield f"{already} a transcript already"
    if options.engine == "align":
        yield from _warn_of_unread(missing)
        yield from _warn_of_older(set(dialogues) - set(missing), main_channel)
        Aligner.require()
        align = partial(_align, main_channel=main_channel)
        jobs = do_all(align, missing, title="aligning", workers=options.workers)
    else:
        transcribe = _whisper(options)
        # One process: the model is large, and uses all cores or the GPU.
        jobs = do_all(
            lambda dialogue: _annotate(dialogue, transcribe, main_channel),
            missing,
            title="recognizing",
            workers=1,
        )
    written: list[_Written] = []
    for done in jobs:
        if done.result is not None:
            written.append(done.result)
        elif done.problem is not None:
            problems.append(done.problem)
    num_words = sum(each.num_words for each in written)
    yield f"wrote {counted(len(written), 'transcript')} with {counted(num_words, 'word')}"
    yield from _cautions_of_few_words([each.wordless for each in written if each.wordless])
    yield from _cautions_of_unknown_words([each.unknown for each in written if each.unknown])
    if problems:
        raise UserError(
            "recordings that have no transcript of their own; all others are done: "
            f"{listed(sorted(problems))}"
        )
    yield f"next: moshi-ttt data check {shlex.quote(str(options.data))}"


def _main_channel(options: AnnotateOptions, of_run: Channel | None) -> Channel:
    """Return where Moshi is. Raises `UserError` if the option and the run differ."""
    if options.main_channel and of_run and options.main_channel != of_run:
        raise UserError(
            f"--main_channel {options.main_channel}: {options.data} says data.main_channel: "
            f"{of_run}. Leave the option out, or correct the file."
        )
    return options.main_channel or of_run or "left"


def transcript_path(audio: Path) -> Path:
    return audio.with_suffix(".json")


def _is_dialogue(recording: Recording) -> TypeGuard[Dialogue]:
    return isinstance(recording, StereoFile | MonoPair)


def _warn_of_older(annotated: set[Dialogue], main_channel: Channel) -> Iterator[str]:
    """Yield a warning if texts were changed after their transcripts were made."""
    older = []
    for dialogue in sorted(annotated, key=lambda dialogue: dialogue.path):
        try:
            texts = text_paths(dialogue, main_channel)
        except RecordingError:
            continue  # the transcript is from elsewhere
        made_at = transcript_path(dialogue.path).stat().st_mtime_ns
        if any(text.stat().st_mtime_ns > made_at for text in texts):
            older.append(dialogue.path)
    if older:
        yield (
            f"warning: {counted(len(older), *_OLDER)} ({older[0].name}, for example); --overwrite "
            "makes all again"
        )


def _warn_of_unread(dialogues: Sequence[Dialogue]) -> Iterator[str]:
    """Yield a warning if a text of both speakers lies beside those of each channel, which count."""
    both = [each.path.with_suffix(".txt") for each in dialogues if isinstance(each, StereoFile)]
    unread = [
        path
        for path in both
        if path.is_file() and any(path.with_suffix(f".{c}.txt").is_file() for c in CHANNELS)
    ]
    if unread:
        texts = counted(len(unread), "text is", "texts are")
        yield (
            f"warning: {texts} not read, as a text of a channel lies beside it ({unread[0].name}, "
            "for example): remove the one or the other"
        )


def _cautions_of_few_words(sides: Sequence[str]) -> Iterator[str]:
    """Yield a warning if texts leave over much of what is said: most fit speech, also of others."""
    if sides:
        yield (
            f"warning: much of what is said has no words, in {listed(sorted(sides))}\nlisten to "
            "it: if that is speech of this side, check that its text is of this recording and "
            "channel, and complete; laughter, music and the other side's echo need none"
        )


def _cautions_of_unknown_words(sides: Sequence[str]) -> Iterator[str]:
    """Yield a warning if texts may be in another language: words of any fit some sounds."""
    if sides:
        yield (
            "warning: many words are not in the English dictionary, so that their sounds are "
            f"guessed, in {listed(sorted(sides))}\nif that is another language, the times are not "
            "to be trusted: remove these transcripts and use --engine whisper, which knows many"
        )


@cache
def _aligner() -> Aligner:
    return Aligner()


def _speakers(dialogue: Dialogue, main_channel: Channel) -> tuple[str, str]:
    """Return who is on the left and on the right, or in the first and the second file."""
    is_first = main_channel == "left" or isinstance(dialogue, MonoPair)
    return SPEAKERS if is_first else (SPEAKERS[1], SPEAKERS[0])


def _name(dialogue: Dialogue, channel: int) -> str:
    """Return what messages call a side."""
    if isinstance(dialogue, MonoPair):
        return str((dialogue.path, dialogue.user_path)[channel])
    return f"{dialogue.path}, {CHANNELS[channel]} channel"


def _align(dialogue: Dialogue, main_channel: Channel) -> _Written:
    """Write the transcript of a recording whose words are known."""
    texts = read_texts(dialogue, main_channel)
    samples = read_channels(dialogue)
    power = power_of(samples, round(HOP_SEC * SAMPLE_RATE_HZ))
    found: list[Entry] = []
    wordless, unknown = [], []
    speakers = _speakers(dialogue, main_channel)
    for channel, (words, speaker) in enumerate(zip(texts, speakers, strict=True)):
        try:
            times = _aligner().align(samples[channel], words)
        except RecordingError as error:
            # A few words would fit almost any speech.
            swapped = len(words) >= _MANY_WORDS and _fits(samples[1 - channel], words)
            raise RecordingError(
                f"{_name(dialogue, channel)}: {error}: "
                + (
                    "it fits the other channel; swap the channels or the texts"
                    if swapped
                    else "check that the text is of this recording and channel, and complete"
                )
            ) from None
        found += [(word, time, speaker) for word, time in zip(words, times, strict=True)]
        left_over = wordless_speech(power[:, [channel, 1 - channel]], times, HOP_SEC)
        if left_over.is_much:
            wordless.append(f"{_name(dialogue, channel)}: {left_over.share:.0%} of it")
        strange = _aligner().unknown(words)
        if len(words) >= _FEWEST_TO_TELL and len(strange) > _MOST_UNKNOWN * len(words):
            some = f"{len(strange)} of {len(words)}, such as {strange[0]!r}"
            unknown.append(f"{_name(dialogue, channel)}: {some}")
    written = _write(dialogue, found)
    return written._replace(wordless=", ".join(wordless), unknown=", ".join(unknown))


def _fits(samples: np.ndarray, words: Sequence[str]) -> bool:
    try:
        _aligner().align(samples, words)
    except RecordingError:
        return False
    return True


def read_channels(dialogue: Dialogue) -> np.ndarray:
    """Return a whole recording at 16 kHz: float32 `[2, S]`, left and right, or the first and the
    second file.

    Raises:
        FileProblem: it cannot be read, or is not stereo.
    """
    assert dialogue.reading.main_channel == "left"
    try:
        duration_sec = dialogue.sides.measure().duration_sec
        num_samples = math.ceil(duration_sec * SAMPLE_RATE_HZ) + 1
        return dialogue.sides.read(0, num_samples, SAMPLE_RATE_HZ).numpy()
    except FileProblem as problem:
        raise problem.found_in_list(dialogue.leave_out) from None


def _annotate(dialogue: Dialogue, transcribe: Transcriber, main_channel: Channel) -> _Written:
    """Write the transcript of a recording whose words are not known."""
    found: list[Entry] = []
    speakers = _speakers(dialogue, main_channel)
    for samples, speaker in zip(read_channels(dialogue), speakers, strict=True):
        found += [(word, (start, end), speaker) for word, start, end in transcribe(samples)]
    return _write(dialogue, found)


def _write(dialogue: Dialogue, found: list[Entry]) -> _Written:
    """Write the words of both beside the stereo file, or beside Moshi's."""
    if isinstance(dialogue, MonoPair) and (other := dialogue.transcript_paths[1]).exists():
        raise RecordingError(
            f"{other} is there, and with it the transcript of {dialogue.path} would be that of "
            "Moshi alone: write that one as well, or remove the other"
        )
    alignments = [
        [word, [round(start, 3), round(end, 3)], speaker]
        for word, (start, end), speaker in sorted(found, key=lambda entry: entry[1])
    ]
    text = json.dumps({"alignments": alignments}, ensure_ascii=False)
    write_whole(transcript_path(dialogue.path), text + "\n")
    return _Written(len(found))


def _whisper(options: AnnotateOptions) -> Transcriber:
    try:
        from faster_whisper import WhisperModel
    except ImportError as error:
        raise UserError(
            "--engine whisper needs faster-whisper, which is not installed. Install it with: "
            "pip install 'moshi-ttt[whisper]'"
        ) from error
    try:
        model: Any = WhisperModel(options.model, device=options.device)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--model {options.model} cannot be loaded ({error}): give a folder with a model for "
            "faster-whisper, or the name of one that can be downloaded, such as small"
        ) from error

    def transcribe(samples: np.ndarray) -> list[tuple[str, float, float]]:
        # Without the filter, Whisper puts words into silence, of which a channel has much.
        segments, _ = model.transcribe(
            samples, language=options.language, word_timestamps=True, vad_filter=True
        )
        words = [word for segment in segments for word in segment.words or ()]
        return [(w.word.strip(), float(w.start), float(w.end)) for w in words if w.word.strip()]

    return transcribe
