"""What is shown of a segment."""

from dataclasses import dataclass

import numpy as np

from finetune.data import Finding, Recording, Word

SAMPLE_RATE_HZ = 24_000


@dataclass(frozen=True)
class Streams:
    """Streams are what a model is fed of a segment, and what counts in its loss.

    text: T pieces, empty where there is padding, "·" for end-of-padding.
    codes: int `[16, T]`, of Moshi and of the user.
    text_weights, audio_weights: `[T]` and `[8, T]`.
    """

    text: list[str]
    codes: np.ndarray
    text_weights: np.ndarray
    audio_weights: np.ndarray


@dataclass(frozen=True)
class Shown:
    """A segment of a recording.

    samples: float `[2, S]` at 24 kHz.
    words: those that sound in it; times from the start of the recording.
    findings: of the whole recording.
    """

    recording: Recording
    start_sec: float
    samples: np.ndarray
    words: list[Word]
    findings: list[Finding]
    streams: Streams | None

    @property
    def duration_sec(self) -> float:
        return self.samples.shape[1] / SAMPLE_RATE_HZ
