"""The order of training and evaluation: which batches come, and where a run is in them."""

import hashlib
import logging
from collections.abc import Generator, Sequence
from typing import Any

import torch

from finetune.config import DataArgs, TrainArgs
from finetune.data.batches import Batch, Batcher, open_store
from finetune.data.codec import Codec
from finetune.data.inspection import inspect_listing
from finetune.data.order import SampleOrder
from finetune.data.reading import Reading
from finetune.data.recording import Recording, SegmentRef
from finetune.data.sources import DataSet, check_share_of_sources, load_sources, warn_of
from finetune.data.store import Store
from finetune.data.text import count_frames
from finetune.distributed import World

logger = logging.getLogger(__name__)


def check_share(
    args: DataArgs,
    codec: Codec,
    *,
    store: Store | None,
    rank: int,
    world_size: int,
    with_eval: bool,
) -> None:
    """Check this rank's share of the data, with `data.cache_dir`, so that the ranks, which need all
    of it, need not each open every file.

    Raises:
        UserError: a path or weight is wrong.
    """
    if store is None:
        return
    specs = {"data.train_data": args.train_data}
    if with_eval:
        specs["data.eval_data"] = args.eval_data
    for key, spec in specs.items():
        check_share_of_sources(
            spec,
            key=key,
            store=store,
            text=codec.text,
            reads=codec.reads,
            reading=Reading.of(args, training=key == "data.train_data"),
            rank=rank,
            world_size=world_size,
        )


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
    store: Store | None,
    num_microbatches: int = 1,
    said: set[str] | None = None,
) -> "TrainLoader":
    """Check all training data and make the endless loader of one rank.

    Args:
        duration_sec: length of a segment, rounded up to whole frames.
        batch_size: segments per batch of this rank.
        store: what `open_store` gives for `args`, one for all loaders of the process.
        num_microbatches: batches of a step.
        said: see `load_sources`.

    Raises:
        UserError: see `load_sources`.
    """
    num_frames = count_frames(duration_sec)
    data = _load(args, codec, num_frames, store, said, training=True)
    batcher = Batcher(
        args,
        codec,
        num_frames,
        batch_size,
        torch.device(device),
        store,
        batches_a_step=num_microbatches,
    )
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
    store: Store | None,
    said: set[str] | None = None,
    beside: Sequence[Recording] = (),
) -> "EvalLoader":
    """Check all evaluation data and make the loader of one rank. Arguments as for training.

    Args:
        beside: what trains; see `load_sources`.
    """
    num_frames = count_frames(duration_sec)
    data = _load(args, codec, num_frames, store, said, beside, training=False)
    batcher = Batcher(args, codec, num_frames, batch_size, torch.device(device), store)
    return EvalLoader(batcher, data, rank, world_size)


def _load(
    args: DataArgs,
    codec: Codec,
    num_frames: int,
    store: Store | None,
    said: set[str] | None,
    beside: Sequence[Recording] = (),
    *,
    training: bool,
) -> DataSet:
    return load_sources(
        args.train_data if training else args.eval_data,
        key="data.train_data" if training else "data.eval_data",
        num_frames=num_frames,
        on_error=args.on_error,
        store=store,
        text=codec.text,
        reads=codec.reads,
        reading=Reading.of(args, training=training),
        said=said,
        beside=beside,
    )


def open_checked_store(args: TrainArgs, codec: Codec, world: World) -> Store | None:
    """Open the store of a run's codes, when the processes have together checked the data for it.

    Raises:
        UserError: see `open_store` and `check_share`.
    """
    store = open_store(args.data)
    if world.size > 1:
        check_share(
            args.data,
            codec,
            store=store,
            rank=world.rank,
            world_size=world.size,
            with_eval=args.do_eval,
        )
        world.barrier()
    return store


def build_loaders(
    args: TrainArgs, codec: Codec, world: World
) -> tuple["TrainLoader", "EvalLoader | None"]:
    """Check all data of a run and make this process's loaders; without `do_eval`, one alone.

    The processes share the check where they share a cache.

    Raises:
        UserError: see `load_sources`.
    """
    store = open_checked_store(args, codec, world)
    places: dict[str, Any] = {
        "duration_sec": args.duration_sec,
        "batch_size": args.batch_size,
        "rank": world.data_rank,
        "world_size": world.data_size,
        "device": world.device,
        "store": store,
        "said": set(),
    }
    train = build_train_loader(
        args.data, codec, seed=args.seed, num_microbatches=args.num_microbatches, **places
    )
    if not args.do_eval:
        return train, None
    evaluation = build_eval_loader(args.data, codec, beside=train.recordings, **places)
    if world.is_main:
        warn_if_shared(train, evaluation)
    return train, evaluation


