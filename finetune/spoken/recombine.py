"""New dialogues out of segments of encoded ones, so that nothing can be learned by heart.

Some thousand dialogues are a model's to remember, with all that is answered in them. Their codes
are cut in the pauses between exchanges and put together anew. A question, the answer's first words
and its value are drawn apart: as one piece, the question's codes, which are one of some thousand
renderings, would tell what was answered to them once.

With pauses they are less even: now and then nobody speaks for some seconds, as people do, Moshi
says nothing to what the user talks of, or the user asks while Moshi still speaks of something else,
and it falls silent and answers.
"""

from __future__ import annotations

import multiprocessing
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from finetune.spoken.codes import NO_ANSWER, Answer, EncodedDialogues, frame_of
from finetune.spoken.dialogues import Dialogue, DialogueArgs, is_held_out
from finetune.spoken.facts import KINDS, NAMES, Fact

_LEAD_FRAMES = 2
_QUESTION_FRAMES = 48
"""A question with its answer, and the pause behind it, about."""
_UNTIL_VALUE_FRAMES = 10
"""From the beginning of a question to the value at least."""
_FILLER_FRAMES = 150
_FILLER_AFTER_FACT = 0.25
_FILLER_BEFORE_QUESTION = 0.2
_DIALOGUES_AT_ONCE = 250
_PAUSE_PROBABILITY = 0.3
_PAUSE_FRAMES = (6, 50)
_UNANSWERED_PROBABILITY = 0.05
"""Seldom: with one in five, Moshi takes facts for such talk now and then, and says nothing."""
_INTERRUPTED_PROBABILITY = 0.25
_UNTIL_INTERRUPTED_FRAMES = (1, 12)
"""From Moshi's first word of something else to the user's question."""
_STILL_SPEAKING_FRAMES = (3, 12)
"""Of a question, in which Moshi has not fallen silent yet."""
_NOBODY = -1
"""The dialogue of a pause."""


class Segment(NamedTuple):
    """Frames `first … end − 1` of an encoded dialogue, or so many of a pause."""

    dialogue: int
    first: int
    end: int
    marks: tuple[int, ...] = ()
    """Places that matter, in frames from `first`."""
    is_unanswered: bool = False
    """Moshi says nothing in it."""
    over: Segment | None = None
    """What Moshi says in its first frames instead, of another dialogue."""

    @property
    def num_frames(self) -> int:
        return self.end - self.first


class Silence(NamedTuple):
    """A side that says nothing."""

    token: int
    """Of the text."""
    codes: np.ndarray
    """[8, T], at least as long as any segment."""


class Pool:
    """Segments by what is said in them, and by the user's voice where it is heard.

    Args:
        tokens: first tokens of the values, see `value_tokens`.
        silence: None: these dialogues have no pauses.
    """

    def __init__(
        self,
        spoken: EncodedDialogues,
        dialogues: Sequence[Dialogue],
        tokens: list[list[int]],
        silence: Silence | None = None,
    ) -> None:
        self.text, self.codes = spoken.text.numpy(), spoken.codes.numpy()
        self.silence = silence
        self.fillers: dict[int, list[Segment]] = defaultdict(list)
        self.facts: dict[tuple[int, str], dict[tuple[Fact, bool], list[Segment]]] = defaultdict(
            lambda: defaultdict(list)
        )
        """By voice and name: the facts with whether Moshi repeats them; marks: the frame of the
        first value in Moshi's text, and the one behind the last mention."""
        self.questions: dict[tuple[int, str, str], list[Segment]] = defaultdict(list)
        """By voice, kind and name; marks: the question's first frame."""
        self.statements: dict[tuple[str, str], list[Segment]] = defaultdict(list)
        """By kind and name, what Moshi says before the value."""
        self.values: dict[Fact, list[Segment]] = defaultdict(list)
        self._tokens = tokens
        for index, dialogue in enumerate(dialogues):
            self._cut(index, dialogue)

    def _token(self, fact: Fact) -> int:
        return self._tokens[list(KINDS).index(fact.kind)][KINDS[fact.kind].values.index(fact.value)]

    def _cut(self, index: int, dialogue: Dialogue) -> None:
        text, voice = self.text[index], dialogue.voice
        starts = [frame_of(exchange.start_sec) - 1 for exchange in dialogue.exchanges]
        # What is last reaches past the end of the dialogue.
        for exchange, first, end in zip(dialogue.exchanges, starts, starts[1:], strict=False):
            if end > len(text):
                break
            fact, value = exchange.fact, frame_of(exchange.value_sec)
            if fact is None:
                self.fillers[voice].append(Segment(index, first, end))
            elif exchange.kind == "fact":
                # Two words in one frame: the value has no token.
                if exchange.is_repeated and text[value] != self._token(fact):
                    continue
                marks = (value - first, frame_of(exchange.last_sec) + 1 - first)
                known = self.facts[voice, fact.name][fact, exchange.is_repeated]
                known.append(Segment(index, first, end, marks))
            elif text[value] == self._token(fact):
                reply = frame_of(exchange.reply_sec) - 1
                asked = (frame_of(exchange.asked_sec) - first,)
                self.questions[voice, fact.kind, fact.name].append(
                    Segment(index, first, reply, asked)
                )
                self.statements[fact.kind, fact.name].append(Segment(index, reply, value))
                self.values[fact].append(Segment(index, value, end))

    def streams(self, segment: Segment) -> tuple[np.ndarray, np.ndarray]:
        """Return the text [T] and the codes [16, T] of a segment."""
        if segment.over is not None:
            return self._spoken_over(segment._replace(over=None), segment.over)
        index, first, end = segment[:3]
        if index != _NOBODY and not segment.is_unanswered:
            return self.text[index, first:end], self.codes[index, :, first:end]
        assert self.silence is not None
        nothing = self.silence.codes[:, : segment.num_frames]
        user = nothing if index == _NOBODY else self.codes[index, len(nothing) :, first:end]
        text = np.full(segment.num_frames, self.silence.token, self.text.dtype)
        return text, np.concatenate([nothing, user])

    def _spoken_over(self, segment: Segment, over: Segment) -> tuple[np.ndarray, np.ndarray]:
        (text, codes), (other_text, other_codes) = map(self.streams, (segment, over))
        num_frames, moshi = over.num_frames, codes.shape[0] // 2
        text, codes = text.copy(), codes.copy()
        text[:num_frames] = other_text
        codes[:moshi, :num_frames] = other_codes[:moshi]
        return text, codes

    def tellable(self, voice: int, name: str) -> list[tuple[Fact, bool]]:
        """Return the facts of a person that can be told and asked for in a voice."""
        return [
            (fact, is_repeated)
            for fact, is_repeated in self.facts[voice, name]
            if self.values[fact]
            and self.questions[voice, fact.kind, name]
            and self.statements[fact.kind, name]
        ]


