"""Filling `data.cache_dir` ahead of training."""

import contextlib
from collections.abc import Generator, Iterator
from typing import Any

import torch

from finetune.config import DataArgs
from finetune.data.batches import Batcher
from finetune.data.codec import Codec
from finetune.data.reading import Reading
from finetune.data.recording import Recording, SegmentRef
from finetune.data.sources import load_sources
from finetune.data.store import Store
from finetune.data.text import count_frames
from finetune.errors import UserError, counted
from finetune.kept import require_room

_CODE_BYTES = 2
_PER_TURN = 8
"""Segments encoded between two looks at what other processes have done meanwhile."""


class CacheFill:
    """Encodes a process's share of the segments of `data.train_data` and `data.eval_data`.

    Iterating yields, after every few segments, how many of the share are done.
    """

    def __init__(
        self,
        args: DataArgs,
        codec: Codec,
        *,
        duration_sec: float,
        store: Store | None,
        with_eval: bool,
        rank: int,
        world_size: int,
    ) -> None:
        """
        Args:
            store: `data.cache_dir`, see `open_store`.

        Raises:
            UserError: there is no `data.cache_dir`, or no room for all codes; or see
                `load_sources`.
        """
        if store is None:
            raise UserError(
                "data.cache_dir is not set: name the folder that is to keep the codes, in the "
                "configuration or as --data.cache_dir=FOLDER."
            )
        num_frames = count_frames(duration_sec)
        options: dict[str, Any] = {
            "num_frames": num_frames, "on_error": args.on_error, "store": store, "text": codec.text,
            "reads": codec.reads, "said": set(),
        }  # fmt: skip
        specs = {"data.train_data": args.train_data}
        if with_eval:
            specs["data.eval_data"] = args.eval_data
        segments: list[SegmentRef] = []
        recordings: list[Recording] = []
        for key, spec in specs.items():
            reading = Reading.of(args, training=key == "data.train_data")
            data = load_sources(spec, key=key, reading=reading, beside=recordings, **options)
            segments += [ref for source in data.sources for ref in source.segments]
            recordings += data.recordings
        self._store = store
        self._num_appended_before = store.num_appended
        self._refs = list(dict.fromkeys(segments))[rank::world_size]
        # Codes stay on the CPU, where nothing is made ahead; workers read ahead as always.
        self._batcher = Batcher(args, codec, num_frames, _PER_TURN, torch.device("cpu"), store)
        self._missing = [ref for ref in self._refs if not self._batcher.has(ref)]
        frames = [ref.num_valid_frames(num_frames) for ref in self._missing]
        require_room(store.folder, sum(frames) * 2 * codec.mimi.num_codebooks * _CODE_BYTES)
        self.num_encoded = 0
        self.num_skipped = 0

    def __len__(self) -> int:
        return len(self._refs)

    @property
    def num_missing(self) -> int:
        """Segments whose codes were not there at the start."""
        return len(self._missing)

    def __iter__(self) -> Iterator[int]:
        """
        Raises:
            UserError: the folder cannot be written, or a recording is broken.
        """
        return self._run()

    def _run(self) -> Generator[int, None, None]:
        num_done = len(self) - len(self._missing)
        if self._missing:
            self._stop_if_not_kept()
        with contextlib.closing(self._batcher.batches(self._missing)) as batches:
            for batch in batches:
                self._stop_if_not_kept()
                self.num_encoded += batch.num_encoded
                self.num_skipped += batch.num_skipped
                num_done += len(batch.codes)
                yield num_done

    def _stop_if_not_kept(self) -> None:
        if (error := self._store.write_error) is not None:
            num_kept = self._store.num_appended - self._num_appended_before
            kept = counted(num_kept, "segment was", "segments were")
            raise UserError(
                f"data.cache_dir: {self._store.folder} cannot be written ({error.strerror}); "
                f"{kept} kept. Make room, or name a folder that can be written, and "
                "start again: what was kept stays."
            )
