"""What a checkpoint holds, in memory, until it is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from finetune.checkpoint.consolidated import consolidated
from finetune.config import TrainArgs
from finetune.distributed import World, shard_size
from finetune.kept import checkpoints_in, step_of
from finetune.model import adapter_roles
from finetune.step import moment_bytes
from ttt import TTTLMModel


@dataclass
class Snapshot:
    """A step's checkpoint in memory."""

    step: int
    eval_loss: float | None
    weights: dict[str, dict[str, Tensor]]
    """What is for people: files of tensors; empty but on the first process."""
    shards: dict[str, Tensor]
    """The optimizer's tensors, this process's parts."""
    resume_state: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """Return the size of all processes' tensors together, in bytes."""
        tensors = [
            *self.shards.values(),
            *(t for file in self.weights.values() for t in file.values()),
        ]
        return sum(t.numel() * t.element_size() for t in tensors)


SPARE_BYTES = 2**24
"""What must be free on the disk besides a checkpoint's tensors."""


class CheckpointBytes(NamedTuple):
    """The size of a checkpoint, in bytes."""

    copied: float = 0.0
    """In the host's memory, until it is written, by this process."""
    written: float = 0.0
    """On the disk, by all processes, and free beside it."""
    num_at_once: int = 1
    """How many more than now lie on the disk at the same time, as `num_ckpt_keep` says."""


def checkpoint_bytes(args: TrainArgs, model: TTTLMModel, world: World) -> CheckpointBytes:
    """
    Args:
        model: may be on `meta`, and is not sharded yet.
    """
    if not args.do_ckpt:
        return CheckpointBytes()
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    # Float32 weights and two moments.
    kept = sum(4 * number + moment_bytes(number, args.optim.state) for number in trained)
    weights = sum(
        tensor.numel() * tensor.element_size()
        for tensors in consolidated(args, model, adapter_roles(args)).values()
        for _, tensor in tensors
    )
    copied = kept / shard_size(args, world.size) if args.ckpt_async else 0.0
    if world.is_main and (args.ckpt_async or world.device.type == "cuda"):
        copied += weights
    return CheckpointBytes(copied, kept + weights + SPARE_BYTES, _num_at_once(args))


def _num_at_once(args: TrainArgs) -> int:
    """Return how many checkpoints more than now there will be on the disk at the same time."""
    # Those of a run that is replaced make room for others as well.
    there = list(map(step_of, checkpoints_in(Path(args.run_dir) / "checkpoints")))
    done = min(there[-1], args.max_steps) if there and args.resume else 0
    every = args.ckpt_freq if args.ckpt_freq >= 1 else args.max_steps
    num_to_come = -(-args.max_steps // every) - done // every
    if args.num_ckpt_keep is None:
        return num_to_come
    # An old one is deleted when the next one is complete; the best one is kept besides.
    most = args.num_ckpt_keep + 1 + args.do_eval
    return min(num_to_come, max(1, most - len(there)))
