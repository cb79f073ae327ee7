"""The processes of a run: who this one is, and sums over all of them.

Data parallel over replicas: every process holds the whole model, and gradients are summed. A run
without `torchrun` is a world of one, for which every function here does nothing.
"""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from finetune.errors import UserError


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def place(self) -> dict[str, int]:
        """This process among all, as the data loaders want it."""
        return {"rank": self.rank, "world_size": self.size}

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over all processes; also stored in `tensor` itself."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_all(self, tensors: Iterable[torch.Tensor]) -> None:
        """`sum` of many tensors at once, in place."""
        if self.size > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def join_world(device: Literal["auto", "cpu", "cuda"]) -> World:
    """Join the processes that `torchrun` started, or be alone.

    Raises:
        UserError: `cuda` was asked for and there is none, or there are fewer than processes.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    available = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and not available):
        place = torch.device("cpu")
    elif local_rank >= available:
        raise UserError(
            f"device: this host has {available} CUDA devices, and process {local_rank} of it needs "
            f"one. Start fewer processes (torchrun --nproc-per-node), or set device: cpu."
        )
    else:
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    return World(rank, size, place)


def peak_memory_gb(device: torch.device) -> float:
    """The most that this process has held so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: there a process starts with the peak of the one that started it.
        peak_kb = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(peak_kb.split()[1]) * 1024 / 1e9
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if sys.platform == "darwin" else peak * 1024) / 1e9
