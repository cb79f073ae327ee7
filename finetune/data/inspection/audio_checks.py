"""Checks of the audio of a recording. Each yields findings."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

from finetune.data.decoders import lacks_length
from finetune.data.inspection.findings import Finding, Subject
from finetune.data.inspection.listening import SILENT, Heard
from finetune.data.problems import COPY_REMEDY
from finetune.data.text import FRAME_RATE_HZ
from finetune.data.transcripts import MAIN_SPEAKER

_MAX_DURATION_ERROR_SEC = 0.1
_CODEC_FRAME_SAMPLES = 1152
_MAX_ERROR_CODEC_FRAMES = 3
_INTEGER_UNITS_PEAK = 4.0
_MAX_CLIPPED_SHARE = 1e-3
_QUIET_PEAK = 1e-2
_SWAPPED_FACTOR = 10.0
_MIN_SWAPPED_SHARE = 0.8
_MIN_LOUD_SEC = 1.0


def duration_tolerance_sec(is_exact: bool, sample_rate_hz: int) -> float:
    """Return how far a promised length may be off.

    Programs count the padding that codecs such as mp3 put before and after the audio, or do not.
    """
    if is_exact or not sample_rate_hz:
        return _MAX_DURATION_ERROR_SEC
    padding_sec = _MAX_ERROR_CODEC_FRAMES * _CODEC_FRAME_SAMPLES / sample_rate_hz
    return max(_MAX_DURATION_ERROR_SEC, padding_sec)


def duration(subject: Subject) -> Iterator[Finding]:
    """Yield a finding if a recording is shorter than a frame, or not as long as its line says."""
    promised_sec, duration_sec = subject.promised_sec, subject.duration_sec
    tolerance_sec = duration_tolerance_sec(subject.is_exact, subject.sample_rate_hz)
    # Written so that a promise of NaN fails as well.
    if promised_sec is not None and not abs(promised_sec - duration_sec) <= tolerance_sec:
        yield Finding(
            "wrong-duration",
            "error",
            f"wrong duration: it is listed with {promised_sec} s, but {subject.name} lasts "
            f"{duration_sec:.3f} s (up to {tolerance_sec:.2g} s of difference are accepted)",
            "write the true duration, or check that it is the right file",
        )
    elif duration_sec * FRAME_RATE_HZ < 1:
        yield Finding(
            "too-short",
            "error",
            f"recording {subject.name} is shorter than one frame of {1 / FRAME_RATE_HZ} s",
            subject.leave_out,
        )


def file_kind(subject: Subject) -> Iterator[Finding]:
    """Yield findings about what files are called, and are."""
    for file in subject.files:
        if isinstance(file, Path):
            yield from _kind_of(file, subject)
        if subject.num_samples and lacks_length(file):
            yield Finding(
                "no-length-in-header",
                "warning",
                f"the header of {file} does not say how long it is; by decoding it lasts "
                f"{subject.duration_sec:.3f} s",
                "convert it, to wav or flac for example, so that other programs read all of it too",
            )


def _kind_of(path: Path, subject: Subject) -> Iterator[Finding]:
    if path.name.startswith("._"):
        yield Finding(
            "apple-double",
            "error",
            f"{path} is what macOS leaves beside a file on other disks and in archives, no "
            "recording",
            subject.leave_out,
        )
    elif path.name.startswith("."):
        yield Finding(
            "hidden-file",
            "warning",
            f"recording {path} is a hidden file",
            f"rename it, or {subject.leave_out} if it is a leftover of another program",
        )
    if subject.thorough and path.is_symlink():
        yield Finding(
            "linked-file",
            "warning",
            f"recording {path} is a link to {path.resolve()}",
            "nothing need be done as long as its target stays where it is",
        )


def level(subject: Subject, heard: Heard) -> Iterator[Finding]:
    """Yield findings about samples beyond full scale, at it, and far below."""
    peak = float(heard.peak.max())
    if peak > _INTEGER_UNITS_PEAK:
        yield Finding(
            "integer-units",
            "error",
            f"samples of {subject.name} reach {peak:.0f}, far beyond full scale, which is 1: it "
            "seems to hold integers written as floats",
            "write it again, divided by 32768, or with 16-bit samples",
        )
    elif heard.clipped_share > _MAX_CLIPPED_SHARE:
        yield Finding(
            "clipping",
            "warning",
            f"{heard.clipped_share:.1%} of the samples of {subject.name} are at full scale, in "
            "runs: it was recorded or converted too loud",
            "make it again with less gain; what was cut off does not come back",
        )
    elif heard.is_complete and SILENT <= peak < _QUIET_PEAK:
        yield Finding(
            "too-quiet",
            "warning",
            f"samples of {subject.name} reach {20 * math.log10(peak):.0f} dB of full scale and no "
            "more: a codec hears next to nothing, and so does a search for words",
            "make it again with more gain",
        )


def channels(subject: Subject, heard: Heard) -> Iterator[Finding]:
    """Yield findings about channels that are silent, equal or swapped."""
    has_words, others = bool(subject.spoken_words), bool(subject.other_words)
    if heard.channels_equal and heard.is_complete:
        yield Finding(
            "channels-equal",
            "error",
            f"both channels of {subject.name} are the same, so that Moshi would be its own user",
            f"put each speaker on a channel of their own, Moshi on the {subject.main_side}",
        )
        return
    if heard.is_complete and has_words and heard.peak[0] < SILENT:
        is_all_silent = heard.peak[1] < SILENT
        where = "both channels are" if is_all_silent else f"the {subject.main_side} channel is"
        yield Finding(
            "silent-channel",
            "error",
            f"{where} silent in {subject.name}, although the transcript gives {MAIN_SPEAKER} words",
            f"make it again from its source, or {subject.leave_out}"
            if is_all_silent
            else f"put Moshi on the {subject.main_side} (channels may be swapped, or one was lost)"
            f", or set data.main_channel to {subject.user_side}",
        )
        return
    if heard.is_complete and others and heard.peak[1] < SILENT:
        yield Finding(
            "silent-user",
            "warning",
            f"the {subject.user_side} channel is silent in {subject.name}, although the transcript "
            "gives other speakers words",
            f"put the user on the {subject.user_side}",
        )
        return
    if has_words and _fit_the_other_side(heard):
        yield Finding(
            "swapped-channels",
            "warning",
            f"while {MAIN_SPEAKER} has words in {subject.name}, the {subject.user_side} channel is "
            f"loud and the {subject.main_side} one is not",
            f"put Moshi on the {subject.main_side}, set data.main_channel to {subject.user_side}, "
            "or correct the speaker names",
        )


def _fit_the_other_side(heard: Heard) -> bool:
    main, other = heard.main_power, heard.other_power
    loud_right = (main[:, 1] > _SWAPPED_FACTOR * main[:, 0]).mean() if len(main) else 0.0
    loud_left = (other[:, 0] > other[:, 1]).mean() if len(other) else 1.0
    return bool(loud_right >= _MIN_SWAPPED_SHARE and loud_left >= 0.5)


def wordless(subject: Subject, heard: Heard) -> Iterator[Finding]:
    """Yield a finding if Moshi's channel is loud where there are no words."""
    has_words = any(word.text.strip() for word in subject.transcript.words)
    if subject.is_transcribed and not has_words and heard.main_loud_sec >= _MIN_LOUD_SEC:
        yield Finding(
            "no-words",
            "warning",
            f"the {subject.main_side} channel, Moshi's, is loud for {heard.main_loud_sec:.1f} s in "
            f"{subject.name}, and {subject.text_name} holds no words",
            "if that is speech, give it its words, with moshi-ttt data annotate --overwrite for "
            "example: Moshi would learn to speak without text",
        )


