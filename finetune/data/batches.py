"""References of segments become batches of codes, ahead of when they are needed.

Workers read, one thread encodes and puts batches together, and the training process takes them:

    refs → tasks → workers: audio, or codes that are on disk → codes → batches → device
"""

import atexit
import functools
import itertools
import logging
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.autograd.profiler import record_function
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from finetune.config import DataArgs
from finetune.data.cache import CodeCache
from finetune.data.codec import Codec
from finetune.data.prefetch import Prefetcher
from finetune.data.recording import SegmentRef
from finetune.data.segments import BrokenSegment, Segment, Task
from finetune.data.store import DamagedBlob, Store
from finetune.data.text import FRAME_RATE_HZ
from finetune.errors import UserError

logger = logging.getLogger(__name__)

_MAX_KEPT_BYTES = 2**30
"""Of codes in memory, per rank: some 350 hours."""

_STEPS_AHEAD = 2


@dataclass
class Batch:
    """A batch is what one rank trains on in one forward pass."""

    codes: torch.Tensor
    """Int64 `[B, num_streams, T]`; −1 past the end of a recording."""
    num_skipped: int
    """Rows that are −1 everywhere because their file turned out to be broken."""
    audio_sec: float
    """Recorded time in the batch, without padding."""
    num_encoded: int = 0
    """Rows that Mimi had to encode; the codes of the others were kept."""


def open_store(args: DataArgs) -> Store | None:
    """The folder `data.cache_dir`, if there is to be one. A process opens it once, for all that it
    reads: the index of a large one takes memory."""
    return Store(Path(args.cache_dir)) if args.cache_dir else None


@dataclass
class _Row:
    """A segment after encoding, kept for the next time it comes."""

    codes: torch.Tensor
    """Int32 `[num_streams, T]`."""
    num_valid_frames: int
    is_broken: bool


