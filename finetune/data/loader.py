"""Batches of codes for training and evaluation."""

import atexit
import contextlib
import hashlib
import itertools
import logging
import multiprocessing
import signal
import sys
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from finetune.errors import UserError

from .args import DataArgs
from .codec import Codec
from .order import SampleOrder
from .segments import BrokenSegment, Segment
from .sources import DataSet, SegmentRef, load_sources
from .text import FRAME_RATE_HZ, count_frames

logger = logging.getLogger(__name__)

_MAX_KEPT_BYTES = 2**30
"""Of codes, per rank: some 350 hours."""


@dataclass
class Batch:
    """What one rank trains on in one step."""

    codes: torch.Tensor
    """Int64 `[B, num_streams, T]`; −1 past the end of a recording."""
    num_skipped: int
    """Rows that are −1 everywhere because their file turned out to be broken."""
    audio_sec: float
    """Recorded time in the batch, without padding."""


def build_train_loader(
    args: DataArgs,
    codec: Codec,
    *,
    duration_sec: float,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str,
) -> "TrainLoader":
    """Check all training data and make the endless loader of one rank.

    Args:
        duration_sec: length of a segment, rounded up to whole frames.
        batch_size: segments per batch of this rank.

    Raises:
        UserError: see `load_sources`.
    """
    num_frames = count_frames(duration_sec)
    data = load_sources(
        args.train_data, key="data.train_data", num_frames=num_frames, on_error=args.on_error
    )
    batcher = _Batcher(args, codec, num_frames, batch_size, data.num_segments, torch.device(device))
    return TrainLoader(batcher, data, args.shuffle, seed, rank, world_size)


def build_eval_loader(
    args: DataArgs,
    codec: Codec,
    *,
    duration_sec: float,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str,
) -> "EvalLoader":
    """Check all evaluation data and make the loader of one rank. Arguments as for training."""
    num_frames = count_frames(duration_sec)
    data = load_sources(
        args.eval_data, key="data.eval_data", num_frames=num_frames, on_error=args.on_error
    )
    batcher = _Batcher(args, codec, num_frames, batch_size, data.num_segments, torch.device(device))
    return EvalLoader(batcher, data, rank, world_size)


