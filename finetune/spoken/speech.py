"""Text to speech with word times, through the shared library of the package `espeakng-loader`.

Everything is a pure function of its arguments. espeak-ng is not: breath is noise, seeded from the
clock, and pitch flutter and echo carry over from one utterance to the next in static variables,
which neither `espeak_Terminate` nor a new seed clears. So the library is opened afresh and seeded
for every utterance, which costs about a millisecond.
"""

from __future__ import annotations

import _ctypes
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio

from finetune.errors import UserError
from finetune.interrupt import held_signals
from finetune.spoken.sample_rate import SAMPLE_RATE_HZ

_ESPEAK_SAMPLE_RATE = 22_050
_SYNCHRONOUS = 2  # espeak_AUDIO_OUTPUT: audio goes to the callback before espeak_Synth returns
_DONT_EXIT = 0x8000  # espeak_Initialize returns an error where it would end the process
_UTF8 = 1
_RATE, _PITCH, _PITCH_RANGE = 1, 3, 4  # espeak_PARAMETER
_WORD_EVENT = 1
_SILENCE = 0.02  # of the loudest sample: below it, a word has ended
_MAX_WORDS_PER_EVENT = 3


@dataclass(frozen=True)
class Voice:
    """A voice of espeak-ng, such as `en-us+f3`, and how it speaks; pitch and range: 0 to 99."""

    name: str
    pitch: int = 50
    pitch_range: int = 50
    words_per_min: int = 165


@dataclass(frozen=True)
class Word:
    text: str
    start_sec: float
    end_sec: float


@dataclass(frozen=True)
class Speech:
    """`samples`: float64 [S] within ±1 at 24 kHz; `words`: those of the text, in order."""

    samples: np.ndarray
    words: tuple[Word, ...]

    @property
    def duration_sec(self) -> float:
        return len(self.samples) / SAMPLE_RATE_HZ


class _EventId(ctypes.Union):
    _fields_ = (
        ("number", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("string", ctypes.c_char * 8),
    )


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # in characters, from 1
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


class _EspeakVoice(ctypes.Structure):
    """The beginning of `espeak_VOICE`."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_char_p),  # a priority and a name each; empty: it has none
        ("identifier", ctypes.c_char_p),  # a path, and "+" and the variant if one is used
    )


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


def synthesize(text: str, voice: Voice) -> Speech:
    """Speaks `text`; its words are what stands between white space, punctuation included.

    Raises:
        UserError: espeak-ng is not installed or lacks the voice or its variant, or a word of the
            text has no letter or digit and cannot be spoken.
    """
    with held_signals():  # espeak calls Python, and through it no exception passes
        pcm, events = _run_espeak(text, voice)
    words = _place_words(text, events, pcm)
    # In float64 the resampled values do not depend on the number of threads once rounded to int16.
    samples = torchaudio.functional.resample(
        torch.from_numpy(pcm.astype(np.float64) / 32768), _ESPEAK_SAMPLE_RATE, SAMPLE_RATE_HZ
    )
    return Speech(samples.numpy().clip(-1.0, 1.0), words)


@cache
def _library_and_data_paths() -> tuple[str, str]:
    try:
        import espeakng_loader
    except ImportError as error:
        raise UserError(
            "The demonstration data are spoken by espeak-ng, which is not installed. "
            "Install it with: pip install 'moshi-ttt[demo]'"
        ) from error
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()


def _run_espeak(text: str, voice: Voice) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Returns int16 samples at 22.05 kHz and the (character, sample) where each event begins."""
    library_path, data_path = _library_and_data_paths()
    blocks: list[bytes] = []
    events: list[tuple[int, int]] = []

    def collect(wav: Any, num_samples: int, event: Any) -> int:
        if num_samples > 0:
            blocks.append(ctypes.string_at(wav, 2 * num_samples))
        index = 0
        while event[index].type != 0:
            if event[index].type == _WORD_EVENT:
                events.append((event[index].text_position - 1, event[index].sample))
            index += 1
        return 0

    callback = _Callback(collect)
    library = ctypes.CDLL(library_path)
    try:
        rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data_path.encode(), _DONT_EXIT)
        if rate != _ESPEAK_SAMPLE_RATE:
            raise UserError(
                f"espeak-ng ({library_path}) did not start with its data in {data_path} "
                f"(answer {rate}). Reinstall it with: pip install --force-reinstall espeakng-loader"
            )
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        library.espeak_SetSynthCallback(callback)
        _set_voice(library, voice.name, Path(data_path))
        library.espeak_SetParameter(_RATE, voice.words_per_min, 0)
        library.espeak_SetParameter(_PITCH, voice.pitch, 0)
        library.espeak_SetParameter(_PITCH_RANGE, voice.pitch_range, 0)
        data = text.encode()
        status = library.espeak_Synth(data, len(data) + 1, 0, 1, 0, _UTF8, None, None)
        assert status == 0, status
        library.espeak_Terminate()
    finally:
        _ctypes.dlclose(library._handle)
    return np.frombuffer(b"".join(blocks), dtype=np.int16), events