def few_words(subject: Subject, heard: Heard) -> Iterator[Finding]:
    """Yield a finding if much of what Moshi says has no words, as with those of another recording.

    Where channels are swapped, they stand where the other one speaks, which is said already.
    """
    if heard.main_wordless.is_much and not _fit_the_other_side(heard):
        yield Finding(
            "few-words",
            "warning",
            f"{heard.main_wordless.share:.0%} of what is as loud on the {subject.main_side} "
            f"channel, Moshi's, of {subject.name} as its words lies outside all words of "
            f"{subject.text_name}",
            "listen to it: if that is speech of this side, check that these are the words of this "
            "recording and channel, and all of them; laughter, music and the other side's echo "
            "need none",
        )


def decoded_length(subject: Subject, heard: Heard) -> Iterator[Finding]:
    """Yield a finding if what is decoded is not as long as the header says."""
    if heard.is_complete and abs(heard.num_samples - subject.num_samples) > 1:
        rate = subject.sample_rate_hz
        yield Finding(
            "header-differs",
            "error",
            f"by its header {subject.name} lasts {subject.num_samples / rate:.3f} s, but "
            f"{heard.num_samples / rate:.3f} s are decoded",
            f"{COPY_REMEDY}, or {subject.leave_out}",
        )


FILE_CHECKS: tuple[Callable[[Subject], Iterator[Finding]], ...] = (duration, file_kind)
HEARD_CHECKS: tuple[Callable[[Subject, Heard], Iterator[Finding]], ...] = (
    level,
    channels,
    wordless,
    few_words,
    decoded_length,
)