class _Told(NamedTuple):
    fact: Fact
    is_repeated: bool
    value: int
    last: int


class _Composer:
    """One new dialogue."""

    def __init__(self, pool: Pool, args: DialogueArgs, rng: random.Random) -> None:
        self.pool, self.args, self.rng = pool, args, rng
        self.voice = rng.choice(sorted(pool.fillers))
        self.parts = [Segment(rng.randrange(len(pool.text)), 0, _LEAD_FRAMES)]
        self.now = _LEAD_FRAMES

    def compose(self, num_frames: int, filler_frames: int, *, spread: bool) -> list[Answer]:
        args, rng = self.args, self.rng
        # Of the additional filler, how much has been said before each of the first questions.
        due = self._cuts(filler_frames, args.num_facts) if spread else [filler_frames]
        needed = _QUESTION_FRAMES * args.num_facts
        told: list[_Told] = []
        for name in rng.sample(NAMES, args.num_facts):
            self._tell(name, told)
            room = num_frames - filler_frames - self.now - needed - _FILLER_FRAMES
            if rng.random() < _FILLER_AFTER_FACT and room > args.reach_frames:
                self._fill()
        start, answers = self.now, []
        for place, order in enumerate(rng.sample(range(len(told)), len(told))):
            if place < len(due):
                self._fill_until(start + due[place] + _QUESTION_FRAMES * place)
                later = filler_frames - due[place]
            room = num_frames - later - self.now - needed
            if rng.random() < _FILLER_BEFORE_QUESTION and room > _FILLER_FRAMES:
                self._fill()
            far = args.reach_frames + args.margin_frames - _UNTIL_VALUE_FRAMES
            self._fill_until(told[order].last + far)
            if self.now + _QUESTION_FRAMES > num_frames:
                break
            answers.append(self._ask(told[order], order))
            needed -= _QUESTION_FRAMES
        self._fill_until(num_frames)
        return [answer for answer in answers if answer.frame < num_frames]

    def _cuts(self, frames: int, count: int) -> list[int]:
        """Divide frames into `count` parts at random; returns where they end."""
        return [*sorted(self.rng.randint(0, frames) for _ in range(count - 1)), frames]

    def _put(self, segments: Sequence[Segment]) -> tuple[int, Segment]:
        """Continue with one of them; returns where it begins, and which it is."""
        segment, start = self.rng.choice(segments), self.now
        self._append(segment)
        return start, segment

    def _append(self, segment: Segment) -> None:
        self.parts.append(segment)
        self.now += segment.num_frames

    def _chance(self, probability: float) -> bool:
        return self.pool.silence is not None and self.rng.random() < probability

    def _pause(self) -> None:
        if self._chance(_PAUSE_PROBABILITY):
            self._append(Segment(_NOBODY, 0, self.rng.randint(*_PAUSE_FRAMES)))

    def _fill(self) -> None:
        self._pause()
        filler = self.rng.choice(self.pool.fillers[self.voice])
        self._append(filler._replace(is_unanswered=self._chance(_UNANSWERED_PROBABILITY)))

    def _fill_until(self, frame: int) -> None:
        while self.now < frame:
            self._fill()

    def _tell(self, name: str, told: list[_Told]) -> None:
        self._pause()
        known = {each.fact.value for each in told}
        tellable = [
            (fact, is_repeated)
            for fact, is_repeated in self.pool.tellable(self.voice, name)
            if fact.value not in known
        ]
        if tellable:
            fact, is_repeated = self.rng.choice(tellable)
            start, segment = self._put(self.pool.facts[self.voice, name][fact, is_repeated])
            value, last = (start + mark for mark in segment.marks)
            told.append(_Told(fact, is_repeated, value, last))

    def _speak_of_something_else(self) -> Segment | None:
        """Let Moshi begin to; returns what it goes on with, if there is enough of it."""
        filler = self.rng.choice(self.pool.fillers[self.voice])
        assert self.pool.silence is not None
        text = self.pool.text[filler.dialogue, filler.first : filler.end]
        first_word = (text != self.pool.silence.token).argmax()
        asked = filler.first + int(first_word) + self.rng.randint(*_UNTIL_INTERRUPTED_FRAMES)
        silent = asked + self.rng.randint(*_STILL_SPEAKING_FRAMES)
        if silent > filler.end:
            return None
        self._append(filler._replace(end=asked))
        return filler._replace(first=asked, end=silent)

    def _ask(self, told: _Told, order: int) -> Answer:
        over = None
        if self._chance(_INTERRUPTED_PROBABILITY):
            over = self._speak_of_something_else()
        else:
            self._pause()
        fact, pool = told.fact, self.pool
        start, question = self._put(pool.questions[self.voice, fact.kind, fact.name])
        if over is not None:
            end = min(over.end, over.first + question.num_frames)
            self.parts[-1] = question._replace(over=over._replace(end=end))
        self._put(pool.statements[fact.kind, fact.name])
        frame, _ = self._put(pool.values[fact])
        assert frame - told.last > self.args.reach_frames
        return Answer(
            frame,
            list(KINDS).index(fact.kind),
            KINDS[fact.kind].values.index(fact.value),
            int(told.is_repeated),
            frame - told.last,
            start + question.marks[0],
            told.value,
            order,
            int(is_held_out(fact)),
        )


