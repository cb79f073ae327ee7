"""The two sides of a dialogue, each a channel of an audio file."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch.nn.functional import pad

from finetune.data.audio import AudioInfo, inspect_audio, read_audio
from finetune.data.audio_files import AudioFile
from finetune.data.problems import FileProblem

MAX_DIFFERENCE_SEC = 0.1
"""Two files of a dialogue may differ by this much in length; the shorter one ends in silence."""


class Channel(NamedTuple):
    """A channel of an audio file, counted from 0."""

    file: AudioFile
    number: int = 0


@dataclass(frozen=True)
class Sides:
    """This says where the two sides of a dialogue are heard: in one audio file, or in one each.

    Args:
        num_channels: what each file must have; None: any number.
        start_sec, duration_sec: the part of the files that it is; None: to their end.
    """

    moshi: Channel
    user: Channel
    num_channels: int | None = 2
    start_sec: float = 0.0
    duration_sec: float | None = None

    @classmethod
    def of_stereo(cls, file: AudioFile, main_channel: Literal["left", "right"] = "left") -> "Sides":
        """Return the sides of a stereo file."""
        left, right = Channel(file, 0), Channel(file, 1)
        return cls(left, right) if main_channel == "left" else cls(right, left)

    @classmethod
    def of_two(cls, moshi: AudioFile, user: AudioFile) -> "Sides":
        """Return the sides that are a mono file each."""
        return cls(Channel(moshi), Channel(user), num_channels=1)

    @property
    def location(self) -> str:
        """Return what two have in common if and only if they are the same part of the same files.
        That of a whole stereo file is its path, whichever channel is Moshi's."""
        names = [_without_links(file) for file, _ in (self.moshi, self.user)]
        numbers = self.moshi.number, self.user.number
        if len(self.files) == 1:
            is_stereo = set(numbers) == {0, 1}
            name = names[0] + ("" if is_stereo else f", channels {numbers[0]} and {numbers[1]}")
        else:
            name = " + ".join(
                f"{name}, channel {number}" if number else name
                for name, number in zip(names, numbers, strict=True)
            )
        if self.start_sec or self.duration_sec is not None:
            name += f", from {self.start_sec} s"
        if self.duration_sec is not None:
            name += f", {self.duration_sec} s long"
        return name

    @property
    def files(self) -> tuple[AudioFile, ...]:
        """Return the one file, or both."""
        return tuple(dict.fromkeys((self.moshi.file, self.user.file)))

    def measure(self) -> AudioInfo:
        """Return how long it is, after checking that the files can be read to their ends.

        Raises:
            FileProblem: see `inspect_audio`; or the two files do not fit each other.
        """
        info = self._measure_files()
        start = round(self.start_sec * info.sample_rate_hz)
        num_samples = info.num_samples - start
        if self.duration_sec is not None:
            num_samples = min(num_samples, round(self.duration_sec * info.sample_rate_hz))
        if start and num_samples <= 0:
            raise FileProblem(
                f"recording {self.moshi.file} lasts {info.duration_sec:.3f} s, so that nothing is "
                f"left of the part that starts at {self.start_sec:g} s",
                "correct the start, or check that it is the right file",
                code="part-after-the-end",
            )
        return AudioInfo(num_samples, info.sample_rate_hz, info.num_channels, info.is_exact)

    def _measure_files(self) -> AudioInfo:
        wanted = None if self.num_channels is None else (self.num_channels,)
        infos = {file: inspect_audio(file, channels=wanted) for file in self.files}
        for file, number in (self.moshi, self.user):
            if number >= infos[file].num_channels:
                raise FileProblem(
                    f"recording {file} has {infos[file].num_channels} channels, and a side of the "
                    f"dialogue is to be channel {number}, counted from 0",
                    "correct the channel, or check that it is the right file",
                    code="not-stereo",
                )
        if len(infos) == 1:
            return infos[self.moshi.file]
        moshi, user = infos[self.moshi.file], infos[self.user.file]
        if abs(moshi.duration_sec - user.duration_sec) > MAX_DIFFERENCE_SEC:
            raise FileProblem(
                f"{self.moshi.file} lasts {moshi.duration_sec:.3f} s, but {self.user.file} "
                f"{user.duration_sec:.3f} s, so that they may not start together",
                "cut or fill them to one length",
                code="lengths-differ",
            )
        rate_hz = max(moshi.sample_rate_hz, user.sample_rate_hz)
        lengths = (
            info.num_samples
            if info.sample_rate_hz == rate_hz
            else math.ceil(info.num_samples * rate_hz / info.sample_rate_hz)
            for info in (moshi, user)
        )
        return AudioInfo(max(lengths), rate_hz, 2, moshi.is_exact and user.is_exact)

    def read(self, start_sample: int, num_samples: int, sample_rate_hz: int) -> torch.Tensor:
        """Read part of it, as `read_audio` does: float32 `[2, at most num_samples]`, Moshi first.

        Raises:
            FileProblem: a file cannot be read.
        """
        if self.duration_sec is not None:
            left = round(self.duration_sec * sample_rate_hz) - start_sample
            num_samples = min(num_samples, max(0, left))
        where = round(self.start_sec * sample_rate_hz) + start_sample, num_samples, sample_rate_hz
        if self.moshi.file == self.user.file:
            audio = read_audio(self.moshi.file, *where)
            numbers = [self.moshi.number, self.user.number]
            # To pick channels is a copy, and most files are as they are wanted.
            return audio if numbers == [0, 1] and len(audio) == 2 else audio[numbers]
        sides = [read_audio(file, *where)[number] for file, number in (self.moshi, self.user)]
        longest = max(len(side) for side in sides)
        return torch.stack([pad(side, (0, longest - len(side))) for side in sides])


def _without_links(file: AudioFile) -> str:
    return os.path.realpath(file) if isinstance(file, Path) else str(file)
