"""A recording of audio with words, wherever these are kept."""

from abc import abstractmethod
from dataclasses import dataclass, field

import torch

from finetune.data.audio_files import version_of
from finetune.data.codes import ReadCodes
from finetune.data.inspection import Finding, Inspection, Subject, inspect_sides
from finetune.data.problems import FileProblem
from finetune.data.reading import Reading
from finetune.data.recording import Recording
from finetune.data.sides import Sides
from finetune.data.text import TextEncoder
from finetune.data.transcripts import Transcript, Word


@dataclass(frozen=True)
class AudioRecording(Recording):
    """A recording of audio files; a layout says where its sides and its words are."""

    reading: Reading = field(default_factory=Reading)

    @property
    @abstractmethod
    def sides(self) -> Sides:
        """Return where it is heard, Moshi's side first.

        Raises:
            FileProblem: what holds it cannot be read.
        """

    @abstractmethod
    def load_transcript(self) -> Transcript:
        """Read all its words.

        Raises:
            FileProblem: they cannot be read.
        """

    @property
    def text_name(self) -> str:
        """Return what messages call its words."""
        return f"the transcript of {self.title}"

    @property
    def promised_sec(self) -> float | None:
        """Return the length that its source promises, if it does."""
        return self.duration_sec

    def audio_version(self) -> tuple[object, ...] | None:
        version: tuple[object, ...] = ()
        try:
            files = self.sides.files
        except FileProblem:
            return None
        for file in files:
            if (found := version_of(file)) is None:
                return None
            version += found
        return (*version, *self.reading.changes)

    def inspect(
        self,
        *,
        thorough: bool = False,
        text: TextEncoder | None = None,
        reads: ReadCodes | None = None,
    ) -> Inspection:
        subject = Subject(
            self.title,
            self.text_name,
            promised_sec=self.promised_sec,
            text=text,
            thorough=thorough,
            main_side=self.reading.main_channel,
            leave_out=self.leave_out,
        )
        try:
            sides = self.sides
        except FileProblem as problem:
            return Inspection(self.path, findings=[Finding.of_problem(problem, self.leave_out)])
        return inspect_sides(subject, sides, self.load_transcript, path=self.path)

    def read_words(self) -> list[Word]:
        return self.load_transcript().words

    def read_audio(self, start_sample: int, num_samples: int, sample_rate_hz: int) -> torch.Tensor:
        try:
            audio = self.sides.read(start_sample, num_samples, sample_rate_hz)
        except FileProblem as problem:
            raise problem.found_in_list(self.leave_out) from None
        return self.reading.apply(audio, start_sample, sample_rate_hz, self.path_as_written)
