"""This package inspects recordings, for everything that reads data.

A check is a small function that yields findings; the three lists below are all there are.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from finetune.data.inspection.audio_checks import FILE_CHECKS, HEARD_CHECKS
from finetune.data.inspection.coverage import HOP_SEC, power_of, wordless_speech
from finetune.data.inspection.findings import Finding, Inspection, Subject
from finetune.data.inspection.listening import listen
from finetune.data.inspection.listing import in_training, inspect_listing, num_different
from finetune.data.inspection.transcript_checks import CHECKS as TRANSCRIPT_CHECKS
from finetune.data.inspection.whole_list import as_errors, wrong_in_all
from finetune.data.problems import FileProblem
from finetune.data.sides import Sides
from finetune.data.text import TextEncoder
from finetune.data.transcripts import Transcript, load_transcript

__all__ = [
    "HOP_SEC",
    "Finding",
    "Inspection",
    "Subject",
    "as_errors",
    "in_training",
    "inspect_listing",
    "inspect_recording",
    "inspect_sides",
    "inspect_subject",
    "num_different",
    "power_of",
    "wordless_speech",
    "wrong_in_all",
]

VERSION = 8
"""Of the checks. What was found good by earlier ones is inspected again."""


def inspect_recording(
    path: Path,
    transcript: Path | None,
    *,
    duration_sec: float | None = None,
    thorough: bool = False,
    text: TextEncoder | None = None,
    main_channel: Literal["left", "right"] = "left",
) -> Inspection:
    """Inspect a stereo recording and its transcript.

    Args:
        path: the audio.
        transcript: its words; None: there are none to be.
        duration_sec: what a listing promises.
        thorough: listen to all of the audio. Otherwise to a few words alone, and to the rest where
            these sound wrong: what a run has time for at its start.
        text: makes tokens of the words; None: what tokens show is not looked at.
        main_channel: where Moshi is.
    """
    subject = Subject(
        str(path),
        f"transcript {transcript}",
        promised_sec=duration_sec,
        text=text,
        thorough=thorough,
        main_side=main_channel,
    )
    words = None if transcript is None else partial(load_transcript, transcript)
    return inspect_sides(subject, Sides.of_stereo(path, main_channel), words, path=path)


def inspect_sides(
    subject: Subject,
    sides: Sides,
    load_words: Callable[[], Transcript] | None,
    *,
    path: Path,
) -> Inspection:
    """Inspect the audio of a dialogue, and its words.

    Args:
        subject: what is known before anything is opened; the rest is filled in here.
        load_words: reads them, or raises `FileProblem`; None: there are none to be.
        path: what the inspection is called after.
    """
    inspection = Inspection(path)
    try:
        info = sides.measure()
    except FileProblem as problem:
        inspection.findings.append(Finding.of_problem(problem, subject.leave_out))
    else:
        subject.is_readable = True
        subject.num_samples, subject.sample_rate_hz = info.num_samples, info.sample_rate_hz
        subject.num_channels, subject.is_exact = info.num_channels, info.is_exact
        subject.duration_sec, subject.files = info.duration_sec, sides.files
        subject.read_audio = lambda start, num: sides.read(start, num, info.sample_rate_hz)
    has_words = True
    if load_words is not None:
        try:
            subject.transcript, subject.is_transcribed = load_words(), True
        except FileProblem as problem:
            has_words = False
            inspection.findings.append(Finding.of_problem(problem, subject.leave_out))
    return inspect_subject(subject, inspection, with_words=has_words)


def inspect_subject(
    subject: Subject, inspection: Inspection, *, with_words: bool = True
) -> Inspection:
    """Run all checks that apply, and add what they find to `inspection`."""
    inspection.duration_sec = subject.duration_sec
    inspection.sample_rate_hz = subject.sample_rate_hz
    inspection.num_channels = subject.num_channels
    findings = inspection.findings
    if subject.is_readable:
        for check in FILE_CHECKS:
            findings += check(subject)
    if with_words:
        for check in TRANSCRIPT_CHECKS:
            findings += check(subject)
    if subject.has_audio:
        try:
            heard = listen(subject)
        except FileProblem as problem:
            findings.append(Finding.of_problem(problem, subject.leave_out))
        else:
            inspection.digest = heard.digest
            for listening_check in HEARD_CHECKS:
                findings += listening_check(subject, heard)
    return inspection
