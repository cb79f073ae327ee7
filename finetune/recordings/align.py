"""Times of words that are known: forced alignment by pocketsphinx, which brings a model of English.

A channel is silent most of the time. Long silences are cut out before and put back after: an
aligner may otherwise put words into them. It never sees digital silence, from whose features it
computes nothing usable, but quiet noise.
"""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from finetune.errors import UserError, counted
from finetune.recordings.spoken import sounds_of, spoken_form
from finetune.recordings.work import RecordingError

SAMPLE_RATE_HZ = 16_000
_HOP_SAMPLES = 160  # a frame of the aligner: 10 ms
_HOPS_PER_SEC = SAMPLE_RATE_HZ // _HOP_SAMPLES

_SILENCE_DB = 45.0
"""A hop this far below the loudest one is silent."""
_LONGEST_PAUSE_HOPS = 60
_MARGIN_HOPS = 20
_MIN_SEC_PER_WORD = 0.06

_NOISES = (1e-4, 1e-3, 3e-3)
"""Other noise, another attempt: the search gives up paths for good, now and then the right one."""


class Aligner:
    """Finds words in a channel. It needs some 300 MB, and a second to start."""

    def __init__(self) -> None:
        from pocketsphinx import Decoder

        self._decoder: Any = Decoder(lm=None, samprate=SAMPLE_RATE_HZ, loglevel="FATAL")
        self._taught: set[str] = set()

    @staticmethod
    def require() -> None:
        """
        Raises:
            UserError: pocketsphinx is not installed.
        """
        if find_spec("pocketsphinx") is None:
            raise UserError(
                "--engine align needs pocketsphinx, which is not installed. Install it with: "
                "pip install 'moshi-ttt[annotate]'"
            )

    def align(self, samples: np.ndarray, words: Sequence[str]) -> list[tuple[float, float]]:
        """Return start and end of each word, in seconds.

        Args:
            samples: one channel, float `[S]` at 16 kHz.
            words: as they are written; each has a spoken form.

        Raises:
            RecordingError: the words do not fit what is heard.
        """
        if not words:
            return []
        parts = [spoken_form(word) for word in words]
        assert all(parts)
        for part in {part for several in parts for part in several}:
            self._teach(part)
        hops = heard_hops(samples)
        if len(hops) < _MIN_SEC_PER_WORD * _HOPS_PER_SEC * len(words):
            raise RecordingError(
                f"the text has {counted(len(words), 'word')}, but there is sound for "
                f"{len(hops) / _HOPS_PER_SEC:.1f} s only"
            )
        blocks = samples[: len(samples) // _HOP_SAMPLES * _HOP_SAMPLES].reshape(-1, _HOP_SAMPLES)
        said = [part for several in parts for part in several]
        for noise in _NOISES:
            spans = self._search(blocks[hops].reshape(-1), said, noise)
            if spans is not None:
                return _times(spans, [len(several) for several in parts], hops)
        raise RecordingError("the text does not fit what is heard")

    def unknown(self, words: Sequence[str]) -> list[str]:
        """Return the words that the English dictionary lacks, whose sounds are guessed from their
        letters."""
        return [word for word in words if not all(map(self._is_english, spoken_form(word)))]

    def _is_english(self, part: str) -> bool:
        return part not in self._taught and self._decoder.lookup_word(part) is not None

    def _teach(self, part: str) -> None:
        if self._decoder.lookup_word(part) is None:
            self._taught.add(part)
            self._decoder.add_word(part, sounds_of(part, self._decoder.lookup_word), True)

    def _search(
        self, samples: np.ndarray, said: Sequence[str], noise: float
    ) -> list[tuple[int, int]] | None:
        """Return first and last hop of each part; None: they were not all found."""
        noisy = samples + np.random.default_rng(0).normal(0.0, noise, len(samples))
        pcm = (noisy.clip(-1, 1) * 32767).astype("<i2")
        decoder = self._decoder
        decoder.set_align_text(" ".join(said))
        decoder.start_utt()
        decoder.process_raw(pcm.tobytes(), full_utt=True)
        decoder.end_utt()
        found = [segment for segment in decoder.seg() or () if segment.word[0] not in "<["]
        # The dictionary numbers the ways to say a word: "the(2)".
        if [re.sub(r"\(\d+\)$", "", segment.word) for segment in found] != list(said):
            return None
        return [(segment.start_frame, segment.end_frame) for segment in found]


def heard_hops(samples: np.ndarray) -> np.ndarray:
    """Return the hops of a channel that are not in a long silence, in order."""
    num_hops = len(samples) // _HOP_SAMPLES
    blocks = samples[: num_hops * _HOP_SAMPLES].astype(np.float64).reshape(num_hops, _HOP_SAMPLES)
    power = (blocks**2).mean(axis=1)
    loud = np.flatnonzero(power > max(power.max(initial=0.0) * 10 ** (-_SILENCE_DB / 10), 1e-12))
    if not len(loud):
        return loud
    keep = np.zeros(num_hops, dtype=bool)
    edges = np.flatnonzero(np.diff(loud) > _LONGEST_PAUSE_HOPS)
    for first, last in zip(
        loud[np.r_[0, edges + 1]], loud[np.r_[edges, len(loud) - 1]], strict=True
    ):
        keep[max(0, first - _MARGIN_HOPS) : last + 1 + _MARGIN_HOPS] = True
    return np.flatnonzero(keep)


def _times(
    spans: Sequence[tuple[int, int]], num_parts: Sequence[int], hops: np.ndarray
) -> list[tuple[float, float]]:
    """Return the times of words from the hops, counted without silences, of their parts."""
    times, position = [], 0
    for number in num_parts:
        first, last = spans[position][0], spans[position + number - 1][1]
        position += number
        start, end = _without_silence(hops[first : last + 1])
        times.append((start / _HOPS_PER_SEC, (end + 1) / _HOPS_PER_SEC))
    return times


def _without_silence(hops: np.ndarray) -> tuple[int, int]:
    """Return first and last hop of a word, which is on one side of a silence that was cut out."""
    pieces = np.split(hops, np.flatnonzero(np.diff(hops) > 1) + 1)
    longest = max(pieces, key=len)
    return int(longest[0]), int(longest[-1])