def recombine(
    pool: Pool,
    args: DialogueArgs,
    count: int,
    *,
    seed: int,
    filler_frames: int = 0,
    spread: bool = False,
    workers: int = 1,
) -> EncodedDialogues:
    """Return `count` new dialogues of `args.num_frames + filler_frames` frames, with so much more
    filler between facts and questions, or with `spread` between the questions as well."""
    jobs = [
        (args, seed, first, min(first + _DIALOGUES_AT_ONCE, count), filler_frames, spread)
        for first in range(0, count, _DIALOGUES_AT_ONCE)
    ]
    global _pool
    _pool = pool
    if min(workers, len(jobs)) == 1:
        parts = [_recombine(job) for job in jobs]
    else:
        # Forked, so that the pool is not copied to each.
        with multiprocessing.get_context("fork").Pool(workers) as processes:
            parts = processes.map(_recombine, jobs, chunksize=1)
    return EncodedDialogues(
        *(torch.from_numpy(np.concatenate(each)) for each in zip(*parts, strict=True))
    )


_pool: Pool
"""What the processes of `recombine` share."""


def _recombine(job: tuple[DialogueArgs, int, int, int, int, bool]) -> tuple[np.ndarray, ...]:
    args, seed, first, end, filler_frames, spread = job
    num_frames = args.num_frames + filler_frames
    text = np.empty((end - first, num_frames), np.int16)
    codes = np.empty((end - first, _pool.codes.shape[1], num_frames), np.uint8)
    answers = np.full((end - first, args.num_facts, len(NO_ANSWER)), -1, np.int32)
    for row in range(end - first):
        composer = _Composer(_pool, args, random.Random(f"recombine {seed} {first + row}"))
        found = composer.compose(num_frames, filler_frames, spread=spread)
        texts, parts = zip(*map(_pool.streams, composer.parts), strict=True)
        text[row] = np.concatenate(texts)[:num_frames]
        codes[row] = np.concatenate(parts, 1)[:, :num_frames]
        answers[row, : len(found)] = np.array(found).reshape(-1, len(NO_ANSWER))
    return text, codes, answers
