"""Processes that watch each other: one that dies, or hangs, is named instead of waited for.

A thread in every process writes where its training loop is to a store that all can reach, also
while the loop waits in an exchange that never ends. The first process reads where all are. When one
is silent (killed, its host gone), or none has moved on for too long, it says which one and where,
and all end: a scheduler can then start them again, with `resume: auto`.
"""

import faulthandler
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from finetune.distributed.world import World

logger = logging.getLogger(__name__)

BEAT_SEC = 0.5
SILENT_SEC = 12.0
"""After so long without a sign of life a process counts as dead. torchrun, which sees a death on
its own host, kills the others 30 seconds after it."""
LEAVING_SEC = 3.0
"""So long the others may go on when one has ended with an error."""
EXIT_STATUS = 70
PHASES = ("data", "forward and backward", "optimizer step", "log", "evaluation", "checkpoint")
"""In their order within a step: the others wait for whoever is behind."""


@dataclass(frozen=True)
class Place:
    """Place in the program where a process says that it is."""

    step: int
    phase: str
    moves: int
    """Counts changes of place."""
    end: str = ""
    """Why it has left the loop, if it has."""

    def __str__(self) -> str:
        return f"in step {self.step}: {self.phase}"


@dataclass
class _Seen:
    """Knowledge of the first process about another."""

    text: str = ""
    heard_at: float = 0.0
    place: Place = Place(0, PHASES[0], -1)
    moved_at: float = 0.0
    who: str = ""


DONE = "done"


class Watch:
    """Entered around the training loop by every process; alone it does nothing.

    Args:
        hang_timeout_sec: how long it is that no process may move on.
    """

    def __init__(self, world: World, *, hang_timeout_sec: float) -> None:
        self._world = world
        self._hang_timeout_sec = hang_timeout_sec
        self._place = Place(0, PHASES[0], 0)
        self._beats = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def at(self, step: int, phase: str) -> None:
        """The loop is here now."""
        self._place = Place(step, phase, self._place.moves + 1)

    def __enter__(self) -> "Watch":
        if self._world.size > 1:
            self._store = _connect()
            self._beat()
            self._world.barrier()  # all have said where they are
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if self._thread is None:
            return
        if _is_failed_exchange(error):
            # The exchange has failed because another process is gone: the thread will say which.
            self._thread.join(SILENT_SEC + 10 * BEAT_SEC)
        text = str(error).strip().splitlines() or [""]
        end = DONE if kind is None else f"{kind.__name__}: {text[0]}"
        self._place = Place(self._place.step, self._place.phase, self._place.moves + 1, end)
        self._stop.set()
        self._thread.join()

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        watched = range(self._world.size) if self._world.is_main else [0]
        seen = {rank: _Seen() for rank in watched}
        try:
            while not self._stop.wait(BEAT_SEC):
                self._beat()
                self._look(seen)
            self._beat()
        except (RuntimeError, OSError) as error:
            self._end_all(f"the processes' store cannot be reached any more ({error})", say=True)

    def _beat(self) -> None:
        self._beats += 1
        place = self._place
        text = "\t".join(
            (str(self._beats), str(place.step), place.phase, str(place.moves), _who(), place.end)
        )
        self._store.set(str(self._world.rank), text)

    def _look(self, seen: dict[int, _Seen]) -> None:
        texts = self._store.multi_get([str(rank) for rank in seen])  # type: ignore[attr-defined]
        for known, text in zip(seen.values(), texts, strict=True):
            _update(known, text.decode())
        verdict = self._verdict(seen)
        if verdict is None and self._store.check(["verdict"]):
            verdict = self._store.get("verdict").decode()
            self._end_all(verdict, say=False)
        elif verdict is not None:
            self._store.set("verdict", verdict)
            self._end_all(verdict, say=True)

    def _verdict(self, seen: dict[int, _Seen]) -> str | None:
        now = time.monotonic()
        present = {rank: known for rank, known in seen.items() if known.place.end != DONE}
        for rank, known in present.items():
            # Where all end for the same reason, each should say so itself.
            if known.place.end and now - known.moved_at > LEAVING_SEC:
                return f"rank {rank} ({known.who}) has ended {known.place}: {known.place.end}"
            if now - known.heard_at > SILENT_SEC:
                return (
                    f"rank {rank} ({known.who}) is dead, or cannot be reached: no sign of life for "
                    f"{now - known.heard_at:.0f} s; it was last seen {known.place}"
                )
        if not self._world.is_main or len(present) < self._world.size:
            return None
        quiet_sec = now - max(known.moved_at for known in present.values())
        if quiet_sec < self._hang_timeout_sec:
            return None
        return self._describe_hang(present, quiet_sec)

    def _describe_hang(self, present: dict[int, _Seen], quiet_sec: float) -> str:
        def order(known: _Seen) -> tuple[int, int]:
            return known.place.step, PHASES.index(known.place.phase)

        last = min(order(known) for known in present.values())
        behind = [rank for rank, known in present.items() if order(known) == last]
        place = present[behind[0]].place
        if len(behind) == len(present):
            return f"no process has moved on for {quiet_sec:.0f} s; all are {place}"
        names = ", ".join(f"rank {rank} ({present[rank].who})" for rank in behind[:8])
        ahead = max(present.values(), key=order).place
        return (
            f"{names} hangs: for {quiet_sec:.0f} s it has been {place}, and the others wait for it "
            f"{ahead}"
        )

    def _end_all(self, verdict: str, *, say: bool) -> None:
        """End this process, whatever its main thread waits for."""
        if say:
            logger.error("%s. The run ends; continue with --resume.", verdict)
        if " hangs: " in verdict and f"rank {self._world.rank} (" in verdict.split(" hangs: ")[0]:
            faulthandler.dump_traceback(all_threads=True)
        if self._world.is_main:
            time.sleep(4 * BEAT_SEC)  # the others read the verdict first
        logging.shutdown()
        os._exit(EXIT_STATUS)


def _update(known: _Seen, text: str) -> None:
    now = time.monotonic()
    if text == known.text:
        return
    _, step, phase, moves, who, end = text.split("\t", 5)
    place = Place(int(step), phase, int(moves), end)
    if place.moves != known.place.moves:
        known.moved_at = now
    known.text, known.heard_at, known.place, known.who = text, now, place, who


def _who() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _is_failed_exchange(error: object) -> bool:
    is_ours = isinstance(error, torch.OutOfMemoryError)
    return (
        isinstance(error, RuntimeError)
        and not is_ours
        and (
            isinstance(error, dist.DistError)
            or any(word in str(error) for word in ("gloo", "NCCL", "Connection closed"))
        )
    )


def _connect() -> dist.Store:
    """A connection of its own to the store by which the processes have found each other: a call
    that waits there keeps all others of its connection waiting."""
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=30),
    )
    # Started anew by torchrun, the processes may find the store of before.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"watch {attempt}", store)
