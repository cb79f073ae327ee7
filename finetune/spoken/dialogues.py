"""Dialogues in which a user tells facts and asks for them when attention has long lost them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

from finetune.data import FRAME_RATE_HZ
from finetune.spoken import texts
from finetune.spoken.bank import MOSHI_VOICE, Bank, Turn
from finetune.spoken.facts import ACKNOWLEDGMENTS, CUE, KINDS, NAMES, Fact
from finetune.spoken.sample_rate import SAMPLE_RATE_HZ

HELD_OUT_ONE_IN = 6
"""Of the pairs of a name and a value, so many are never told in training."""
_LEAD_SEC = 0.3
_GAP_SEC = (0.15, 0.6)
_AFTER_FILLER_SEC = (0.5, 1.2)
"""More silence, for the user's words are recorded: what Moshi says there when it speaks on its own
may be longer than what it was to say."""
_OVERLAP_SEC = (0.05, 0.3)
_OVERLAP_PROBABILITY = 0.15
_BACKCHANNEL_PROBABILITY = 0.2
_BACKCHANNEL_MIN_TURN_SEC = 2.0
_QUESTION_SEC = 3.8
"""A question with its answer, about."""
_FILLER_SEC = 12.0
"""The longest exchange between, about."""
_FILLER_AFTER_FACT = 0.25
_FILLER_BEFORE_QUESTION = 0.2


@dataclass(frozen=True)
class DialogueArgs:
    """Parameters of dialogues."""

    num_frames: int = 800
    num_facts: int = 6
    repeated_share: float = 0.5
    """Of the facts, those that Moshi repeats. Before the others the user says "Just listen.", and
    Moshi says "Okay." alone, so that the user's audio is all there is of them."""

    reach_frames: int = 144
    """How far attention carries anything: questions come later than that."""

    margin_frames: int = 4
    """On top of it."""

    def problems(self) -> list[str]:
        """Why no such dialogues can be made."""
        needed = self.reach_frames + FRAME_RATE_HZ * 2 * _QUESTION_SEC * self.num_facts / 2
        if self.num_frames < needed:
            return [
                f"{self.num_facts} facts and questions more than {self.reach_frames} frames later "
                f"do not fit into {self.num_frames} frames"
            ]
        return []


@dataclass
class Exchange:
    """A part of a dialogue that makes sense alone, until the next one begins. Times in seconds."""

    kind: Literal["fact", "question", "filler"]
    start_sec: float
    fact: Fact | None = None
    is_repeated: bool = False
    """A fact: Moshi repeats it."""
    value_sec: float = 0.0
    """A fact: when its value is first said by Moshi, or if it never is, by the user. A question:
    when the value that answers it is said."""
    last_sec: float = 0.0
    """A fact: the end of its last mention."""
    asked_sec: float = 0.0
    """A question: when the user begins to ask."""
    reply_sec: float = 0.0
    """A question: when Moshi begins to answer."""


@dataclass
class Spoken:
    """One utterance of the bank in a dialogue."""

    place: int
    is_user: bool
    start_samples: int

    @property
    def start_sec(self) -> float:
        return self.start_samples / SAMPLE_RATE_HZ


@dataclass
class Dialogue:
    """Who says what when, `voice` being the user's place in `BankArgs.voices`."""

    voice: int
    spoken: list[Spoken] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)


def is_held_out(fact: Fact) -> bool:
    """Return whether a fact is told in evaluation alone."""
    value = KINDS[fact.kind].values.index(fact.value)
    return (NAMES.index(fact.name) + value) % HELD_OUT_ONE_IN == 0


def draw_facts(
    rng: random.Random, kinds: tuple[str, ...], count: int, split: texts.Split
) -> list[Fact]:
    """Return facts of different people, no value twice."""
    found: list[Fact] = []
    for name in rng.sample(NAMES, count):
        kind = rng.choice(kinds)
        known = {fact.value for fact in found}
        facts = [Fact(kind, name, value) for value in KINDS[kind].values if value not in known]
        if split == "train":
            facts = [fact for fact in facts if not is_held_out(fact)]
        found.append(rng.choice(facts))
    return found


def compose(bank: Bank, args: DialogueArgs, split: texts.Split, rng: random.Random) -> Dialogue:
    """Draw a dialogue of `args.num_frames` frames: facts, filler, and each fact asked for once, in
    random order, beyond attention's reach. A question that finds no room is left out."""
    return _Composer(bank, args, split, rng).compose()


