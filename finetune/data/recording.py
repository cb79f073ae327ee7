"""A recording, however it is kept."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch

from finetune.data.audio import MIMI_RATE_HZ
from finetune.data.codes import Codes, ReadCodes
from finetune.data.inspection import Finding, Inspection, Subject, inspect_subject
from finetune.data.problems import FileProblem
from finetune.data.text import FRAME_RATE_HZ, TextEncoder, count_frames
from finetune.data.transcripts import MAIN_SPEAKER, OTHER_SPEAKER, Transcript, Word


@dataclass(frozen=True)
class Recording(ABC):
    """A recording of a source can be read in any process.

    A subclass is a frozen dataclass of what is needed to read it: small, because it travels to the
    workers with every segment, and hashable.
    """

    path: Path
    """The file that holds it, or what stands for it in messages and results."""
    path_as_written: str
    """Its name in the source: the same wherever the data lies."""
    origin: str
    """Where it is listed, as `file:line`, for messages."""
    duration_sec: float
    """What the source promises; after `inspect` found no error, the truth."""

    has_codes: ClassVar[bool] = False
    """Whether it is kept as codes, for `read_codes`, and not as audio."""
    leave_out: ClassVar[str] = "remove its line"
    """How to take it out of its source, for messages; empty: it stands alone."""

    @property
    def location(self) -> str:
        """Return what two recordings share if and only if they are the same, as far as their files
        show it without being read; with symbolic links, after `os.path.realpath`."""
        return str(self.path)

    @property
    def part(self) -> tuple[str, float, float]:
        """Return what it is a part of, by its location, and from where to where in seconds: two
        recordings share speech if and only if their parts of one whole overlap."""
        return self.location, 0.0, math.inf

    @property
    def title(self) -> str:
        """Return what messages call it."""
        return self.location

    @property
    def files(self) -> tuple[Path, ...]:
        """Everything on disk whose change changes it: audio and words."""
        return (self.path,)

    @property
    def audio_files(self) -> tuple[Path, ...]:
        """Return the files on disk that its audio, or its codes, lie in."""
        return (self.path,)

    @property
    def own_transcripts(self) -> tuple[tuple[Path, Path], ...]:
        """Return the files beside its audio that hold nothing but its words, there or not, each
        after the file, or the name of the codes, whose words these are."""
        return ()

    def moved(self, places: Mapping[Path, Path]) -> "Recording":
        """Return it as it would be in other files.

        Args:
            places: by those of `audio_files` that are others.
        """
        return dataclasses.replace(self, path=places.get(self.path, self.path))

    @property
    def words_version(self) -> tuple[object, ...]:
        """Return what tells its words from those that other recordings have in the same `files`; ()
        where each has files of its own."""
        return ()

    @abstractmethod
    def audio_version(self) -> tuple[object, ...] | None:
        """Return what changes whenever the audio does, a fingerprint for codes that are kept; None:
        it cannot be found. No file is read for it."""

    def inspect(
        self,
        *,
        thorough: bool = False,
        text: TextEncoder | None = None,
        reads: ReadCodes | None = None,
    ) -> Inspection:
        """Inspect it, see `inspect_recording`; never raises for what is wrong with it.

        A layout that knows its files better may look at them first.

        Args:
            reads: what codes the model reads; None: whether it reads these is not looked at.
        """
        subject = Subject(
            self.title,
            f"the transcript of {self.title}",
            is_readable=True,
            duration_sec=self.duration_sec,
            text=text,
            thorough=thorough,
            leave_out=self.leave_out,
        )
        if not self.has_codes:
            subject.sample_rate_hz, subject.num_channels = MIMI_RATE_HZ, 2
            subject.num_samples = math.ceil(self.duration_sec * MIMI_RATE_HZ - 1e-3)
            subject.read_audio = lambda start, num: self.read_audio(start, num, MIMI_RATE_HZ)
        inspection = Inspection(self.path)
        try:
            if self.has_codes:
                codes = self.read_codes(0, count_frames(self.duration_sec))
                if reads is not None:
                    reads.require(codes, self.title, text)
            subject.transcript = Transcript(self.read_words())
        except FileProblem as problem:
            inspection.findings.append(Finding.of_problem(problem, self.leave_out))
        return inspect_subject(subject, inspection)

    @abstractmethod
    def read_words(self) -> list[Word]:
        """Read all words of all speakers, in any order.

        Raises:
            FileProblem: they cannot be read.
        """

    def read_audio(self, start_sample: int, num_samples: int, sample_rate_hz: int) -> torch.Tensor:
        """Read part of the audio: float32 `[2, at most num_samples]`, left Moshi, right the user.

        Shorter at its end. The samples are those of the whole, cut.

        Args:
            start_sample, num_samples: counted at `sample_rate_hz`.

        Raises:
            FileProblem: it cannot be read.
        """
        raise FileProblem(f"{self.title} has no audio, only codes", "name the audio instead")

    def read_codes(self, start_frame: int, num_frames: int) -> Codes:
        """Read the codes of at most `num_frames` frames of what `has_codes`.

        Raises:
            FileProblem: they cannot be read.
        """
        raise AssertionError(f"{self.title} has audio, no codes")

    def checked(self) -> "Recording":
        """Inspect it once more, and return it with its true length.

        Raises:
            FileProblem: it cannot be used.
        """
        found = self.inspect()
        for error in found.errors:
            raise FileProblem(error.message, error.remedy, code=error.code)
        return self.lasting(found.duration_sec)

    def lasting(self, duration_sec: float) -> "Recording":
        """Return the same recording with its true length."""
        return dataclasses.replace(self, duration_sec=duration_sec)


@dataclass(frozen=True)
class OtherSide(Recording):
    """A recording with Moshi in the user's place: channels and speakers are exchanged."""

    inner: Recording

    @property
    def has_codes(self) -> bool:  # type: ignore[override]
        return self.inner.has_codes

    @property
    def leave_out(self) -> str:  # type: ignore[override]
        return self.inner.leave_out

    @classmethod
    def of(cls, inner: Recording) -> "OtherSide":
        name = f"{inner.path_as_written} (other side)"
        return cls(inner.path, name, inner.origin, inner.duration_sec, inner)

    @property
    def location(self) -> str:
        return f"{self.inner.location} (other side)"

    @property
    def title(self) -> str:
        return f"{self.inner.title} (other side)"

    @property
    def files(self) -> tuple[Path, ...]:
        return self.inner.files

    @property
    def audio_files(self) -> tuple[Path, ...]:
        return self.inner.audio_files

    def moved(self, places: Mapping[Path, Path]) -> Recording:
        return OtherSide.of(self.inner.moved(places))

    @property
    def words_version(self) -> tuple[object, ...]:
        return self.inner.words_version

    def audio_version(self) -> tuple[object, ...] | None:
        version = self.inner.audio_version()
        return None if version is None else (*version, "other side")

    def read_words(self) -> list[Word]:
        return [
            word._replace(speaker=OTHER_SPEAKER if word.speaker == MAIN_SPEAKER else MAIN_SPEAKER)
            for word in self.inner.read_words()
        ]

    def read_audio(self, start_sample: int, num_samples: int, sample_rate_hz: int) -> torch.Tensor:
        return self.inner.read_audio(start_sample, num_samples, sample_rate_hz).flip(0)

    def read_codes(self, start_frame: int, num_frames: int) -> Codes:
        audio, text = self.inner.read_codes(start_frame, num_frames)
        if text is not None:
            raise FileProblem(
                f"codes {self.inner.title} hold the text of one side alone",
                "leave the row of text out and write a transcript with the words of both, or set "
                "data.swap_channels to false",
            )
        return Codes(audio.flip(0))


class SegmentRef(NamedTuple):
    """Reference of a part of a recording: the frames from `start_frame` on."""

    recording: Recording
    start_frame: int

    def num_valid_frames(self, num_frames: int) -> int:
        """Return how many of a segment's `num_frames` frames are of the recording: the others are
        padding."""
        return min(num_frames, count_frames(self.recording.duration_sec) - self.start_frame)


def cut(recording: Recording, num_frames: int) -> list[SegmentRef]:
    """Segments of `num_frames` frames, one after the other; a last one may be shorter.

    A rest of less than one frame is left out.
    """
    num_whole_frames = math.floor(recording.duration_sec * FRAME_RATE_HZ + 1e-6)
    return [SegmentRef(recording, start) for start in range(0, num_whole_frames, num_frames)]
