"""A scripted user: tells facts, talks of other things, and asks for some of the facts, each once.

A talk is a function of its options, its number and the seed. Facts and questions have their places
before anything else is said; the sentences between them are drawn, spoken and forgotten one by one,
so that an hour takes no more memory than a minute.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Le

from finetune.config import Size
from finetune.errors import UserError
from finetune.spoken import texts
from finetune.spoken.facts import KINDS, NAMES, Fact
from finetune.spoken.sample_rate import SAMPLE_RATE_HZ
from ttt.options import OneOf

if TYPE_CHECKING:
    import numpy as np

    from finetune.spoken.speech import Speech, Voice

FORMAT = 2
"""Raise it when the same options give other bytes."""

LEAD_SEC = 1.0
"""Silence before the first fact, and after the last answer."""
AFTER_FACT_SEC = 4.0
"""Silence after a fact, in which Moshi may repeat it."""
BEFORE_QUESTION_SEC = 2.0
"""Silence before a question, in which Moshi may end what it says."""
AFTER_FILLER_SEC = (1.0, 2.5)
"""Silence after what the user says between facts and questions, in which Moshi may reply."""
NEVER_ASKED = 2
"""Facts that are told and not asked for, so that the last question cannot be answered by what is
left over."""

_MAX_MISSES = 3  # so many sentences may be too long for the time that is left before a question
_MAX_DRAWS = 1000
_PITCH, _WORDS_PER_MIN, _LOUDNESS = (35, 55), (150, 175), (0.6, 0.8)

Distance = Annotated[float, Ge(10), Le(3600)]
Kind = Annotated[str, OneOf(KINDS.keys)]
Role = Literal["fact", "filler", "question"]


@dataclass(frozen=True)
class TalkOptions:
    """These options say what the scripted users of a test of memory tell and ask."""

    num_talks: Size = 12
    """How many talks; they go through kinds and voices in turn."""

    distances_sec: tuple[Distance, ...] = (10.0, 30.0, 60.0, 120.0, 240.0, 480.0)
    """Seconds from the end of a fact to the end of its question; one fact is asked for at each."""

    num_facts: Annotated[int, Ge(1), Le(len(NAMES))] | None = None
    """Facts told at the start of a talk; null: two more than are asked for."""

    kinds: tuple[Kind, ...] = tuple(KINDS)
    """Kinds of facts, of which each talk has one: thing, place, number."""

    voices: tuple[str, ...] = ("en-us+m2", "en-us+f2", "en-us+m6", "en-us+f5")
    """Voices of espeak-ng, of which each talk has one."""

    answer_sec: Annotated[float, Ge(1), Le(60)] = 4.0
    """Silence after a question: what is said in it is the answer."""


@dataclass(frozen=True)
class Span:
    """A stretch of a talk, in samples; of words, from the start of the first to the end of the
    last."""

    start: int
    stop: int

    @property
    def sec(self) -> tuple[float, float]:
        """Return start and end in seconds, to a tenth of a millisecond."""
        return round(self.start / SAMPLE_RATE_HZ, 4), round(self.stop / SAMPLE_RATE_HZ, 4)


@dataclass(frozen=True)
class Told:
    """A fact, and when its words are said."""

    fact: Fact
    span: Span


@dataclass(frozen=True)
class Question:
    """A question for a fact.

    span: of its words. told: of the fact's words. window: where the answer is looked for.
    oldest, newest: the values of the oldest and the newest fact that have not been asked for
    before, which a model would answer that knows values and not whose they are.
    """

    fact: Fact
    distance_sec: float
    told: Span
    span: Span
    window: Span
    oldest: str
    newest: str


@dataclass(frozen=True)
class Utterance:
    """Something that the user says.

    span: of its words. samples: int16 [S] at 24 kHz, with the silence at the end of its sound.
    """

    role: Role
    text: str
    span: Span
    samples: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Talk:
    """The sayings of one scripted user, with their times.

    `questions` are in the order in which they are asked.
    """

    index: int
    seed: int
    voice: Voice
    loudness: float
    facts: tuple[Told, ...]
    questions: tuple[Question, ...]
    num_samples: int

    @property
    def kind(self) -> str:
        return self.facts[0].fact.kind

    @property
    def duration_sec(self) -> float:
        return self.num_samples / SAMPLE_RATE_HZ

    def utterances(self) -> Iterator[Utterance]:
        """Speak all that the user says, in order, one by one."""
        rng = random.Random(f"spoken recall, filler {self.seed} {self.index}")
        for told in self.facts:
            yield self._speak("fact", told.fact.sentence, told.span.start)
        free = self.facts[-1].span.stop + _samples(AFTER_FACT_SEC)
        for question in self.questions:
            until = question.span.start - _samples(BEFORE_QUESTION_SEC)
            yield from self._fill(rng, free, until)
            yield self._speak("question", question.fact.question, question.span.start)
            free = question.window.stop

    def blocks(self, block_samples: int) -> Iterator[np.ndarray]:
        """Return the talk as int16 [block_samples] at 24 kHz, the last one padded with zeros."""
        return sound(self.utterances(), self.num_samples, block_samples)

    def _fill(self, rng: random.Random, start: int, stop: int) -> Iterator[Utterance]:
        """Speak of other things for as long as whole sentences fit."""
        misses = 0
        while misses < _MAX_MISSES:
            # Every other turn of an exchange: the user's; in the pauses between them Moshi may
            # take the others.
            for text in texts.topic(rng, "eval")[::2]:
                said = self._speak("filler", text, start)
                if start + len(said.samples) > stop:
                    misses += 1
                    break
                yield said
                start += len(said.samples) + _samples(rng.uniform(*AFTER_FILLER_SEC))

    def _speak(self, role: Role, text: str, start: int) -> Utterance:
        import numpy as np

        from finetune.spoken.speech import synthesize

        speech = synthesize(text, self.voice)
        samples = np.rint(speech.samples * self.loudness * 32767).astype(np.int16)
        return Utterance(role, text, _span(speech, start), samples)


def sound(
    utterances: Iterable[Utterance], num_samples: int, block_samples: int
) -> Iterator[np.ndarray]:
    """Return utterances with the silence between them, as int16 [block_samples], the last block
    padded with zeros."""
    import numpy as np

    def pieces() -> Iterator[np.ndarray]:
        done = 0
        for each in utterances:
            yield np.zeros(each.span.start - done, np.int16)
            yield each.samples
            done = each.span.start + len(each.samples)
        yield np.zeros(num_samples - done, np.int16)
        yield np.zeros(-num_samples % block_samples, np.int16)

    block, filled = np.zeros(block_samples, np.int16), 0
    for piece in pieces():
        while len(piece):
            part, piece = np.split(piece, [block_samples - filled])
            block[filled : filled + len(part)] = part
            filled += len(part)
            if filled == block_samples:
                yield block
                block, filled = np.zeros(block_samples, np.int16), 0


def make_talk(options: TalkOptions, index: int, seed: int, *, prefix: str = "--") -> Talk:
    """Return a talk, in which facts and questions have their places.

    Args:
        prefix: how the names of the options begin where they were given, for messages.

    Raises:
        UserError: more facts are asked for than are told; the distances leave no room for the
            answers between them; or espeak-ng is not installed, or has no such voice.
    """
    from finetune.spoken.speech import Voice, synthesize

    rng = random.Random(f"spoken recall {seed} {index}")
    num_facts = options.num_facts or min(len(options.distances_sec) + NEVER_ASKED, len(NAMES))
    if num_facts < len(options.distances_sec):
        raise UserError(
            f"{prefix}num_facts: {num_facts} facts cannot be asked for at "
            f"{len(options.distances_sec)} distances: each is asked for once, and there are at "
            f"most {len(NAMES)}. Give more facts, or fewer {prefix}distances_sec."
        )
    kind = KINDS[options.kinds[index % len(options.kinds)]]
    names, values = rng.sample(NAMES, num_facts), rng.sample(kind.values, num_facts)
    voice = Voice(
        options.voices[index % len(options.voices)],
        pitch=rng.randint(*_PITCH),
        words_per_min=rng.randint(*_WORDS_PER_MIN),
    )
    loudness = rng.uniform(*_LOUDNESS)
    facts, end = [], _samples(LEAD_SEC)
    for name, value in zip(names, values, strict=True):
        fact = Fact(kind.name, name, value)
        facts.append(Told(fact, _span(synthesize(fact.sentence, voice), end)))
        end = facts[-1].span.stop + _samples(AFTER_FACT_SEC)
    # Samples that the words of each question take.
    asking = [_span(synthesize(told.fact.question, voice), 0).stop for told in facts]
    for _ in range(_MAX_DRAWS):
        chosen = rng.sample(range(num_facts), len(options.distances_sec))
        questions = _place(options, facts, chosen, asking, end)
        if questions is not None:
            stop = questions[-1].window.stop + _samples(LEAD_SEC)
            return Talk(index, seed, voice, loudness, tuple(facts), questions, stop)
    raise UserError(
        f"{prefix}distances_sec: there is no room for these questions: each takes about "
        f"{max(asking) / SAMPLE_RATE_HZ + BEFORE_QUESTION_SEC + options.answer_sec:.0f} s with its "
        f"answer, and the {num_facts} facts before them take {end / SAMPLE_RATE_HZ:.0f} s. Choose "
        f"distances farther apart, fewer facts ({prefix}num_facts), or less time for answers "
        f"({prefix}answer_sec)."
    )


def _place(
    options: TalkOptions, facts: list[Told], chosen: list[int], asking: list[int], free: int
) -> tuple[Question, ...] | None:
    """Return the questions of the chosen facts, one for each distance, in order of time; None if
    one would begin before the one before it has been answered, or before all facts are told."""
    due = [
        (facts[fact].span.stop + _samples(distance_sec), distance_sec, fact)
        for distance_sec, fact in zip(options.distances_sec, chosen, strict=True)
    ]
    questions: list[Question] = []
    asked: set[int] = set()
    for stop, distance_sec, fact in sorted(due):
        start = stop - asking[fact]
        if start < free + _samples(BEFORE_QUESTION_SEC):
            return None
        free = stop + _samples(options.answer_sec)
        left = [told.fact.value for number, told in enumerate(facts) if number not in asked]
        asked.add(fact)
        questions.append(
            Question(
                facts[fact].fact,
                distance_sec,
                facts[fact].span,
                Span(start, stop),
                Span(stop, free),
                left[0],
                left[-1],
            )
        )
    return tuple(questions)


def _span(speech: Speech, start: int) -> Span:
    """Return from where to where something is said that begins at a sample: its sound goes on for
    some milliseconds of silence."""
    return Span(start, start + _samples(speech.words[-1].end_sec))


def _samples(duration_sec: float) -> int:
    return round(duration_sec * SAMPLE_RATE_HZ)
