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
    """The results of all jobs; those that lie in `out` are not run again.

    Args:
        workers: processes at a time; 1: this one.

    Raises:
        UserError: `out` cannot be read or written, see `kept_results`, or a job raised one.
    """
    results = kept_results(jobs, out)
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


def kept_results(jobs: Sequence[Job], out: Path) -> dict[str, Result]:
    """Return the results that lie in `out` already, by the names of their jobs.

    Raises:
        UserError: one is of other options, and would be replaced.
    """
    results: dict[str, Result] = {}
    for job in jobs:
        kept = _kept(job, out)
        known = kept.read()
        if known is not None and "config" not in known:
            raise UserError(f"{kept.path} is not a result of this program; move it away.")
        if known is not None:
            refuse_others(kept.path, known["config"], job.config)
            results[job.name] = known
    return results


def refuse_others(path: Path, known: Result, asked: Result) -> None:
    """
    Raises:
        UserError: what lies at `path` is of another configuration than the one that is asked for,
            and took minutes or hours to make.
    """
    before, now = (_flat(json.loads(json.dumps(config))) for config in (known, asked))
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        key = changed[0]
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(
            f"{path} is of other options ({key}: {before.get(key)} there, {now.get(key)} here"
            f"{more}), and would be replaced. Name another --out, or move it away."
        )


def _flat(config: Result, prefix: str = "") -> Result:
    found: Result = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


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
