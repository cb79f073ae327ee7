"""Advice names what to change of a run that takes too much memory, and what it takes then."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from moshi.models import loaders

from finetune.config import TrainArgs
from finetune.data import FRAME_RATE_HZ, count_frames
from finetune.distributed import shard_size
from finetune.model import plan_model
from finetune.plan.memory import Memory, estimate
from finetune.plan.search import Search, largest, largest_batch
from finetune.plan.speed import step_time
from ttt import TTTLMModel
from ttt.layers import layer_class

SHORTEST_SEC = 1.0
"""No shorter sequences are proposed."""
FEWEST_UPDATES = 3
"""Nor such in which TTT makes fewer updates: with them it has hardly anything to do."""

Changes = Iterator[tuple[str, Memory]]
"""What could be changed, and the memory that the run takes then; small changes first."""


def ways_to_fit(
    args: TrainArgs,
    model: TTTLMModel,
    info: loaders.CheckpointInfo,
    num_processes: int,
    is_enough: Callable[[Memory], bool],
    *,
    on_gpu: bool = True,
) -> list[str]:
    """Return changes that make a run fit, each alone, the least of each kind; and where none does
    without more GPUs, those that do together.

    Args:
        model: the run's, on `meta`.
    """
    advice = _Advice(args, model, info, num_processes, is_enough)
    kinds = [
        advice.less_kept(),
        advice.same_steps(),
        advice.smaller_batches(),
        advice.shorter_sequences(),
        advice.fewer_trained(),
        advice.smaller_adapters(),
        advice.narrower_weights(),
        advice.narrower_base(),
        advice.narrower_moments(),
    ]
    found = [each for kind in kinds if (each := advice.first_enough(kind))]
    if not found:
        found = list(advice.combinations())
    if on_gpu and (more := advice.first_enough(advice.more_gpus())):
        found.append(more)
    return [f"{what}: {memory.peak / 1e9:.1f} GB" for what, memory in found]


def way_to_speed(
    args: TrainArgs,
    model: TTTLMModel,
    info: loaders.CheckpointInfo,
    num_processes: int,
    is_enough: Callable[[Memory], bool],
) -> tuple[str, TrainArgs] | None:
    """Return what a run that fits can keep in the memory that it leaves, and the run with it."""
    return _Advice(args, model, info, num_processes, is_enough).more_kept()


@dataclasses.dataclass(frozen=True)
class _Advice:
    args: TrainArgs
    model: TTTLMModel
    info: loaders.CheckpointInfo
    num_processes: int
    is_enough: Callable[[Memory], bool]

    def less_kept(self) -> Changes:
        mode = self.args.gradient_checkpointing
        if mode is False:
            less = {"gradient_checkpointing": "selective"}
            yield self._keeping(**less), self._with(**less)
        most = len(self.model.transformer.layers)
        if mode is True:
            most = self.args.selective_layers - 1
        changes: dict[str, Any] = {"gradient_checkpointing": True}
        changes["selective_layers"] = largest(
            lambda number: self.is_enough(self._with(**changes, selective_layers=number)), most
        )
        if mode is not True or self.args.selective_layers:
            yield self._keeping(**changes), self._with(**changes)

    def more_kept(self) -> tuple[str, TrainArgs] | None:
        """Return what makes the step shorter in the memory that is left, and the run with it; None
        where nothing does."""
        args = self.args
        is_known = not args.ttt.enabled or layer_class(args.ttt.method).cost(args.ttt) is not None
        if args.gradient_checkpointing is not True or not is_known:
            return None
        everywhere = dict[str, Any](gradient_checkpointing="selective", selective_layers=0)
        if self.is_enough(self._with(**everywhere)):
            return self._keeping(**everywhere), dataclasses.replace(args, **everywhere)
        most = largest(
            lambda number: self.is_enough(self._with(selective_layers=number)),
            len(self.model.transformer.layers),
        )
        # Of equal times the one that takes the least memory: some layers spare nothing.
        number = min(range(args.selective_layers, most + 1), key=self._sec_with, default=0)
        if number <= args.selective_layers:
            return None
        return self._keeping(selective_layers=number), self._args_with(number)

    def _args_with(self, selective_layers: int) -> TrainArgs:
        return dataclasses.replace(self.args, selective_layers=selective_layers)

    def _sec_with(self, selective_layers: int) -> float:
        args = self._args_with(selective_layers)
        return round(step_time(args, self.model, self.num_processes).high_sec, 4)

    def _keeping(self, **changes: Any) -> str:
        """Return what is to be set, without what is set already."""
        said = [
            f"{key}: {str(value).lower()}"
            for key, value in changes.items()
            if value != getattr(self.args, key)
        ]
        return ", ".join(said)

    def first_enough(self, changes: Changes) -> tuple[str, Memory] | None:
        return next((each for each in changes if self.is_enough(each[1])), None)

    def same_steps(self) -> Changes:
        """The largest batch whose micro-batches make up the same step."""
        if batch_size := self._batch_of_same_step():
            what = f"batch_size: {batch_size} with num_microbatches: {self._segments // batch_size}"
            yield what, self._in_parts_of(batch_size)

    def smaller_batches(self) -> Changes:
        """The largest batch, where that of the same step is smaller."""
        most = self.args.batch_size - 1
        batch_size = largest_batch(self.args, self.model, self.is_enough, most, self.num_processes)
        if batch_size > self._batch_of_same_step():
            segments = batch_size * self.args.num_microbatches
            what = f"batch_size: {batch_size} ({segments} segments a step, not {self._segments})"
            yield what, self._with(batch_size=batch_size)

    @property
    def _segments(self) -> int:
        return self.args.batch_size * self.args.num_microbatches

    def _batch_of_same_step(self) -> int:
        """Return 0 where none fits."""
        smaller = range(self.args.batch_size - 1, 0, -1)
        sizes = (size for size in smaller if self._segments % size == 0)
        return next((size for size in sizes if self.is_enough(self._in_parts_of(size))), 0)

    def _in_parts_of(self, batch_size: int) -> Memory:
        return self._with(batch_size=batch_size, num_microbatches=self._segments // batch_size)

    def shorter_sequences(self) -> Changes:
        """The longest sequences of whole seconds."""
        frames = count_frames(self.args.duration_sec)
        least = SHORTEST_SEC
        if self.args.ttt.enabled:
            least = max(least, (FEWEST_UPDATES * self.args.ttt.update_frames + 1) / FRAME_RATE_HZ)
        most = int((frames - 1) / FRAME_RATE_HZ)
        duration_sec = largest(lambda sec: self.is_enough(self._with(duration_sec=sec)), most)
        if duration_sec >= least:
            yield f"duration_sec: {duration_sec}", self._with(duration_sec=duration_sec)

    def combinations(self) -> Changes:
        """Yield what `plan --table` has for a GPU, of no more sequences than the run has."""
        kinds = {"": self.args}
        if self.args.full_finetuning:
            lora = dataclasses.replace(self.args.lora, enable=True)
            adapted = dataclasses.replace(self.args, full_finetuning=False, lora=lora)
            kinds["full_finetuning: false, lora.enable: true"] = adapted
        for what, kind in kinds.items():
            args = dataclasses.replace(kind, gradient_checkpointing=True, selective_layers=0)
            search = Search(args, self.info, self.num_processes)
            choice = search.best(self.is_enough, args.batch_size)
            if choice is None:
                continue
            changes = [what] if what else []
            if self.args.gradient_checkpointing is not True:
                changes.append("gradient_checkpointing: true")
            if self.args.selective_layers:
                changes.append("selective_layers: 0")
            together = ", ".join(changes + choice.setting.changes(kind))
            then = _Advice(choice.args, choice.model, self.info, self.num_processes, self.is_enough)
            if choice.batch_size == args.batch_size:
                yield together, then._with()
                return
            for batches in (then.same_steps(), then.smaller_batches()):
                if each := then.first_enough(batches):
                    yield f"{together}, {each[0]}", each[1]
            return

    def more_gpus(self) -> Changes:
        optim, also = self.args.optim, ""
        if optim.state == "int8":
            # Its blocks are those of whole parameters: a sharded model has none.
            optim = dataclasses.replace(optim, state="bfloat16")
            also = ", optim.state: bfloat16"
        for number in (self.num_processes, 2, 4, 8, 16, 32, 64):
            if 1 < number >= self.num_processes:
                parallel = dataclasses.replace(self.args.parallel, shard_size=number)
                args = dataclasses.replace(self.args, parallel=parallel, optim=optim)
                what = f"GPUs: {number} with parallel.shard_size: {number}{also}"
                yield what, estimate(args, self.model, number)

    def fewer_trained(self) -> Changes:
        if self.args.full_finetuning:
            lora = dataclasses.replace(self.args.lora, enable=True)
            memory = self._with_other_model(full_finetuning=False, lora=lora)
            yield "full_finetuning: false with lora.enable: true", memory

    def smaller_adapters(self) -> Changes:
        rank = self.args.lora.rank if self.args.lora.enable else 1
        # A model for each, which takes seconds of Moshi's size: only where the smallest fits.
        if rank == 1 or not self.is_enough(self._with_rank(1)):
            return
        while rank > 1:
            rank = max(1, rank // 4)
            yield f"lora.rank: {rank}", self._with_rank(rank)

    def _with_rank(self, rank: int) -> Memory:
        return self._with_other_model(lora=dataclasses.replace(self.args.lora, rank=rank))

    def narrower_weights(self) -> Changes:
        if self.args.param_dtype == "float32":
            yield "param_dtype: bfloat16", self._with(param_dtype="bfloat16")

    def narrower_base(self) -> Changes:
        if not self.args.full_finetuning and self.args.base_precision == "bfloat16":
            yield "base_precision: nf4", self._with_other_model(base_precision="nf4")

    def narrower_moments(self) -> Changes:
        if self.args.optim.state == "float32":
            for state in ("bfloat16", "int8"):
                if state == "int8" and shard_size(self.args, self.num_processes) > 1:
                    continue
                optim = dataclasses.replace(self.args.optim, state=state)
                yield f"optim.state: {state}", self._with(optim=optim)

    def _with(self, **changes: Any) -> Memory:
        args = dataclasses.replace(self.args, **changes)
        return estimate(args, self.model, self.num_processes)

    def _with_other_model(self, **changes: Any) -> Memory:
        args = dataclasses.replace(self.args, **changes)
        return estimate(args, plan_model(args, self.info), self.num_processes)
