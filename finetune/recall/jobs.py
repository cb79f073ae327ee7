"""Runs of an experiment side by side, each with its own result file, none done twice."""

import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.errors import UserError
from finetune.interrupt import end_with_parent, end_workers
from finetune.kept import Kept
from finetune.monitoring import setup_logging

logger = logging.getLogger(__name__)

Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A job is one run: an arm and a seed."""

    name: str
    """Of its file, without the ending."""
    config: Result
    """All that the result depends on; it is kept in the file."""
    function: Callable[..., Result]
    """Importable, for another process to run it, and so are its arguments."""
    arguments: tuple[Any, ...]


def run_jobs(jobs: Sequence[Job], out: Path, *, workers: int) -> list[Result]:
    """The results of all jobs; those that lie in `out` are not run again, unless their
    configuration has changed.

    Args:
        workers: processes at a time; 1: this one.

    Raises:
        UserError: `out` cannot be read or written, or a job raised one.
    """
    results: dict[str, Result] = {}
    for job in jobs:
        kept = _kept(job, out)
        known = kept.read()
        if known is not None and "config" not in known:
            raise UserError(f"{kept.path} is not a result of this program; move it away.")
        if known is not None and known["config"] == json.loads(json.dumps(job.config)):
            results[job.name] = known
        elif known is not None:
            logger.info("%s: its configuration has changed, so it runs again", job.name)
    missing = [job for job in jobs if job.name not in results]
    if results:
        logger.info("%d of %d runs are in %s already", len(results), len(jobs), out)
    if workers == 1:
        for job in missing:
            results[job.name] = _run(job, out)
        return [results[job.name] for job in jobs]
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, context, _start_worker, (threads,)) as pool:
        running = {pool.submit(_run, job, out): job.name for job in missing}
        try:
            for future in as_completed(running):
                results[running[future]] = future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            # A job takes minutes: nothing waits for those that have begun.
            end_workers()
            raise
    return [results[job.name] for job in jobs]


def _start_worker(threads: int) -> None:
    end_with_parent()
    torch.set_num_threads(threads)
    setup_logging()


def _run(job: Job, out: Path) -> Result:
    result = {"config": job.config, **job.function(*job.arguments)}
    _kept(job, out).write(result)
    return result


def _kept(job: Job, out: Path) -> Kept:
    return Kept(out / f"{job.name}.json")
