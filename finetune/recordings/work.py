"""Processes do one job for each of many recordings, with a bar."""

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from finetune.data import FileProblem
from finetune.interrupt import end_with_parent
from finetune.monitoring import counting

Job = TypeVar("Job")
Result = TypeVar("Result")

_JOBS_AHEAD = 4


class RecordingError(Exception):
    """Something cannot be done with one recording; says what is wrong and what to do."""


@dataclass(frozen=True)
class Done(Generic[Job, Result]):
    """A job with its result, or why there is none."""

    job: Job
    result: Result | None = None
    problem: str | None = None


def do_all(
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    title: str,
    workers: int | None = None,
    at_once: int = 1,
) -> Iterator[Done[Job, Result]]:
    """Yield the jobs as they are finished, in any order.

    Args:
        work: a function of a module, which other processes can import. What cannot be done with a
            recording is a `RecordingError` or a `FileProblem`.
        title: stands before the bar.
        workers: processes; None: one for each core. 1: this process.
        at_once: jobs that a worker gets, and hands back, together: more than one where a job takes
            no longer than the way to the worker.
    """
    workers = min(workers or num_cores(), len(jobs))
    with counting(title, len(jobs)) as advance:
        if workers <= 1:
            for job in jobs:
                yield _attempt(work, job)
                advance()
            return
        # Forked, workers start at once: they need not import PyTorch. Elsewhere it is not safe.
        method = "fork" if sys.platform == "linux" else "spawn"
        # A worker that collects this process's garbage may wait for ever: FFmpeg frees a filter by
        # joining its threads, and these are not there after a fork.
        gc.collect()
        with ProcessPoolExecutor(
            workers, multiprocessing.get_context(method), initializer=_start_worker
        ) as pool:
            try:
                shares = [jobs[i : i + at_once] for i in range(0, len(jobs), at_once)]
                for done in _in_any_order(pool, work, shares, workers * _JOBS_AHEAD):
                    yield done
                    advance()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _in_any_order(
    pool: ProcessPoolExecutor,
    work: Callable[[Job], Result],
    shares: Sequence[Sequence[Job]],
    num_ahead: int,
) -> Iterator[Done[Job, Result]]:
    left = iter(shares)
    running: set[Future[list[Done[Job, Result]]]] = set()
    while True:
        while len(running) < num_ahead and (share := next(left, None)) is not None:
            running.add(pool.submit(_attempt_all, work, share))
        if not running:
            return
        finished, running = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            yield from future.result()


def _attempt_all(work: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Done[Job, Result]]:
    return [_attempt(work, job) for job in jobs]


def _attempt(work: Callable[[Job], Result], job: Job) -> Done[Job, Result]:
    try:
        return Done(job, work(job))
    except (RecordingError, FileProblem) as problem:
        return Done(job, problem=str(problem))


def _start_worker() -> None:
    end_with_parent()
    # Each worker has a core; and threads that computed before a fork are not there after it.
    torch.set_num_threads(1)


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
