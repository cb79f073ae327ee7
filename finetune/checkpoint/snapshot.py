"""What a checkpoint holds, in memory, until it is written."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from finetune.checkpoint.consolidated import consolidated
from finetune.config import TrainArgs
from finetune.distributed import World, shard_size
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


class CheckpointBytes(NamedTuple):
    """The size of a checkpoint, in bytes."""

    copied: float = 0.0
    """In the host's memory, until it is written, by this process."""
    written: float = 0.0
    """On the disk, by all processes."""


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
    return CheckpointBytes(copied, kept + weights)