class _Composer:
    def __init__(self, bank: Bank, args: DialogueArgs, split: texts.Split, rng: random.Random):
        self.bank, self.args, self.split, self.rng = bank, args, split, rng
        self.dialogue = Dialogue(rng.randrange(bank.args.num_voices))
        self.now_sec = _LEAD_SEC
        self.total_sec = args.num_frames / FRAME_RATE_HZ

    def compose(self) -> Dialogue:
        args, rng = self.args, self.rng
        needed_sec = _QUESTION_SEC * args.num_facts
        told = []
        for fact in draw_facts(rng, self.bank.args.kinds, args.num_facts, self.split):
            told.append(self._tell(fact))
            room_sec = self.total_sec - self.now_sec - needed_sec - _FILLER_SEC
            if rng.random() < _FILLER_AFTER_FACT and room_sec > args.reach_frames / FRAME_RATE_HZ:
                self._fill()
        # Asked in the order told, "the oldest fact not yet asked" would answer most questions.
        for exchange in rng.sample(told, len(told)):
            room_sec = self.total_sec - self.now_sec - needed_sec
            if rng.random() < _FILLER_BEFORE_QUESTION and room_sec > _FILLER_SEC:
                self._fill()
            far_sec = (args.reach_frames + args.margin_frames) / FRAME_RATE_HZ
            # An answer's value is said at least a second after its question begins.
            while self.now_sec + 1.0 - exchange.last_sec < far_sec:
                self._fill()
            if self.now_sec + _QUESTION_SEC > self.total_sec:
                break
            assert exchange.fact is not None
            self._ask(exchange.fact)
            needed_sec -= _QUESTION_SEC
        while self.now_sec < self.total_sec:
            self._fill()
        end = round(self.total_sec * SAMPLE_RATE_HZ)
        self.dialogue.spoken = [s for s in self.dialogue.spoken if s.start_samples < end]
        return self.dialogue

    def _tell(self, fact: Fact) -> Exchange:
        exchange = self._begin(Exchange("fact", self.now_sec, fact))
        exchange.is_repeated = self.rng.random() < self.args.repeated_share
        if not exchange.is_repeated:
            self._say(True, CUE)
        word = self._say(True, fact.sentence)
        if exchange.is_repeated:
            word = self._say_with_value(fact.repetition, fact)
        else:
            self._say(False, self.rng.choice(ACKNOWLEDGMENTS))
        exchange.value_sec, exchange.last_sec = word
        return exchange

    def _ask(self, fact: Fact) -> None:
        exchange = self._begin(Exchange("question", self.now_sec, fact))
        exchange.asked_sec = self.now_sec
        self._say(True, fact.question)
        exchange.reply_sec = self.now_sec
        exchange.value_sec, _ = self._say_with_value(fact.statement, fact)

    def _fill(self) -> None:
        self._begin(Exchange("filler", self.now_sec))
        turns: list[Turn] = self.rng.choice(self.bank.fillers[self.split])
        for position, (is_user, text) in enumerate(turns):
            if position and self.rng.random() < _OVERLAP_PROBABILITY:
                # Nobody waits for the other's last word every time.
                self.now_sec -= self.rng.uniform(*_OVERLAP_SEC)
            start_sec = self.now_sec
            self._say(is_user, text)
            self._backchannel(not is_user, start_sec)
        self.now_sec += self.rng.uniform(*_AFTER_FILLER_SEC)

    def _backchannel(self, is_user: bool, start_sec: float) -> None:
        """Now and then, a word of the listener in the middle of what was just said."""
        spoken = self.dialogue.spoken[-1]
        duration_sec = self.bank.num_samples(spoken.place) / SAMPLE_RATE_HZ
        if duration_sec < _BACKCHANNEL_MIN_TURN_SEC or self.rng.random() > _BACKCHANNEL_PROBABILITY:
            return
        text = texts.backchannel(self.rng, self.split)
        at_sec = start_sec + duration_sec * self.rng.uniform(0.35, 0.5)
        self.dialogue.spoken.append(self._utterance(is_user, text, at_sec))

    def _begin(self, exchange: Exchange) -> Exchange:
        self.dialogue.exchanges.append(exchange)
        return exchange

    def _utterance(self, is_user: bool, text: str, start_sec: float) -> Spoken:
        voice = self.bank.args.voices[self.dialogue.voice] if is_user else MOSHI_VOICE
        return Spoken(self.bank.place(voice, text), is_user, round(start_sec * SAMPLE_RATE_HZ))

    def _say(self, is_user: bool, text: str, *, gap: bool = True) -> tuple[float, float]:
        """Say it now; returns when its last word starts and ends."""
        spoken = self._utterance(is_user, text, self.now_sec)
        self.dialogue.spoken.append(spoken)
        start_sec = spoken.start_sec
        end_sec = start_sec + self.bank.num_samples(spoken.place) / SAMPLE_RATE_HZ
        self.now_sec = end_sec + (self.rng.uniform(*_GAP_SEC) if gap else 0.0)
        word = self.bank.words[spoken.place][-1]
        return start_sec + word.start_sec, start_sec + word.end_sec

    def _say_with_value(self, statement: str, fact: Fact) -> tuple[float, float]:
        """Say a statement as Moshi, and its value as an utterance of its own, right behind."""
        self._say(False, statement, gap=False)
        return self._say(False, f"{fact.value}.")
