"""A search for the batch that fits, by which `plan --table` fills its cells, and advice combines
changes."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from moshi.models import loaders

from finetune.config import Precision, TrainArgs
from finetune.distributed import shard_size
from finetune.model import plan_model
from finetune.plan.memory import Memory, estimate
from ttt import TTTLMModel

ENOUGH_BATCH = 8
"""With a batch of so many sequences nothing more is changed for a larger one."""

_BASE_BITS = {"bfloat16": 16, "float8": 8, "nf4": 4}
_STATE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}

Changes = Iterator[tuple[str, Memory]]
"""What could be changed, and the memory that the run takes then; small changes first."""


class Setting(NamedTuple):
    """A setting says what is kept in fewer bits."""

    base_precision: Precision
    state: Literal["float32", "bfloat16", "int8"]

    def is_no_wider(self, other: "Setting") -> bool:
        return (
            _BASE_BITS[self.base_precision] <= _BASE_BITS[other.base_precision]
            and _STATE_BYTES[self.state] <= _STATE_BYTES[other.state]
        )

    def changes(self, args: TrainArgs) -> list[str]:
        """Return what is to be set for it."""
        changed = []
        if self.base_precision != args.base_precision:
            changed.append(f"base_precision: {self.base_precision}")
        if self.state != args.optim.state:
            changed.append(f"optim.state: {self.state}")
        return changed


SMALLER = (Setting("nf4", "float32"), Setting("nf4", "int8"))
"""Settings of a frozen base, after a run's own; what changes least first."""
SMALLER_FULL = (Setting("bfloat16", "bfloat16"), Setting("bfloat16", "int8"))


def least_kept(args: TrainArgs) -> TrainArgs:
    """Return a run that keeps the least for the backward pass."""
    recomputed = dataclasses.replace(args, gradient_checkpointing=True, selective_layers=0)
    return keeping_writes(recomputed, keep=False)


def keeping_writes(args: TrainArgs, *, keep: bool = True) -> TrainArgs:
    """Return the run with `ttt.keep_writes` as said, where it is read; else the run itself."""
    kept = dataclasses.replace(args.ttt, keep_writes=True)
    if not kept.keeps_writes:
        return args
    return dataclasses.replace(args, ttt=dataclasses.replace(kept, keep_writes=keep))


def to_set(now: TrainArgs, then: TrainArgs) -> str:
    """Return what is to be set for a run that keeps other results or has another batch."""
    keys = "gradient_checkpointing", "selective_layers", "batch_size", "num_microbatches"
    found = [(key, getattr(now, key), getattr(then, key)) for key in keys]
    found.append(("ttt.keep_writes", now.ttt.keep_writes, then.ttt.keep_writes))
    return ", ".join(f"{key}: {str(other).lower()}" for key, own, other in found if own != other)


class Choice(NamedTuple):
    """A setting, and the largest batch that fits with it."""

    setting: Setting
    args: TrainArgs
    """With the setting, but not yet the batch."""
    model: TTTLMModel
    batch_size: int


class Search:
    """Searches the settings for one kind of training."""

    def __init__(self, args: TrainArgs, info: loaders.CheckpointInfo, num_gpus: int = 1) -> None:
        self.args, self.info, self.num_gpus = args, info, num_gpus
        self._models: dict[Precision, TTTLMModel] = {}

    def best(self, is_enough: Callable[[Memory], bool], most: int) -> Choice | None:
        """Return the first setting with which `ENOUGH_BATCH` sequences fit (or `most`, if that is
        less); without such a one, that with the largest batch; None where not one sequence fits."""
        best = None
        for setting in self._settings():
            args, model = self._with(setting)
            batch_size = largest_batch(args, model, is_enough, most, self.num_gpus)
            if batch_size > (best.batch_size if best else 0):
                best = Choice(setting, args, model, batch_size)
            if batch_size >= min(ENOUGH_BATCH, most):
                break
        return best

    def least(self, own: Setting | None = None) -> Choice:
        """Return the setting with which one sequence takes the least; or `own`, where it is wanted,
        in the same form."""
        settings = [own] if own else self._settings()
        choices = [Choice(each, *self._with(each), 1) for each in settings]
        return min(choices, key=self._peak)

    def _peak(self, choice: Choice) -> float:
        args = dataclasses.replace(choice.args, batch_size=choice.batch_size)
        return estimate(args, choice.model, self.num_gpus).peak

    def _with(self, setting: Setting) -> tuple[TrainArgs, TTTLMModel]:
        optim = dataclasses.replace(self.args.optim, state=setting.state)
        args = dataclasses.replace(self.args, base_precision=setting.base_precision, optim=optim)
        return args, self._model(args)

    def _settings(self) -> list[Setting]:
        own = Setting(self.args.base_precision, self.args.optim.state)
        smaller = SMALLER_FULL if self.args.full_finetuning else SMALLER
        is_sharded = shard_size(self.args, self.num_gpus) > 1
        return [own] + [
            each
            for each in smaller
            if each != own and each.is_no_wider(own) and not (is_sharded and each.state == "int8")
        ]

    def _model(self, args: TrainArgs) -> TTTLMModel:
        if args.base_precision not in self._models:
            self._models[args.base_precision] = plan_model(args, self.info)
        return self._models[args.base_precision]


def largest_batch(
    args: TrainArgs,
    model: TTTLMModel,
    is_enough: Callable[[Memory], bool],
    most: int,
    num_gpus: int = 1,
) -> int:
    """Return 0 where not one sequence fits."""

    def with_batch(batch_size: int) -> bool:
        changed = dataclasses.replace(args, batch_size=batch_size)
        return is_enough(estimate(changed, model, num_gpus))

    return largest(with_batch, most)


def largest(is_enough: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to `most` that is enough, where all below it are too; or 0."""
    low, high = 0, 1
    while high <= most and is_enough(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_enough(middle) else (low, middle)
    return low
