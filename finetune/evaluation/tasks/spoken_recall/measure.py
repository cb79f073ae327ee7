"""The model hears talks, many side by side, and speaks freely; its words are kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from finetune.data import FRAME_RATE_HZ
from finetune.evaluation.bench import Bench
from finetune.evaluation.progress import Progress
from finetune.evaluation.tasks.spoken_recall.options import RecallOptions
from finetune.kept import Records
from finetune.serve import Engine, Row, Spoken, Words, open_engine
from finetune.spoken import Talk, in_window

logger = logging.getLogger(__name__)

_BEFORE_SEC = 1.0
"""Words are kept from so long before a question's window on, for who reads the records."""


@dataclass(frozen=True, eq=False)
class Job:
    """A talk to be heard in one of the ways."""

    talk: Talk
    arm: str


class Listening:
    """Has every talk heard in every way that is not in the records yet.

    All rows of a batch begin together, so that the arms of a talk hear the same sound, made once.
    What is drawn depends on the batch alone, which is heard again as a whole if one of its talks is
    not in the records: what was interrupted goes on as if it had not been.
    """

    def __init__(
        self,
        bench: Bench,
        talks: Sequence[Talk],
        arms: Sequence[str],
        options: RecallOptions,
        records: Records,
    ) -> None:
        self.bench, self.options, self.records = bench, options, records
        self._left = [Job(talk, arm) for talk in talks for arm in arms]
        size = bench.options.batch_size
        self._num_rows = min(size, len(self._left))
        self._batches = [self._left[at : at + size] for at in range(0, len(self._left), size)]
        done = {(record["talk"], record["arm"]) for record in records}
        self._left = [job for job in self._left if (job.talk.index, job.arm) not in done]
        self._frame_samples = int(bench.codec.mimi.frame_size)
        self._stop_at: float | None = None

    @property
    def num_left(self) -> int:
        """Return how many talks have not been heard to their end."""
        return len(self._left)

    def run(self) -> None:
        """Hear what is left, as far as the time allows."""
        bench, options = self.bench, self.options
        batches = {n: batch for n, batch in enumerate(self._batches) if {*batch} & {*self._left}}
        if not batches:
            return
        if options.max_minutes is not None:
            self._stop_at = time.monotonic() + 60 * options.max_minutes
        lengths = [[self._num_frames(job) for job in batch] for batch in batches.values()]
        progress = Progress("spoken_recall", sum(map(sum, lengths)))
        logger.info(
            "spoken_recall: to hear: %d (each talk once an arm), %.1f minutes, %d steps of %d rows",
            len(self._left),
            progress.total / FRAME_RATE_HZ / 60,
            sum(map(max, lengths)),
            self._num_rows,
        )
        devices = [bench.model.device] if bench.model.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=devices),
            open_engine(
                bench.model,
                bench.codec,
                max_users=self._num_rows,
                temperature=options.temperature,
                text_temperature=options.text_temperature,
                has_voice=False,
            ) as engine,
        ):
            for number, batch in batches.items():
                torch.manual_seed(bench.options.seed + number)
                for job, record in self._hear(engine, batch, progress):
                    if job in self._left:
                        self.records.append(record)
                        self._left.remove(job)
                if self._is_late():
                    return

    def _is_late(self) -> bool:
        return self._stop_at is not None and time.monotonic() > self._stop_at

    def _num_frames(self, job: Job) -> int:
        return -(-job.talk.num_samples // self._frame_samples)

    def _hear(
        self, engine: Engine, batch: Sequence[Job], progress: Progress
    ) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Hear the talks of a batch side by side; yield the record of each that has ended."""
        sounds = {job.talk.index: self._sound(job.talk) for job in batch}
        going = [_Conversation(job, engine, self._num_frames(job)) for job in batch]
        try:
            while going and not self._is_late():
                heard = {index: next(sounds[index]) for index in {c.talk.index for c in going}}
                for each in going:
                    each.forget_before_questions()
                spoken = engine.step({c.row.index: heard[c.talk.index] for c in going})
                for each in going:
                    if each.row.index in spoken:
                        each.add(spoken[each.row.index])
                progress.advance(len(going))
                for each in [c for c in going if c.is_done]:
                    going.remove(each)
                    engine.leave(each.row)
                    yield each.job, each.record()
        finally:
            for each in going:
                engine.leave(each.row)

    def _sound(self, talk: Talk) -> Iterator[np.ndarray]:
        """Return what the user says, frame by frame, and silence for ever after."""
        for block in talk.blocks(self._frame_samples):
            yield block.astype(np.float32) / 32768
        while True:
            yield np.zeros(self._frame_samples, np.float32)


class _Conversation:
    """A talk that is being heard, in one row of the engine."""

    def __init__(self, job: Job, engine: Engine, num_frames: int) -> None:
        self.job, self.talk, self.engine, self.num_frames = job, job.talk, engine, num_frames
        row = engine.join(ttt_on=job.arm != "off")
        assert row is not None, "a batch is no larger than the engine"
        self.row: Row = row
        self.words = Words(engine.codec)
        self.healthy = True
        self._resets = {int(q.span.sec[0] * FRAME_RATE_HZ) for q in self.talk.questions}

    @property
    def is_done(self) -> bool:
        return self.words.num_frames == self.num_frames

    def forget_before_questions(self) -> None:
        """Have TTT forget all that it has learned, if a question begins in the next frame and the
        arm is `reset`."""
        if self.job.arm == "reset" and self.row.num_frames in self._resets:
            self.engine.forget(self.row)

    def add(self, said: Spoken) -> None:
        self.words.add(said.text_token)
        self.healthy &= said.healthy

    def record(self) -> dict[str, Any]:
        self.words.close()
        windows = [question.window.sec for question in self.talk.questions]
        kept = [w for a, b in windows for w in in_window(self.words.done, a - _BEFORE_SEC, b)]
        return {
            "talk": self.talk.index,
            "arm": self.job.arm,
            "healthy": self.healthy,
            "num_words": len(self.words.done),
            "words": kept,
        }
