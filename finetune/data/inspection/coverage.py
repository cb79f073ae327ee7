"""How much of what is said on a channel has words: little of it, if they are of another recording.

An aligner finds places for a few words in nearly any speech. What they leave over shows that they
are not what is said there.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

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
"""What is this much quieter than the other channel may be its echo, whatever it sounds like."""
_ECHO_FACTOR = 0.5
"""What is this much quieter is its echo if it rises and falls as the other channel does."""
_MIN_ECHO_CORRELATION = 0.7
"""Of levels in dB, over `_ECHO_WINDOW_SEC`. Two voices at once have less."""
_ECHO_WINDOW_SEC = 1.0
_MAX_ECHO_DELAY_SEC = 0.3
_LOWEST = 1e-5
"""Mean square below which levels are taken for the same."""
_CONSTANT = 1e-12
"""Product of variances that rounding alone may leave."""


class Wordless(NamedTuple):
    """Sound is as loud as the words of a channel, and is none of them.

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


def is_loud(power: np.ndarray, hop_sec: float) -> np.ndarray:
    """Return which hops `[num_hops, 2]` are loud on the first channel, and not with the second
    one's echo."""
    above = (power[:, 0] > _LOUD) & (power[:, 0] > _BLEED_FACTOR * power[:, 1])
    return above & ~_is_echo(power, hop_sec)


def _is_echo(power: np.ndarray, hop_sec: float) -> np.ndarray:
    """Return which hops of the first channel are quieter than the second one was a moment before,
    and rise and fall with it.

    That moment is the delay with which they do so most, all over the recording. What reverberates
    for long is smeared, and only found in part.
    """
    if not len(power):
        return np.zeros(0, bool)
    levels, other = np.log10(np.maximum(power, _LOWEST)).T
    delays_hops = range(min(len(power), round(_MAX_ECHO_DELAY_SEC / hop_sec) + 1))
    other = max(
        (_delayed(other, each) for each in delays_hops), key=lambda each: _likeness(levels, each)
    )
    window = np.ones(min(len(power), round(_ECHO_WINDOW_SEC / hop_sec)))
    num_around = np.convolve(np.ones(len(power)), window, "same")

    def around(values: np.ndarray) -> np.ndarray:
        return np.convolve(values, window, "same") / num_around

    is_alike = _correlation(levels, other, around) > _MIN_ECHO_CORRELATION
    is_quieter: np.ndarray = levels < other + np.log10(_ECHO_FACTOR)
    return is_alike & is_quieter


def _delayed(levels: np.ndarray, num_hops: int) -> np.ndarray:
    return np.pad(levels, (num_hops, 0), constant_values=np.log10(_LOWEST))[: len(levels)]


def _likeness(levels: np.ndarray, other: np.ndarray) -> float:
    """Return the correlation where the other channel is loud; 0 if it never is."""
    is_other = other > np.log10(_LOUD)
    if not is_other.any():
        return 0.0
    return float(_correlation(levels[is_other], other[is_other], np.mean))


def _correlation(levels: np.ndarray, other: np.ndarray, mean: Callable[[np.ndarray], Any]) -> Any:
    """Return the correlation by means of all values, or of those around each; 0 for constants."""
    mean_level, mean_other = mean(levels), mean(other)
    together = mean(levels * other) - mean_level * mean_other
    of_levels = mean(np.square(levels)) - np.square(mean_level)
    of_other = mean(np.square(other)) - np.square(mean_other)
    return together / np.sqrt(np.maximum(of_levels * of_other, _CONSTANT))


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
    loud = is_loud(power, hop_sec)
    if (loud & inside).any():
        loud &= power[:, 0] >= np.median(power[loud & inside, 0])
    wordless = int((loud & ~near).sum())
    return Wordless(wordless * hop_sec, wordless / max(1, int(loud.sum())))


def _hops(start_sec: float, end_sec: float, hop_sec: float) -> slice:
    return slice(max(0, int(start_sec / hop_sec)), max(0, int(end_sec / hop_sec) + 1))