def warn_if_shared(train: "TrainLoader", evaluation: "EvalLoader") -> None:
    """Warn if recordings that are evaluated are trained on as well, or are copies of such."""
    found = inspect_listing(train.recordings, evaluation.recordings)
    shared = [each for each in found if each.code == "evaluation-in-training"]
    warn_of([("", each) for each in shared], "data.eval_data")


class TrainLoader:
    """An endless iterator of batches whose position can be saved and restored.

    Global sample i is the same segment whatever the number of ranks and the batch size: step s of
    rank r, with W ranks of batch size B, takes the samples from (s·W + r)·B to the next B. So a
    run can be continued on more or fewer devices; nothing is lost or repeated.
    """

    def __init__(
        self,
        batcher: Batcher,
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
        self._fingerprint = _fingerprint(data, batcher.num_frames, seed, shuffle)
        self._num_samples = 0
        self._num_skipped_segments = 0
        self.num_encoded = 0
        """Segments that Mimi has encoded for the batches handed out so far."""
        self._batches: Generator[Batch, None, None] | None = None

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._batcher.batches(self._refs(self._num_samples))
        batch = next(self._batches)
        # Counted here, not where batches are made ahead: the state is what was handed out.
        self._num_samples += self._batcher.batch_size * self._world_size
        self._num_skipped_segments += batch.num_skipped
        self.num_encoded += batch.num_encoded
        return batch

    def _refs(self, start: int) -> Generator[SegmentRef, None, None]:
        """Yield this rank's segments, from global sample `start` on."""
        batch_size = self._batcher.batch_size
        for offset, (source, segment) in enumerate(self._order.walk(start)):
            if offset // batch_size % self._world_size == self._rank:
                yield self._data.sources[source].segments[segment]

    def state_dict(self) -> dict[str, Any]:
        """Position in the data: global samples handed out, a fingerprint of their order, and how
        many segments of this rank have failed so far."""
        return {
            "num_samples": self._num_samples,
            "fingerprint": self._fingerprint,
            "num_skipped_segments": self._num_skipped_segments,
        }

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
        # Earlier versions did not keep it.
        self._num_skipped_segments = state.get("num_skipped_segments", 0)

    def close(self) -> None:
        """Stop working ahead. Iterating again starts anew at the current position."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    @property
    def recordings(self) -> list[Recording]:
        return self._data.recordings

    @property
    def num_segments(self) -> int:
        return self._data.num_segments

    @property
    def segment_frames(self) -> list[int]:
        """Return how many frames of each segment are of its recording."""
        return self._data.segment_frames

    @property
    def segment_shares(self) -> list[float]:
        """Return the share of all draws that falls to each segment."""
        return self._data.segment_shares

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

    def __init__(self, batcher: Batcher, data: DataSet, rank: int, world_size: int) -> None:
        self._batcher = batcher
        self._data = data
        segments = [ref for source in data.sources for ref in source.segments]
        self._refs = segments[rank::world_size]
        self.num_encoded = 0
        """Segments that Mimi has encoded in all passes so far."""

    def __iter__(self) -> Generator[Batch, None, None]:
        for batch in self._batcher.batches(self._refs):
            self.num_encoded += batch.num_encoded
            yield batch

    def __len__(self) -> int:
        """Batches of this rank in one pass."""
        return -(-len(self._refs) // self._batcher.batch_size)

    @property
    def recordings(self) -> list[Recording]:
        return self._data.recordings

    @property
    def num_segments(self) -> int:
        """Return the number of segments of all ranks together."""
        return self._data.num_segments

    @property
    def total_duration_sec(self) -> float:
        return self._data.total_duration_sec

    @property
    def num_skipped(self) -> int:
        """Lines left out at start-up."""
        return self._data.num_skipped


def _fingerprint(data: DataSet, num_frames: int, seed: int, shuffle: bool) -> str:
    """Identifies the order of training; moving the data to another folder does not change it."""
    digest = hashlib.sha256(repr((num_frames, seed, shuffle)).encode())
    for source in data.sources:
        digest.update(repr(source.weight).encode())
        for recording in source.recordings:
            digest.update(repr((recording.path_as_written, recording.duration_sec)).encode())
    return digest.hexdigest()[:16]
