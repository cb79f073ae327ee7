"""Levels of a recording's two channels are taken, all the time and while words are spoken."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data.inspection.coverage import (
    HOP_SEC,
    NONE,
    Wordless,
    is_loud,
    power_of,
    wordless_speech,
)
from finetune.data.inspection.findings import Subject
from finetune.data.transcripts import Word

SILENT = 1e-4
"""Peaks below this (−80 dB of full scale) are silence."""

_MAX_MAIN_WORDS = 4
_MAX_OTHER_WORDS = 2
_MAX_WORD_SEC = 0.5
_BLOCK_SEC = 10
_CLIPPED_RUN = 3


@dataclass
class Heard:
    """Levels that were heard in a recording.

    Args:
        peak: of each channel, `[2]`.
        main_power, other_power: mean square of each channel while words of the main speaker, and of
            others, are spoken: `[num_words, 2]`.
        channels_equal: every sample of one channel is that of the other.
        num_samples: what was decoded of each channel.
        clipped_share: of samples, in runs at full scale; complete listening alone.
        is_complete: all of it was heard, or only some words.
        digest: of all samples; complete listening alone.
        main_loud_sec: how long Moshi's channel is loud, and not with the user's echo; complete
            listening alone.
        main_wordless: what is as loud on it as Moshi's words, and is none; likewise.
    """

    peak: np.ndarray
    main_power: np.ndarray
    other_power: np.ndarray
    channels_equal: bool
    num_samples: int
    clipped_share: float = 0.0
    is_complete: bool = False
    digest: str = ""
    main_loud_sec: float = 0.0
    main_wordless: Wordless = NONE


def listen(subject: Subject) -> Heard:
    """Listen to a stereo recording: to a few words, and to all of it if these sound wrong, or if
    the inspection is thorough.

    Raises:
        FileProblem: it cannot be decoded.
    """
    if subject.thorough:
        return _listen_to_all(subject)
    heard = _listen_to_words(subject)
    left_is_silent = bool(subject.spoken_words) and heard.peak[0] < SILENT
    if left_is_silent or heard.channels_equal:
        return _listen_to_all(subject)
    return heard


def _listen_to_words(subject: Subject) -> Heard:
    rate = subject.sample_rate_hz
    main = _some(subject.spoken_words, subject.duration_sec, _MAX_MAIN_WORDS)
    other = _some(subject.other_words, subject.duration_sec, _MAX_OTHER_WORDS)
    spans = [
        (word.start_sec, word.end_sec, kind) for kind in (0, 1) for word in (main, other)[kind]
    ]
    if not spans:
        spans = [(subject.duration_sec * part, subject.duration_sec, 2) for part in (1 / 3, 2 / 3)]
    powers: tuple[list[np.ndarray], ...] = ([], [], [])
    peaks = np.zeros(2)
    equal, num_heard = True, 0
    assert subject.read_audio is not None
    for start_sec, end_sec, kind in sorted(spans):  # in order: some files are decoded forward
        num = max(1, round(min(end_sec - start_sec, _MAX_WORD_SEC) * rate))
        samples = subject.read_audio(max(0, round(start_sec * rate)), num).numpy()
        if not samples.shape[1]:
            continue
        num_heard += samples.shape[1]
        powers[kind].append(np.square(samples, dtype=np.float64).mean(1))
        peaks = np.maximum(peaks, np.abs(samples).max(1))
        equal = equal and bool((samples[0] == samples[1]).all())
    equal = equal and num_heard > 0 and peaks[0] >= SILENT
    return Heard(peaks, _stack(powers[0]), _stack(powers[1]), equal, num_heard)


def _some(words: Sequence[Word], duration_sec: float, most: int) -> list[Word]:
    """Up to `most` words from all over the recording."""
    inside = [w for w in words if w.end_sec > w.start_sec and 0 <= w.start_sec < duration_sec]
    step = max(1, len(inside) // most)
    return inside[step // 2 :: step][:most]


def _stack(powers: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack(powers) if powers else np.zeros((0, 2))


def _listen_to_all(subject: Subject) -> Heard:
    rate = subject.sample_rate_hz
    hop = max(1, round(HOP_SEC * rate))
    block_samples = hop * max(1, round(_BLOCK_SEC / HOP_SEC))
    assert subject.read_audio is not None
    peaks, hops, num_clipped, equal, num_heard = np.zeros(2), [], 0, True, 0
    digest = hashlib.blake2b(str(rate).encode(), digest_size=16)
    while True:
        samples = subject.read_audio(num_heard, block_samples).numpy()
        num = samples.shape[1]
        if num:
            peaks = np.maximum(peaks, np.abs(samples).max(1))
            equal = equal and bool((samples[0] == samples[1]).all())
            num_clipped += _num_clipped(samples)
            digest.update(np.ascontiguousarray(samples).data)
            hops.append(power_of(samples, hop))
        num_heard += num
        if num < block_samples:
            break
    power, hop_sec = np.concatenate(hops) if hops else np.zeros((0, 2)), hop / rate
    return Heard(
        peaks,
        _of_words(power, subject.spoken_words, hop_sec),
        _of_words(power, subject.other_words, hop_sec),
        equal and num_heard > 0 and peaks[0] >= SILENT,
        num_heard,
        num_clipped / max(1, 2 * num_heard),
        is_complete=True,
        digest=digest.hexdigest(),
        main_loud_sec=float(is_loud(power, hop_sec).sum() * hop_sec),
        main_wordless=wordless_speech(
            power, [(word.start_sec, word.end_sec) for word in subject.spoken_words], hop_sec
        ),
    )


def _num_clipped(samples: np.ndarray) -> int:
    """Samples at full scale that stand in runs."""
    full = np.abs(samples) >= 0.999
    if not full.any():
        return 0
    runs = full.copy()
    for shift in range(1, _CLIPPED_RUN):
        runs[:, shift:] &= full[:, :-shift]
        runs[:, :shift] = False
    return int(runs.sum())


def _of_words(power: np.ndarray, words: Iterable[Word], hop_sec: float) -> np.ndarray:
    found = []
    for word in words:
        span = power[max(0, int(word.start_sec / hop_sec)) : int(word.end_sec / hop_sec) + 1]
        if word.end_sec > word.start_sec and len(span):
            found.append(span.mean(0))
    return _stack(found)