class Batcher:
    """Makes batches of segments: read in the background, encoded, and kept.

    A segment's codes are looked for in memory, which holds up to `_MAX_KEPT_BYTES`, then in
    `data.cache_dir`. What is in neither is read and encoded, and kept in both. A segment that
    could not be read stays blank as long as it is in memory, and is never kept on disk.
    """

    def __init__(
        self,
        args: DataArgs,
        codec: Codec,
        num_frames: int,
        batch_size: int,
        device: torch.device,
        store: Store | None,
        *,
        batches_a_step: int = 1,
    ) -> None:
        self.batch_size = batch_size
        self.num_frames = num_frames
        self._reader = codec.reader(num_frames)
        self._reader.identify = store is not None
        self._codec = codec
        self._cache = None if store is None else CodeCache(store, codec, num_frames)
        self._num_workers = args.num_workers
        self._on_error = args.on_error
        self._device = device
        steps_ahead = args.prefetch_steps
        if steps_ahead is None:
            steps_ahead = _STEPS_AHEAD if device.type == "cuda" else 0
        self._num_prefetched = steps_ahead * batches_a_step
        self._kept: dict[SegmentRef, _Row] = {}
        self._max_kept = _MAX_KEPT_BYTES // (4 * codec.num_streams * num_frames)

    def batches(self, refs: Iterable[SegmentRef]) -> Generator[Batch, None, None]:
        """Batches of the given segments on the device, in their order.

        Closing the generator ends the thread and the workers.
        """
        made = self._make(iter(refs))
        ahead = Prefetcher(made, self._num_prefetched) if self._num_prefetched else made
        with closing(ahead):
            for batch in ahead:
                # On the stream of the step, which thereby waits for no other.
                batch.codes = batch.codes.to(self._device, non_blocking=True)
                yield batch

    def has(self, ref: SegmentRef) -> bool:
        """Return whether the codes of a segment are on disk, undamaged: they are read."""
        if ref.recording.has_codes:
            return True
        blob = None if self._cache is None else self._cache.find(ref)
        if self._cache is None or blob is None:
            return False
        try:
            blob.read()
        except DamagedBlob as problem:
            self._cache.report_damage(blob, str(problem))
            return False
        return True

    def _make(self, refs: Iterator[SegmentRef]) -> Generator[Batch, None, None]:
        if self._device.type == "cuda" and self._device.index is not None:
            torch.cuda.set_device(self._device)  # each thread has its own current device
        ahead, refs = itertools.tee(refs)
        try:
            with closing(self._read(map(self._task, ahead))) as results:
                while rows := list(itertools.islice(refs, self.batch_size)):
                    with record_function("data: batch"):
                        batch = self._batch(rows, results)
                    yield batch
        finally:
            if self._cache is not None:
                self._cache.flush()

    def _task(self, ref: SegmentRef) -> Task:
        if ref in self._kept:
            return Task(None)
        if self._cache is None or ref.recording.has_codes:
            return Task(ref)
        codes = self._cache.find(ref)
        if codes is None:
            self._cache.refresh()
            codes = self._cache.find(ref)
        return Task(ref, codes)

    def _read(self, tasks: Iterator[Task]) -> Generator[Segment | BrokenSegment | None, None, None]:
        for task in tasks:
            if task.ref is not None:
                tasks = itertools.chain([task], tasks)
                break
            yield None  # no worker is started as long as everything is in memory
        else:
            return
        if self._num_workers == 0:
            yield from map(self._reader.__getitem__, tasks)
            return
        loader = DataLoader(
            self._reader,
            sampler=tasks,
            # One segment at a time, so that all workers share the work of one batch; two batches
            # are read ahead.
            batch_size=None,
            num_workers=self._num_workers,
            prefetch_factor=max(2, -(-2 * self.batch_size // self._num_workers)),
            multiprocessing_context=_worker_context(),
            worker_init_fn=_prepare_worker,
            # Its own, because a loader draws a seed: the model's random numbers stay what they are.
            generator=torch.Generator(),
        )
        # A fork copies the locks of native libraries as they are: not while Mimi uses them. The
        # training process itself is waiting for its first batch.
        try:
            with self._codec.lock:
                workers: Any = iter(loader)
        except OSError as error:
            raise UserError(
                f"the {self._num_workers} workers that decode audio cannot be started "
                f"({error.strerror or error}). Set data.num_workers lower, or to 0; or give the "
                "machine (or the container, --shm-size) more shared memory, or `ulimit -n` more "
                "open files."
            ) from None
        # Workers ignore signals, so they must be told to end before Python waits for them at exit.
        # In a thread `Prefetcher` closes this, once what is being read is there: a thread that
        # waits for workers which are ended meanwhile waits for ever.
        end_workers = functools.partial(_end_workers, workers)
        if threading.current_thread() is threading.main_thread():
            atexit.register(end_workers)
        try:
            yield from workers
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(
                f"a worker that decodes audio died ({error}). Most often memory ran out: give the "
                "machine (or the container, --shm-size) more shared memory, or set "
                "data.num_workers=0."
            ) from None
        finally:
            end_workers()
            atexit.unregister(end_workers)

    def _batch(
        self, refs: list[SegmentRef], results: Iterator[Segment | BrokenSegment | None]
    ) -> Batch:
        rows, num_encoded = [], 0
        for ref in refs:
            result = next(results)
            row = self._kept.get(ref)
            if row is None:
                assert result is not None
                row, was_encoded = self._row(result)
                num_encoded += was_encoded
                if len(self._kept) < self._max_kept:
                    self._kept[ref] = row
            rows.append(row)
        codes = torch.stack([row.codes for row in rows]).long()
        return Batch(
            codes=codes.pin_memory() if self._device.type == "cuda" else codes,
            num_skipped=sum(row.is_broken for row in rows),
            audio_sec=sum(row.num_valid_frames for row in rows) / FRAME_RATE_HZ,
            num_encoded=num_encoded,
        )

    def _row(self, result: Segment | BrokenSegment) -> tuple[_Row, bool]:
        """A segment's row, and whether Mimi was needed."""
        if isinstance(result, BrokenSegment):
            blank = self._blank(result)
            empty = torch.zeros(2, self._reader.reads.num_codebooks, 0)
            return _Row(self._codec.streams(blank, empty).int(), 0, True), False
        codes, was_encoded = result.audio_codes, False
        if codes is None:
            codes, was_encoded = self._codes_of_audio(result)
        row = _Row(self._codec.streams(result, codes).int(), result.num_valid_frames, False)
        return row, was_encoded

    def _codes_of_audio(self, segment: Segment) -> tuple[torch.Tensor, bool]:
        """Codes of a segment that was read, and whether Mimi was needed."""
        cache, identity = self._cache, segment.identity
        if cache is None or identity is None:
            return self._codec.encode_audio(segment), True
        kept = cache.find_samples(identity)
        if kept is not None and segment.damage is not None:
            cache.report_damage(kept, segment.damage)
        elif kept is not None:
            # A copy of a recording that was encoded before, or one that was only touched.
            try:
                return self._reader.decode_kept(kept.read()), False
            except DamagedBlob as damage:
                cache.report_damage(kept, str(damage))
        codes = self._codec.encode_audio(segment)
        cache.keep(identity, codes)
        return codes, True

    def _blank(self, broken: BrokenSegment) -> Segment:
        """A segment without a valid frame, in the place of a broken one: it weighs nothing."""
        recording, start_frame = broken.ref
        start_sec = start_frame / FRAME_RATE_HZ
        message = f"{recording.origin}: from {start_sec:.2f} s on: {broken.problem}"
        if self._on_error == "raise":
            raise UserError(f"{message}. Or set data.on_error=skip to train without it.")
        logger.warning("skipped %s", message)
        return Segment(
            audio=torch.zeros(2, 0),
            text_tokens=torch.zeros(0, dtype=torch.int64),
            num_frames=self.num_frames,
            path=recording.path,
            start_sec=start_sec,
        )


def _worker_context() -> multiprocessing.context.BaseContext:
    """Return how workers start: by fork where that is safe, because it takes no time.

    A process that has used CUDA must not fork: its driver threads and locks do not survive. There
    a helper process forks, which has imported torch once and never touched the GPU.
    """
    method: Literal["fork", "forkserver", "spawn"] = "spawn"
    if "forkserver" in multiprocessing.get_all_start_methods() and sys.platform != "darwin":
        method = "forkserver" if torch.cuda.is_initialized() else "fork"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["torch", "finetune.data.segments"])
    return context


# Where workers cannot be started, PyTorch's destructor asks for what its constructor had not yet
# set, and Python prints that.
setattr(_MultiProcessingDataLoaderIter, "_shutdown", True)  # noqa: B010


def _end_workers(workers: Any) -> None:
    """End the workers of an iterator of a DataLoader, if need be in the middle of what they do.

    To one that does not end in five seconds (on a busy machine it may have missed that it should)
    PyTorch sends SIGTERM, which workers ignore; and Python would wait for it for ever.
    """
    if workers._shutdown and workers._worker_pids_set:
        # Another thread is at it, and would take a worker that is killed for one that died.
        return
    workers._shutdown_workers()
    for worker in workers._workers:
        if worker.is_alive():
            worker.kill()


def _prepare_worker(worker_id: int) -> None:
    # Ctrl-C and torchrun signal the whole process group. The trainer decides what to do; a worker
    # that died of it would break the step that is being finished and print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Segments leave in a thread of multiprocessing, by way of shared memory. Where there is no more
    # of it, multiprocessing prints a traceback and forgets the segment, for which the trainer would
    # wait for ever. That a worker ends is noticed.
    setattr(  # noqa: B010
        multiprocessing.queues.Queue, "_on_queue_feeder_error", staticmethod(_end_worker)
    )


def _end_worker(error: Exception, segment: Any) -> None:
    os._exit(1)
