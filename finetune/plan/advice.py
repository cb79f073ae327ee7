"""Advice names what to change of a run that takes too much memory, and what it takes then."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from moshi.models import loaders

from finetune.config import TrainArgs
from finetune.data import FRAME_RATE_HZ, count_frames
from finetune.distributed import shard_size
from finetune.model import plan_model
from finetune.plan.memory import Memory, estimate
from finetune.plan.more_gpus import on_more_gpus
from finetune.plan.search import (
    Changes,
    Search,
    Setting,
    keeping_writes,
    largest,
    largest_batch,
    least_kept,
    to_set,
)
from finetune.plan.speed import step_time
from ttt import TTTLMModel
from ttt.layers import layer_class

SHORTEST_SEC = 1.0
"""No shorter sequences are proposed."""
FEWEST_UPDATES = 3
"""Nor such in which TTT makes fewer updates: with them it has hardly anything to do."""

_SHARED = Setting("bfloat16", "bfloat16")
"""What takes the least where processes share a model: a base in fewer bits is not cut, and moments
in int8 are not either."""


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
    without more GPUs, those that do together. Nothing where no changes are enough.

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
    if not found:
        found = list(advice.all_together())
    if on_gpu and (more := advice.first_enough(advice.more_gpus())):
        found.append(more)
    if on_gpu and not found:
        found = list(advice.all_together_on_more_gpus())
    return [f"{what}: {memory.peak / 1e9:.1f} GB" for what, memory in found]


def no_way(
    args: TrainArgs,
    model: TTTLMModel,
    info: loaders.CheckpointInfo,
    num_processes: int,
    *,
    on_gpu: bool = True,
) -> tuple[str, Memory]:
    """Return the words for a run that no changes are enough for, and the least that it takes."""
    advice = _Advice(args, model, info, num_processes, lambda _: True)
    changes, memory = advice.least(shared=False)
    if on_gpu and num_processes > 1:
        shared = advice.least(shared=True)
        changes, memory = min((changes, memory), shared, key=lambda each: each[1].peak)
    what = f"with {', '.join(changes)}" if changes else "as it is"
    least = f"{memory.peak / 1e9:.1f} GB"
    return f"no change is enough, nor all together: at the least it takes {least}, {what}", memory


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
        args, mode = self.args, self.args.gradient_checkpointing
        if mode is False:
            yield self._change(dataclasses.replace(args, gradient_checkpointing="selective"))
        most = args.selective_layers - 1 if mode is True else len(self.model.transformer.layers)
        keeping = partial(dataclasses.replace, args, gradient_checkpointing=True)
        most = largest(lambda number: self._is_enough(keeping(selective_layers=number)), most)
        if mode is not True or args.selective_layers:
            yield self._change(keeping(selective_layers=most))
        if least_kept(args) != keeping(selective_layers=0):
            yield self._change(least_kept(args))

    def more_kept(self) -> tuple[str, TrainArgs] | None:
        """Return what makes the step shorter in the memory that is left, and the run with it; None
        where nothing does."""
        args, ttt = self.args, self.args.ttt
        is_known = not ttt.enabled or layer_class(ttt.method).cost(ttt) is not None
        if args.gradient_checkpointing is not True or not is_known:
            return None
        selective: dict[str, Any] = {"gradient_checkpointing": "selective", "selective_layers": 0}
        everywhere = dataclasses.replace(args, **selective)
        if self._is_enough(everywhere):
            return to_set(args, everywhere), everywhere
        # Of equal memory what layers with TTT write spares the most time.
        if self._is_enough(writing := keeping_writes(args)) and writing != args:
            return to_set(args, writing), writing
        most = largest(
            lambda number: self._is_enough(self._args_with(number)),
            len(self.model.transformer.layers),
        )
        # Of equal times the one that takes the least memory: some layers spare nothing.
        number = min(range(args.selective_layers, most + 1), key=self._sec_with, default=0)
        if number <= args.selective_layers:
            return None
        return to_set(args, self._args_with(number)), self._args_with(number)

    def _args_with(self, selective_layers: int) -> TrainArgs:
        return dataclasses.replace(self.args, selective_layers=selective_layers)

    def _sec_with(self, selective_layers: int) -> float:
        args = self._args_with(selective_layers)
        return round(step_time(args, self.model, self.num_processes).high_sec, 4)

    def _change(self, then: TrainArgs) -> tuple[str, Memory]:
        return to_set(self.args, then), estimate(then, self.model, self.num_processes)

    def _is_enough(self, then: TrainArgs) -> bool:
        return self.is_enough(self._change(then)[1])

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
            segments = batch_size * self.args.num_microbatches * self.num_processes
            said = f"{segments} segments a step, not {self._segments_of_step}"
            what = f"batch_size: {batch_size} ({said})"
            yield what, self._with(batch_size=batch_size)

    @property
    def _segments(self) -> int:
        """Return how many segments a process has of a step."""
        return self.args.batch_size * self.args.num_microbatches

    @property
    def _segments_of_step(self) -> int:
        return self._segments * self.num_processes

    def _batch_of_same_step(self) -> int:
        """Return 0 where none fits."""
        smaller = range(self.args.batch_size - 1, 0, -1)
        sizes = (size for size in smaller if self._segments % size == 0)
        return next((size for size in sizes if self.is_enough(self._in_parts_of(size))), 0)

    def _in_parts_of(self, batch_size: int) -> Memory:
        return self._with(batch_size=batch_size, num_microbatches=self._segments // batch_size)

    def shorter_sequences(self) -> Changes:
        """The longest sequences of whole seconds."""
        most = int((count_frames(self.args.duration_sec) - 1) / FRAME_RATE_HZ)
        duration_sec = largest(lambda sec: self.is_enough(self._with(duration_sec=sec)), most)
        if duration_sec >= self.shortest_sec:
            yield f"duration_sec: {duration_sec}", self._with(duration_sec=duration_sec)

    @property
    def shortest_sec(self) -> float:
        """Return the length below which no sequences are proposed."""
        if not self.args.ttt.enabled:
            return SHORTEST_SEC
        fewest_frames = FEWEST_UPDATES * self.args.ttt.update_frames + 1
        return max(SHORTEST_SEC, fewest_frames / FRAME_RATE_HZ)

    def combinations(self) -> Changes:
        """Yield what `plan --table` has for a GPU, of no more sequences than the run has, and with
        nothing kept for speed."""
        for changes, kind in self._kinds():
            args = least_kept(kind)
            search = Search(args, self.info, self.num_processes)
            choice = search.best(self.is_enough, args.batch_size)
            if choice is None:
                continue
            together = ", ".join([*changes, *choice.setting.changes(kind)])
            then = self._of(choice.args, choice.model)
            if choice.batch_size == args.batch_size:
                yield together, then._with()
                return
            for batches in (then.same_steps(), then.smaller_batches()):
                if each := then.first_enough(batches):
                    yield f"{together}, {each[0]}", each[1]
            return

    def _kinds(self) -> list[tuple[list[str], TrainArgs]]:
        """Return what may train, the run's own first: what is to be set for it, all of the main
        transformer's results being computed again, and the run with what trains."""
        recomputed = [text] if (text := to_set(self.args, least_kept(self.args))) else []
        kinds = [(recomputed, self.args)]
        if self.args.full_finetuning:
            lora = dataclasses.replace(self.args.lora, enable=True)
            adapted = dataclasses.replace(self.args, full_finetuning=False, lora=lora)
            what = "full_finetuning: false, lora.enable: true"
            kinds.append(([what, *recomputed], adapted))
        return kinds

    def _of(self, args: TrainArgs, model: TTTLMModel) -> "_Advice":
        return _Advice(args, model, self.info, self.num_processes, self.is_enough)

    def narrowest(self, own: Setting | None = None) -> tuple[list[str], "_Advice"]:
        """Return all changes that leave sequences and adapters as they are, and advice on the run
        with them.

        Args:
            own: bits of the base and of moments; None: those that take the least.
        """
        changes, kind = self._kinds()[-1]
        args = least_kept(kind)
        if args.param_dtype == "float32":
            changes.append("param_dtype: bfloat16")
            args = dataclasses.replace(args, param_dtype="bfloat16")
        choice = Search(args, self.info, self.num_processes).least(own)
        changes += choice.setting.changes(kind)
        if args.batch_size > 1:
            changes.append(f"batch_size: 1 with num_microbatches: {self._segments}")
        args = dataclasses.replace(choice.args, batch_size=1, num_microbatches=self._segments)
        return changes, self._of(args, choice.model)

    def all_together(self) -> Changes:
        """Yield what is enough beside all other changes: shorter sequences, smaller adapters, or
        both."""
        changes, then = self.narrowest()
        ways = [(changes, then.shorter_sequences()), (changes, then.smaller_adapters())]
        found = [(before, each) for before, way in ways if (each := then.first_enough(way))]
        if not found:
            changes, then = then.shortest(changes)
            each = then.first_enough(then.smaller_adapters())
            found = [(changes, each)] if each else []
        for before, (what, memory) in found:
            yield ", ".join([*before, what]), memory

    def all_together_on_more_gpus(self) -> Changes:
        """Yield the number of GPUs that is enough beside all other changes, as few as there need
        be."""
        changes, then = self.narrowest(_SHARED)
        shorter = then.shortest(changes)
        for before, run in ((changes, then), shorter, shorter[1].least_adapters(shorter[0])):
            if each := run.first_enough(run.more_gpus()):
                yield ", ".join([*before, each[0]]), each[1]
                return

    def least(self, *, shared: bool) -> tuple[list[str], Memory]:
        """Return all changes together, and what the run takes with them.

        Args:
            shared: all processes share one model.
        """
        changes, then = self.narrowest(_SHARED if shared else None)
        changes, then = then.shortest(changes)
        changes, then = then.least_adapters(changes)
        if not shared:
            return changes, then._with()
        parallel = dataclasses.replace(then.args.parallel, shard_size=self.num_processes)
        if parallel != then.args.parallel:
            changes = [*changes, f"parallel.shard_size: {self.num_processes}"]
        return changes, then._with(parallel=parallel)

    def shortest(self, changes: list[str]) -> tuple[list[str], "_Advice"]:
        """Return changes with the shortest sequences that are proposed beside them, and advice on
        the run with these."""
        duration_sec = math.ceil(self.shortest_sec)
        if duration_sec >= self.args.duration_sec:
            return changes, self
        args = dataclasses.replace(self.args, duration_sec=duration_sec)
        return [*changes, f"duration_sec: {duration_sec}"], self._of(args, self.model)

    def least_adapters(self, changes: list[str]) -> tuple[list[str], "_Advice"]:
        """Return the same with LoRA's smallest rank."""
        if not self.args.lora.enable or self.args.lora.rank == 1:
            return changes, self
        args = dataclasses.replace(self.args, lora=dataclasses.replace(self.args.lora, rank=1))
        return [*changes, "lora.rank: 1"], self._of(args, plan_model(args, self.info))

    def more_gpus(self) -> Changes:
        """The fewest GPUs that share the model; what is kept for speed is given up where fewer are
        enough without it, but not where that alone is enough."""
        least = least_kept(self.args)
        runs = [self.args] if self._is_enough(least) else [self.args, least]
        return on_more_gpus(runs, self.model, self.num_processes)

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
