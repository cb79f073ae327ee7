"""This package inspects recordings, for everything that reads data.

A check is a small function that yields findings; the three lists below are all there are.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from finetune.data.audio import inspect_audio, read_audio
from finetune.data.inspection.audio_checks import FILE_CHECKS, HEARD_CHECKS
from finetune.data.inspection.findings import Finding, Inspection, Subject
from finetune.data.inspection.listening import listen
from finetune.data.inspection.listing import inspect_listing
from finetune.data.inspection.transcript_checks import CHECKS as TRANSCRIPT_CHECKS
from finetune.data.problems import FileProblem
from finetune.data.text import TextEncoder
from finetune.data.transcripts import load_transcript

__all__ = [
    "Finding",
    "Inspection",
    "Subject",
    "inspect_listing",
    "inspect_recording",
    "inspect_subject",
]

VERSION = 2
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
        path=path,
        thorough=thorough,
        main_side=main_channel,
    )
    inspection = Inspection(path)
    try:
        info = inspect_audio(path)
    except FileProblem as problem:
        inspection.findings.append(Finding.of_problem(problem))
    else:
        subject.is_readable = True
        subject.num_samples, subject.sample_rate_hz = info.num_samples, info.sample_rate_hz
        subject.num_channels, subject.is_exact = info.num_channels, info.is_exact
        subject.duration_sec = info.duration_sec
        subject.read_audio = _reader(path, info.sample_rate_hz, main_channel == "right")
    has_transcript = True
    if transcript is not None:
        try:
            subject.transcript = load_transcript(transcript)
        except FileProblem as problem:
            has_transcript = False
            inspection.findings.append(Finding.of_problem(problem))
    return inspect_subject(subject, inspection, with_words=has_transcript)


def _reader(
    path: Path, sample_rate_hz: int, is_swapped: bool
) -> Callable[[int, int], torch.Tensor]:
    """Read Moshi first, then the user."""

    def read(start: int, num: int) -> torch.Tensor:
        audio = read_audio(path, start, num, sample_rate_hz)
        return audio.flip(0) if is_swapped else audio

    return read


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
            findings.append(Finding.of_problem(problem))
        else:
            inspection.digest = heard.digest
            for listening_check in HEARD_CHECKS:
                findings += listening_check(subject, heard)
    return inspection
