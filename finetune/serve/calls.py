"""Calls wait here with what they have said, and a loop lets the model hear it."""

import asyncio
import json
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np

from finetune.data import FRAME_RATE_HZ
from finetune.serve.engine import Engine, Row, Samples, Spoken
from finetune.serve.metrics import ServerMetrics
from finetune.serve.options import reset_every_frames
from finetune.serve.wire import Action
from finetune.serve.words import Words

logger = logging.getLogger(__name__)

FRAME_SEC = 1 / FRAME_RATE_HZ
INBOX_FRAMES = 25
"""Frames that a caller may send ahead: 2 s. More is not read until these have been heard."""
OUTBOX_FRAMES = 50
"""Frames that a caller may leave unread: 4 s, and what the network holds. Then the call waits."""
CHANGES_EVERY_STEPS = 5

Result = TypeVar("Result")


def log_event(event: str, **fields: Any) -> None:
    """A line of JSON: never audio, words or a call's key."""
    logger.info("%s", json.dumps({"event": event, **fields}))


@dataclass
class Answer:
    """A frame for a caller."""

    spoken: Spoken
    waited_sec: float
    """Seconds from when the caller's frame was there until its answer was."""
    number: int | None = None
    """Of the caller's frame that it goes with; None: silence in the place of a late one."""
    changes: dict[int, float] | None = None
    """Distance of the fast weights from their start, by TTT layer; now and then."""


@dataclass
class Waiting:
    """A frame or a request of a caller, which waits for its turn."""

    item: Samples | Action
    came_at: float
    number: int | None = None
    """Of a frame, among all frames of the call from 0 on; None: no frame of the caller's."""


@dataclass
class Call:
    """A call is one caller's conversation."""

    row: Row
    number: int
    words: Words
    begin_at: float = 0.0
    """Time at which the caller should begin; see `Engine.join`."""
    key: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    """A secret: it lets read and replace the conversation's state."""
    inbox: deque[Waiting] = field(default_factory=deque)
    """Frames and requests in their order."""
    unanswered: deque[int | None] = field(default_factory=deque)
    """Numbers of the frames that were heard and not answered yet; see `Engine.lag_frames`."""
    outbox: asyncio.Queue[Answer] = field(
        default_factory=lambda: asyncio.Queue(maxsize=OUTBOX_FRAMES)
    )
    room: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while the inbox has some."""
    broken: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the model has become NaN in this row."""
    due_at: float | None = None
    """Time at which the next frame should be there; None: the caller has not begun."""
    wants_changes: bool = False
    """The caller is told now and then how far the fast weights are from their start."""
    changes: dict[int, float] | None = None
    """That distance by TTT layer, for the next answer."""
    num_late: int = 0
    num_silences: int = 0
    """Silences heard in the place of late frames that have not come yet."""
    drop: Callable[[], None] = lambda: None
    """Told of every frame that is not heard."""
    num_received: int = 0
    """Frames that have come, heard or not."""
    _rest: Samples = field(default_factory=lambda: np.zeros(0, dtype=np.float32))

    def __post_init__(self) -> None:
        self.room.set()

    async def hear(self, samples: Samples, frame_samples: int, wake: Callable[[], None]) -> None:
        """Take samples in; waits while the caller is too far ahead."""
        samples = np.nan_to_num(samples, posinf=0.0, neginf=0.0).clip(-1, 1)
        self._rest = np.concatenate([self._rest, samples])
        while len(self._rest) >= frame_samples:
            frame, self._rest = self._rest[:frame_samples], self._rest[frame_samples:]
            number, self.num_received = self.num_received, self.num_received + 1
            if self.num_silences and self._is_early():
                # Silence was heard in its place. To hear it as well would keep the delay for ever.
                self.num_silences -= 1
                self.drop()
            else:
                await self.put(frame, wake, number)

    def _is_early(self) -> bool:
        """Return whether a frame that comes now is ahead of the clock, as are those that a stalled
        network delivers at once. What somebody says after a silence of theirs is not."""
        if self.due_at is None:
            return False
        due_at = self.due_at + len(self.inbox) * FRAME_SEC
        return due_at - time.monotonic() > FRAME_SEC / 2

    async def put(
        self, item: Samples | Action, wake: Callable[[], None], number: int | None = None
    ) -> None:
        await self.room.wait()
        self.inbox.append(Waiting(item, time.monotonic(), number))
        if len(self.inbox) >= INBOX_FRAMES:
            self.room.clear()
        wake()

    def take(self) -> Waiting:
        item = self.inbox.popleft()
        self.room.set()
        return item


