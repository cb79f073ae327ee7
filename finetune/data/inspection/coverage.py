"""How much of what is said on a channel has words: little of it, if they are of another recording.

An aligner finds places for a few words in nearly any speech. What they leave over shows that they
are not what is said there.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

HOP_SEC = 0.02
MAX_WORDLESS_SHARE = 1 / 3
"""On speech of the demonstration with its own words the share is 2 % at most, and 26 % with music,
noise or other voices 10 dB below it that go on for 80 s around half a minute of dialogue."""
MIN_WORDLESS_SEC = 0.5
"""Of hops as loud as the median of words, which a second of speech has."""
_REACH_SEC = 0.25
"""Words begin and end a little beyond their times; pauses of twice this are filled."""

_LOUD = 1e-4
"""Mean square from which a hop is loud: −40 dB of full scale, below speech and above most rooms."""
_BLEED_FACTOR = 0.1
"""What is this much quieter than the other channel may be its echo."""


class Wordless(NamedTuple):
    """What is as loud as the words of a channel, and is none of them.

    Args:
        sec: for how long.
        share: of all that is as loud.
    """

    sec: float
    share: float

    @property
    def is_much(self) -> bool:
        return self.share > MAX_WORDLESS_SHARE and self.sec >= MIN_WORDLESS_SEC


NONE = Wordless(0.0, 0.0)


def power_of(samples: np.ndarray, hop_samples: int) -> np.ndarray:
    """Return the mean square of each hop: `[num_hops, 2]`, the last one padded with silence."""
    squares = np.square(samples, dtype=np.float64)
    padded = np.pad(squares, ((0, 0), (0, -samples.shape[1] % hop_samples)))
    return padded.reshape(2, -1, hop_samples).mean(2).T


def is_loud(power: np.ndarray) -> np.ndarray:
    """Return which hops `[num_hops, 2]` are loud on the first channel, and not with the second
    one's echo."""
    return (power[:, 0] > _LOUD) & (power[:, 0] > _BLEED_FACTOR * power[:, 1])


def wordless_speech(
    power: np.ndarray, spans_sec: Iterable[tuple[float, float]], hop_sec: float
) -> Wordless:
    """Return how much of what is as loud as the words lies outside them.

    The measure is the median of the hops in words, so that what is quieter than speech, as music or
    noise behind it, does not count.

    Args:
        power: mean square of each hop, of this channel and of the other one: `[num_hops, 2]`.
        spans_sec: starts and ends of the words on this channel.
    """
    inside, near = np.zeros(len(power), bool), np.zeros(len(power), bool)
    for start_sec, end_sec in spans_sec:
        inside[_hops(start_sec, end_sec, hop_sec)] = True
        near[_hops(start_sec - _REACH_SEC, end_sec + _REACH_SEC, hop_sec)] = True
    if not inside.any():
        return NONE
    loud = is_loud(power)
    if (loud & inside).any():
        loud &= power[:, 0] >= np.median(power[loud & inside, 0])
    wordless = int((loud & ~near).sum())
    return Wordless(wordless * hop_sec, wordless / max(1, int(loud.sum())))


def _hops(start_sec: float, end_sec: float, hop_sec: float) -> slice:
    return slice(max(0, int(start_sec / hop_sec)), max(0, int(end_sec / hop_sec) + 1))
