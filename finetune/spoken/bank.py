"""All utterances that dialogues are made of, each spoken once."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from finetune.spoken import texts
from finetune.spoken.facts import ACKNOWLEDGMENTS, CUE, KINDS, NAMES, Fact
from finetune.spoken.speech import Voice, Word, synthesize

MOSHI_VOICE = Voice("en-us+f3", pitch=55, words_per_min=160)
USER_VOICES: tuple[Voice, ...] = (
    Voice("en-us+m3", pitch=45, words_per_min=160),
    Voice("en-us+m1", pitch=38, words_per_min=170),
    Voice("en-us+m3", pitch=36, words_per_min=172),
    Voice("en-us+m1", pitch=50, words_per_min=155),
)
_UTTERANCES_AT_ONCE = 16

Utterance = tuple[Voice, str]
Turn = tuple[bool, str]
"""Whether it is the user who speaks, and what is said."""


@dataclass(frozen=True)
class BankArgs:
    """These options say what a bank holds."""

    num_voices: int = 4
    """Of the user, from `USER_VOICES`."""

    kinds: tuple[str, ...] = tuple(KINDS)
    """Of facts, names in `KINDS`."""

    num_fillers: tuple[int, int] = (2700, 250)
    """Exchanges between facts and questions: for training, and others, held out, for evaluation. Of
    900, Moshi takes new ones for facts now and then."""

    @property
    def voices(self) -> tuple[Voice, ...]:
        return USER_VOICES[: self.num_voices]

    @property
    def values(self) -> list[tuple[str, str]]:
        """Return all (kind, value)."""
        return [(kind, value) for kind in self.kinds for value in KINDS[kind].values]


class Bank:
    """Utterances, each at a place: samples, float16 at 24 kHz, and the times of the words."""

    def __init__(self, args: BankArgs, *, workers: int = 1, lazy: bool = False) -> None:
        """Speak everything that dialogues of `args` may need, `workers` utterances at a time.

        Args:
            lazy: an utterance is spoken when it is first asked for, which is cheaper for a few
                dialogues. It sounds the same; its place is another one.

        Raises:
            UserError: espeak-ng is not installed.
        """
        self.args = args
        train, held_out = args.num_fillers
        self.fillers: dict[texts.Split, list[list[Turn]]] = {
            "train": _fillers(train, "train"),
            "eval": _fillers(held_out, "eval"),
        }
        wanted = [] if lazy else list(dict.fromkeys(self._wanted()))
        spoken = _speak_all(wanted, workers)
        self.words = [words for _, words in spoken]
        """Of the utterance at each place."""
        self.samples = [torch.from_numpy(samples) for samples, _ in spoken]
        """[S] each."""
        self._places = {utterance: place for place, utterance in enumerate(wanted)}

    def place(self, voice: Voice, text: str) -> int:
        """Return the place of an utterance, which is spoken now if it has not been.

        Raises:
            UserError: espeak-ng is not installed.
        """
        utterance = voice, text
        if utterance not in self._places:
            samples, words = _speak(utterance)
            self._places[utterance] = len(self.samples)
            self.samples.append(torch.from_numpy(samples))
            self.words.append(words)
        return self._places[utterance]

    def num_samples(self, place: int) -> int:
        """Return the length of an utterance."""
        return len(self.samples[place])

    def _wanted(self) -> Iterable[Utterance]:
        for name in NAMES:
            for kind, value in self.args.values:
                fact = Fact(kind, name, value)
                for voice in self.args.voices:
                    yield voice, fact.sentence
                    yield voice, fact.question
                # The value is an utterance of its own: spoken in one breath, the words before it
                # tell of it (coarticulation), and a model without memory guesses it.
                yield MOSHI_VOICE, fact.repetition
                yield MOSHI_VOICE, fact.statement
                yield MOSHI_VOICE, f"{value}."
        for text in (*ACKNOWLEDGMENTS, *texts.BACKCHANNELS):
            for voice in (MOSHI_VOICE, *self.args.voices):
                yield voice, text
        for voice in self.args.voices:
            yield voice, CUE
        for exchanges in self.fillers.values():
            for turns in exchanges:
                for is_user, text in turns:
                    yield from (
                        (voice, text) for voice in (self.args.voices if is_user else [MOSHI_VOICE])
                    )


def _fillers(count: int, split: texts.Split) -> list[list[Turn]]:
    rng = random.Random(f"fillers {split}")
    found: list[list[Turn]] = []
    while len(found) < count:
        # Users ask more than they answer.
        first = rng.choice((False, True, True))
        found.append(
            [
                (first == (position % 2 == 0), text)
                for position, text in enumerate(texts.topic(rng, split))
            ]
        )
    return found


def _speak(utterance: Utterance) -> tuple[np.ndarray, tuple[Word, ...]]:
    voice, text = utterance
    speech = synthesize(text, voice)
    return speech.samples.astype(np.float16), speech.words


def _speak_all(
    wanted: Sequence[Utterance], workers: int
) -> list[tuple[np.ndarray, tuple[Word, ...]]]:
    if workers == 1:
        return [_speak(utterance) for utterance in wanted]
    processes = multiprocessing.get_context("spawn")
    with processes.Pool(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.map(_speak, wanted, chunksize=_UTTERANCES_AT_ONCE)
