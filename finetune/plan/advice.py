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
from ttt import TTTLMModel

SHORTEST_SEC = 1.0
"""No shorter sequences are proposed."""

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
    """Return changes that make a run fit, each alone; the least of each kind.

    Args:
        model: the run's, on `meta`.
    """
    advice = _Advice(args, model, info, num_processes, is_enough)
    kinds = [
        advice.less_kept(),
        advice.smaller_batches(),
        advice.shorter_sequences(),
        *([advice.more_gpus()] if on_gpu else []),
        advice.fewer_trained(),
        advice.smaller_adapters(),
        advice.narrower_weights(),
        advice.narrower_base(),
        advice.narrower_moments(),
    ]
    found = (next((each for each in kind if is_enough(each[1])), None) for kind in kinds)
    return [f"{each[0]}: {each[1].peak / 1e9:.1f} GB" for each in found if each is not None]


@dataclasses.dataclass(frozen=True)
class _Advice:
    args: TrainArgs
    model: TTTLMModel
    info: loaders.CheckpointInfo
    num_processes: int
    is_enough: Callable[[Memory], bool]

    def less_kept(self) -> Changes:
        less: dict[Any, list[Any]] = {True: [], "selective": [True], False: ["selective", True]}
        for value in less[self.args.gradient_checkpointing]:
            what = f"gradient_checkpointing: {str(value).lower()}"
            yield what, self._with(gradient_checkpointing=value)

    def smaller_batches(self) -> Changes:
        batch_size = self.args.batch_size
        while batch_size > 1:
            batch_size //= 2
            microbatches = self.args.num_microbatches * -(-self.args.batch_size // batch_size)
            yield (
                f"batch_size: {batch_size} with num_microbatches: {microbatches}",
                self._with(batch_size=batch_size, num_microbatches=microbatches),
            )

    def shorter_sequences(self) -> Changes:
        num_frames = count_frames(self.args.duration_sec) // 2
        while num_frames >= SHORTEST_SEC * FRAME_RATE_HZ:
            duration_sec = num_frames / FRAME_RATE_HZ
            yield f"duration_sec: {duration_sec:g}", self._with(duration_sec=duration_sec)
            num_frames //= 2

    def more_gpus(self) -> Changes:
        for number in (self.num_processes, 2, 4, 8, 16, 32, 64):
            if 1 < number >= self.num_processes:
                parallel = dataclasses.replace(self.args.parallel, shard_size=number)
                args = dataclasses.replace(self.args, parallel=parallel)
                what = f"GPUs: {number} with parallel.shard_size: {number}"
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