class TrainLoader:
    """An endless iterator of batches whose position can be saved and restored.

    Global sample i is the same segment whatever the number of ranks and the batch size: step s of
    rank r, with W ranks of batch size B, takes the samples from (s·W + r)·B to the next B. So a
    run can be continued on more or fewer devices; nothing is lost or repeated.
    """

    def __init__(
        self,
        batcher: "_Batcher",
        data: DataSet,
        shuffle: bool,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._batcher = batcher
        self._data = data
        self._rank = rank
        self._world_size = world_size
        self._order = SampleOrder(
            [len(source.segments) for source in data.sources],
            [source.weight for source in data.sources],
            seed=seed,
            shuffle=shuffle,
        )
        self._fingerprint = _fingerprint(data, batcher.reader.num_frames, seed, shuffle)
        self._num_samples = 0
        self._num_skipped_segments = 0
        self._batches: Generator[Batch, None, None] | None = None

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._batcher.batches(self._refs(self._num_samples))
        batch = next(self._batches)
        # Counted here, not where workers read ahead: the state is what was handed out.
        self._num_samples += self._batcher.batch_size * self._world_size
        self._num_skipped_segments += batch.num_skipped
        return batch

    def _refs(self, start: int) -> Generator[SegmentRef, None, None]:
        """This rank's segments, from global sample `start` on."""
        batch_size = self._batcher.batch_size
        for offset, (source, segment) in enumerate(self._order.walk(start)):
            if offset // batch_size % self._world_size == self._rank:
                yield self._data.sources[source].segments[segment]

    def state_dict(self) -> dict[str, Any]:
        """Position in the data: global samples handed out, and a fingerprint of their order."""
        return {"num_samples": self._num_samples, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; warns if the data is no longer the same."""
        if state["fingerprint"] != self._fingerprint:
            logger.warning(
                "the training data, its weights, data.shuffle, duration_sec or the seed changed "
                "since the checkpoint: continuing at sample %d of the new order, so segments may "
                "come again or be left out",
                state["num_samples"],
            )
        self.close()
        self._num_samples = state["num_samples"]

    def close(self) -> None:
        """Stop the workers. Iterating again starts new ones at the current position."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    @property
    def num_segments(self) -> int:
        return self._data.num_segments

    @property
    def total_duration_sec(self) -> float:
        return self._data.total_duration_sec

    @property
    def num_skipped(self) -> int:
        """Lines left out at start-up, plus segments of this rank that failed since."""
        return self._data.num_skipped + self._num_skipped_segments

    @property
    def epoch(self) -> float:
        """Global samples handed out per segment there is."""
        return self._num_samples / self.num_segments


class EvalLoader:
    """Every `iter()` is a fresh pass over all segments, in the order of the files.

    Rank r of W takes the segments r, r + W, …. The last batch may be smaller, and a rank may have
    one batch less than another.
    """

    def __init__(self, batcher: "_Batcher", data: DataSet, rank: int, world_size: int) -> None:
        self._batcher = batcher
        self._data = data
        segments = [ref for source in data.sources for ref in source.segments]
        self._refs = segments[rank::world_size]

    def __iter__(self) -> Generator[Batch, None, None]:
        return self._batcher.batches(self._refs)

    def __len__(self) -> int:
        """Batches of this rank in one pass."""
        return -(-len(self._refs) // self._batcher.batch_size)

    @property
    def num_segments(self) -> int:
        """Of all ranks together."""
        return self._data.num_segments

    @property
    def total_duration_sec(self) -> float:
        return self._data.total_duration_sec

    @property
    def num_skipped(self) -> int:
        """Lines left out at start-up."""
        return self._data.num_skipped


@dataclass
class _Encoded:
    """A segment after encoding, kept for the next time it comes."""

    codes: torch.Tensor
    """Int32 `[num_streams, T]`."""
    num_valid_frames: int
    is_broken: bool


class _Batcher:
    """What both loaders share: segments read in the background, encoded batch by batch.

    Codes are kept in memory, up to `_MAX_KEPT_BYTES`, so that small data is encoded once.
    """

    def __init__(
        self,
        args: DataArgs,
        codec: Codec,
        num_frames: int,
        batch_size: int,
        num_segments: int,
        device: torch.device,
    ) -> None:
        self.batch_size = batch_size
        self.reader = codec.reader(num_frames)
        self._codec = codec
        self._num_workers = args.num_workers
        self._on_error = args.on_error
        self._device = device
        # As many as an epoch has, in whole batches: workers start once an epoch, if at all.
        self._window = -(-num_segments // batch_size) * batch_size
        self._encoded: dict[SegmentRef, _Encoded] = {}
        self._max_kept = _MAX_KEPT_BYTES // (4 * codec.num_streams * num_frames)

    def batches(self, refs: Iterable[SegmentRef]) -> Generator[Batch, None, None]:
        """Batches of the given segments, in their order; closing it stops the workers.

        Segments that were encoded before are neither read nor encoded again.
        """
        remaining = iter(refs)
        while window := list(itertools.islice(remaining, self._window)):
            to_read, to_keep = self._plan(window)
            with contextlib.closing(self._read(to_read)) as results:
                for start in range(0, len(window), self.batch_size):
                    yield self._batch(window[start : start + self.batch_size], results, to_keep)

    def _plan(self, window: list[SegmentRef]) -> tuple[list[SegmentRef], set[SegmentRef]]:
        """Which segments of `window` must be read, and which of these are kept afterwards."""
        to_read: list[SegmentRef] = []
        to_keep: set[SegmentRef] = set()
        for ref in window:
            if ref not in self._encoded and ref not in to_keep:
                to_read.append(ref)
                if len(self._encoded) + len(to_keep) < self._max_kept:
                    to_keep.add(ref)
        return to_read, to_keep

    def _read(self, refs: list[SegmentRef]) -> Generator[Segment | BrokenSegment, None, None]:
        if not refs:
            return
        if self._num_workers == 0:
            yield from map(self.reader.__getitem__, refs)
            return
        loader = DataLoader(
            self.reader,
            sampler=refs,
            # One segment at a time, so that all workers share the work of one batch; two batches
            # are read ahead.
            batch_size=None,
            num_workers=self._num_workers,
            prefetch_factor=max(2, -(-2 * self.batch_size // self._num_workers)),
            multiprocessing_context=_worker_context(),
            worker_init_fn=_leave_signals_to_the_trainer,
            # Its own, because a loader draws a seed: the model's random numbers stay what they are.
            generator=torch.Generator(),
        )
        workers: Any = iter(loader)
        # Workers ignore signals, so they must be told to end before Python waits for them at exit.
        atexit.register(workers._shutdown_workers)
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
            workers._shutdown_workers()
            atexit.unregister(workers._shutdown_workers)

    def _batch(
        self,
        refs: list[SegmentRef],
        results: Iterator[Segment | BrokenSegment],
        to_keep: set[SegmentRef],
    ) -> Batch:
        """The next batch; `results` holds its segments that have not been encoded, in order."""
        new_refs = [
            ref
            for i, ref in enumerate(refs)
            if ref not in self._encoded and not (ref in to_keep and ref in refs[:i])
        ]
        read = list(itertools.islice(results, len(new_refs)))
        segments = [self._blank(r) if isinstance(r, BrokenSegment) else r for r in read]
        codes = self._codec.encode(segments).int().cpu() if segments else ()
        new = [
            _Encoded(row, segment.num_valid_frames, isinstance(result, BrokenSegment))
            for row, segment, result in zip(codes, segments, read, strict=True)
        ]
        encoded = list(zip(new_refs, new, strict=True))
        self._encoded |= {ref: row for ref, row in encoded if ref in to_keep}
        unkept = (row for ref, row in encoded if ref not in to_keep)
        rows = [self._encoded[ref] if ref in self._encoded else next(unkept) for ref in refs]
        return Batch(
            codes=torch.stack([row.codes for row in rows]).long().to(self._device),
            num_skipped=sum(row.is_broken for row in rows),
            audio_sec=sum(row.num_valid_frames for row in rows) / FRAME_RATE_HZ,
        )

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
            num_frames=self.reader.num_frames,
            path=recording.path,
            start_sec=start_sec,
        )


def _worker_context() -> multiprocessing.context.BaseContext:
    """How workers start: by fork where that is safe, because it takes no time.

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


def _leave_signals_to_the_trainer(worker_id: int) -> None:
    # Ctrl-C and torchrun signal the whole process group. The trainer decides what to do; a worker
    # that died of it would break the step that is being finished and print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _fingerprint(data: DataSet, num_frames: int, seed: int, shuffle: bool) -> str:
    """Identifies the order of training; moving the data to another folder does not change it."""
    digest = hashlib.sha256(repr((num_frames, seed, shuffle)).encode())
    for source in data.sources:
        digest.update(repr(source.weight).encode())
        for recording in source.recordings:
            digest.update(repr((recording.path_as_written, recording.duration_sec)).encode())
    return digest.hexdigest()[:16]