@dataclass(eq=False)
class Heard:
    """A frame that is to be heard, and when it came."""

    call: Call
    frame: Samples
    came_at: float
    number: int | None
    """See `Waiting`."""


class Switchboard:
    """A switchboard holds all calls of a server, on one engine.

    The model computes in a thread of its own; everything else is of the event loop.

    Args:
        on_late: what a conversation does for which no frame has come in time.
        ttt: as `--ttt`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        on_late: Literal["pause", "silence"] = "pause",
        ttt: str = "on",
    ) -> None:
        self.engine = engine
        self.on_late, self.ttt = on_late, ttt
        self.calls: dict[str, Call] = {}
        max_users = len(engine.rows)
        state_bytes = engine.row_bytes() * max_users
        self.metrics = ServerMetrics(lambda: len(self.calls), state_bytes, max_users)
        self._silence: Samples = np.zeros(engine.frame_samples, dtype=np.float32)
        self.is_over = False
        """Nobody is heard any more; the engine may not be used."""
        self._num_calls = self._num_steps = 0
        self._wake = asyncio.Event()
        self._engine_is_free = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    def wake(self) -> None:
        """Something has come that the loop should look at."""
        self._wake.set()

    async def use_engine(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call a function of the engine between two steps."""
        async with self._engine_is_free:
            running = asyncio.get_running_loop()
            done = running.run_in_executor(self._thread, partial(function, *args))
            # Canceled or not, the lock is kept until the engine is free again.
            try:
                return await asyncio.shield(done)
            except asyncio.CancelledError:
                await asyncio.wait([done])
                raise

    async def join(self, *, wants_changes: bool = False) -> Call | None:
        """Begin a call; None: there is no free row."""
        use = self.ttt

        def joined() -> Row | None:
            return self.engine.join(
                ttt_on=use != "off",
                reset_every_frames=reset_every_frames(use),
                now_frame=int(time.monotonic() / FRAME_SEC),
            )

        row = await self.use_engine(joined)
        if row is None:
            return None
        self._num_calls += 1
        drop = self.metrics.dropped_frames.inc
        words = Words(self.engine.codec)
        begin_at = row.begin_frame * FRAME_SEC
        call = Call(row, self._num_calls, words, begin_at, wants_changes=wants_changes, drop=drop)
        self.calls[call.key] = call
        log_event(
            "call_began",
            call=call.number,
            row=row.index,
            callers=len(self.calls),
            wait_ms=round(1e3 * max(begin_at - time.monotonic(), 0.0)),
        )
        return call

    async def hang_up(self, call: Call, why: str) -> None:
        """End a call; its row is free and clean afterwards."""
        if self.calls.pop(call.key, None) is None:
            return
        self.metrics.dropped_frames.inc(len(call.inbox) + call.outbox.qsize())
        heard = call.row.num_frames
        call.inbox.clear()
        call.room.set()
        if not self.is_over:
            await asyncio.shield(self.use_engine(self.engine.leave, call.row))
        log_event(
            "call_ended", call=call.number, why=why, heard_frames=heard, late_frames=call.num_late
        )

    async def run(self) -> None:
        """Let the model hear what callers say, for ever."""
        try:
            while True:
                await self._await_something()
                self._look_for_late()
                if batch := await self._collect():
                    await self._step(batch)
        finally:
            self.is_over = True
            self._thread.shutdown(wait=True, cancel_futures=True)

    async def _await_something(self) -> None:
        self._wake.clear()
        if any(self._is_ready(call) for call in self.calls.values()):
            # Others have their turn, also when there is always something to do.
            await asyncio.sleep(0)
            return
        due = [call.due_at for call in self.calls.values() if call.due_at is not None]
        timeout = max(min(due) + FRAME_SEC - time.monotonic(), 1e-3) if due else None
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._wake.wait(), timeout)

    def _is_ready(self, call: Call) -> bool:
        return bool(call.inbox) and not call.outbox.full()

    def _look_for_late(self) -> None:
        now = time.monotonic()
        for call in self.calls.values():
            while call.due_at is not None and call.due_at + FRAME_SEC < now:
                if call.inbox:
                    # It is the model that is late, or the caller does not read.
                    call.due_at = now
                    break
                call.num_late += 1
                self.metrics.late_frames.inc()
                call.due_at += FRAME_SEC
                if self.on_late == "silence":
                    call.num_silences += 1
                    call.inbox.append(Waiting(self._silence, now))

    async def _collect(self) -> list[Heard]:
        """Return the next frame of each caller whose next item is one. A request is done instead:
        with one item per caller and round, nobody holds up the others."""
        batch = []
        for call in list(self.calls.values()):
            if not self._is_ready(call):
                continue
            taken = call.take()
            item = taken.item
            if isinstance(item, str):
                await self.use_engine(self._act, call, item)
                continue
            batch.append(Heard(call, item, taken.came_at, taken.number))
            if item is self._silence:
                # The frame that it stands for has been counted when it was due.
                continue
            now = time.monotonic()
            call.due_at = max(call.due_at or now, now - FRAME_SEC) + FRAME_SEC
        return batch

    def is_on(self, call: Call) -> bool:
        """Return whether a call goes on. What is done for it on the engine asks again there: a row
        may have been given to somebody else meanwhile."""
        return call.key in self.calls

    def _act(self, call: Call, action: Action) -> None:
        if not self.is_on(call):
            return
        log_event("asked", call=call.number, action=action)
        if action == "restart":
            self.engine.restart(call.row)
            call.unanswered.clear()
        elif action == "forget":
            self.engine.forget(call.row)
        else:
            call.row.ttt_on = action == "ttt_on"

    async def _step(self, batch: list[Heard]) -> None:
        for heard, answer in await self.use_engine(self._step_engine, batch):
            if not answer.spoken.healthy:
                heard.call.broken.set()
            if self.is_on(heard.call):
                heard.call.outbox.put_nowait(answer)

    def _step_engine(self, batch: list[Heard]) -> list[tuple[Heard, Answer]]:
        batch = [heard for heard in batch if self.is_on(heard.call)]
        started_at = time.perf_counter()
        spoken = self.engine.step({heard.call.row.index: heard.frame for heard in batch})
        self._num_steps += 1
        if self._num_steps % CHANGES_EVERY_STEPS == 0:
            self._look_at_changes()
        self.metrics.step_seconds.observe(time.perf_counter() - started_at)
        self.metrics.frames.inc(len(batch))
        now = time.monotonic()
        answers = []
        for heard in batch:
            call = heard.call
            call.unanswered.append(heard.number)
            if call.row.index in spoken:
                number = call.unanswered.popleft()
                waited_sec = now - heard.came_at
                answer = Answer(spoken[call.row.index], waited_sec, number, call.changes)
                call.changes = None
                answers.append((heard, answer))
        return answers

    def _look_at_changes(self) -> None:
        """Look at all rows at once, for the next answer of each caller who wants to know."""
        if wanting := [call for call in list(self.calls.values()) if call.wants_changes]:
            changes = self.engine.changes()
            for call in wanting:
                call.changes = {layer: rows[call.row.index] for layer, rows in changes.items()}
