"""An inspection has findings, and evidence that its checks look at."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from finetune.data.audio_files import AudioFile
from finetune.data.problems import FileProblem
from finetune.data.text import TextEncoder, is_spoken
from finetune.data.transcripts import MAIN_SPEAKER, Transcript, Word


class Finding(NamedTuple):
    """A finding is one thing that is wrong with a recording, or may be."""

    code: str
    """The kind, a stable name in kebab case."""
    severity: Literal["error", "warning"]
    """`error`: training on it would be wrong. `warning`: it may be meant."""
    message: str
    """A clause that names the file."""
    remedy: str

    def __str__(self) -> str:
        return f"{self.message}: {self.remedy}"

    @classmethod
    def of_problem(cls, problem: FileProblem, leave_out: str) -> "Finding":
        """The error that a file cannot be read.

        Args:
            leave_out: how to do without the recording.
        """
        problem = problem.found_in_list(leave_out)
        return cls(problem.code, "error", problem.what, problem.remedy)


@dataclass
class Inspection:
    """An inspection says what is known of a recording, and what is wrong with it. The numbers are 0
    if it cannot be read."""

    path: Path
    duration_sec: float = 0.0
    sample_rate_hz: int = 0
    num_channels: int = 0
    findings: list[Finding] = field(default_factory=list)
    digest: str = ""
    """Of all samples as they are decoded, the same for the same audio; empty if not all of it was
    listened to."""

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "warning"]


ReadAudio = Callable[[int, int], torch.Tensor]
"""Reads `[2, n]`, Moshi first, at the recording's own rate, from sample `start`, at most `num`."""


@dataclass
class Subject:
    """A recording as the checks see it.

    Args:
        name: what messages call the recording.
        text_name: what messages call its words.
        is_readable: the length is known.
        num_samples, sample_rate_hz, num_channels: 0 if the audio cannot be read, or is codes.
        read_audio: None if there is no audio to listen to.
        promised_sec: the length that a line promises.
        is_exact: see `AudioInfo`.
        is_transcribed: there is a transcript, and it could be read.
        files: those that hold its audio, if files do.
        main_side: the channel that Moshi is on, for messages.
        leave_out: how to take it out of what lists it, for messages.
    """

    name: str
    text_name: str
    is_readable: bool = False
    duration_sec: float = 0.0
    sample_rate_hz: int = 0
    num_channels: int = 0
    num_samples: int = 0
    read_audio: ReadAudio | None = None
    transcript: Transcript = field(default_factory=lambda: Transcript([]))
    is_transcribed: bool = False
    promised_sec: float | None = None
    is_exact: bool = True
    text: TextEncoder | None = None
    files: tuple[AudioFile, ...] = ()
    thorough: bool = False
    main_side: Literal["left", "right"] = "left"
    leave_out: str = "remove its line"

    @property
    def user_side(self) -> str:
        return "right" if self.main_side == "left" else "left"

    @cached_property
    def main_words(self) -> list[Word]:
        """Return all words of the main speaker, whether or not they become text."""
        return [word for word in self.transcript.words if word.speaker == MAIN_SPEAKER]

    @cached_property
    def spoken_words(self) -> list[Word]:
        """Return the words that become text, in the order of time."""
        words = (word for word in self.main_words if is_spoken(word))
        return sorted(words, key=lambda word: word.start_sec)

    @cached_property
    def other_words(self) -> list[Word]:
        """The words of all other speakers."""
        return [word for word in self.transcript.words if word.speaker != MAIN_SPEAKER]

    @property
    def has_audio(self) -> bool:
        """Return whether there is audio to listen to."""
        return self.read_audio is not None and self.num_samples > 0