def _set_voice(library: ctypes.CDLL, name: str, data: Path) -> None:
    """
    Raises:
        UserError: espeak-ng lacks the voice or its variant, or a variant stands alone.
    """
    if library.espeak_SetVoiceByName(name.encode()) != 0:
        raise UserError(f"espeak-ng has no voice named {name!r}; try 'en-us+f3'.")
    # It answers 0 as well where it has left the variant out, and where a variant is all it has got:
    # then it would speak without a language, and end the process.
    library.espeak_GetCurrentVoice.restype = ctypes.POINTER(_EspeakVoice)
    used = library.espeak_GetCurrentVoice().contents
    if used.languages and ("+" not in name or b"+" in used.identifier):
        return
    variants = ", ".join(sorted(path.name for path in (data / "voices" / "!v").iterdir()))
    if not used.languages:
        raise UserError(
            f"espeak-ng: {name!r} is a variant, which needs a language before it, as in "
            f"'en-us+f3'. The variants are {variants}."
        )
    language, variant = name.split("+", 1)
    raise UserError(
        f"espeak-ng has no variant {variant!r} of a voice, which {name!r} asks for. After "
        f"'{language}+' can come, in small and capital letters as here, {variants}."
    )


def _place_words(text: str, events: Sequence[tuple[int, int]], pcm: np.ndarray) -> tuple[Word, ...]:
    """Gives each word of the text its time; words that share one event divide it by letters."""
    spans = _word_spans(text)
    starts = _event_start_of_each_word(text, spans, events)
    begins = [index for index, start in enumerate(starts) if start is not None]
    loud = np.abs(pcm.astype(np.int32)) > _SILENCE * max(1, int(np.abs(pcm).max(initial=0)))
    words: list[Word] = []
    for position, first in enumerate(begins):
        last = begins[position + 1] if position + 1 < len(begins) else len(spans)
        start = starts[first]
        end = starts[last] if last < len(spans) else len(pcm)
        assert start is not None and end is not None
        if last - first > _MAX_WORDS_PER_EVENT or not loud[start:end].any():
            unclear = text[spans[first][0] : spans[last - 1][1]]
            raise UserError(f"espeak-ng gave no usable time for {unclear!r} in {text!r}.")
        end = start + int(np.flatnonzero(loud[start:end])[-1]) + 1
        words += _split_by_letters([text[a:b] for a, b in spans[first:last]], start, end)
    assert [word.text for word in words] == text.split()
    return tuple(words)


def _word_spans(text: str) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    position = 0
    for word in text.split():
        if not any(character.isalnum() for character in word):
            raise UserError(f"The text {text!r} has a word that cannot be spoken: {word!r}.")
        position = text.index(word, position)
        spans.append((position, position + len(word)))
        position += len(word)
    if not spans:
        raise UserError("An empty text cannot be spoken.")
    return spans


def _event_start_of_each_word(
    text: str, spans: Sequence[tuple[int, int]], events: Sequence[tuple[int, int]]
) -> list[int | None]:
    """The first sample of each word, or None where the event of an earlier word includes it."""
    starts: list[int | None] = [None] * len(spans)
    previous_sample = 0
    for character, sample in events:
        hits = [index for index, (a, b) in enumerate(spans) if a <= character < b]
        if len(hits) != 1 or sample < previous_sample:
            raise UserError(f"espeak-ng reported a word outside of the text {text!r}.")
        previous_sample = sample
        if starts[hits[0]] is None:  # "isn't" and "twenty-one" come with two events
            starts[hits[0]] = sample
    if starts[0] is None:
        raise UserError(f"espeak-ng gave no time for the first word of {text!r}.")
    return starts


def _split_by_letters(words: Sequence[str], start: int, end: int) -> list[Word]:
    letters = [sum(character.isalnum() for character in word) for word in words]
    bounds = start + (end - start) * np.cumsum([0, *letters]) / sum(letters)
    bounds_sec = [round(float(bound) / _ESPEAK_SAMPLE_RATE, 3) for bound in bounds]
    return [Word(word, *times) for word, times in zip(words, pairwise(bounds_sec), strict=True)]
