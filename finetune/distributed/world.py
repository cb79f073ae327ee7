"""The processes of a run: who this one is, and sums over all of them.

Every process trains on its own batches, and gradients are summed. It holds the whole model, or a
part of it: see `finetune.distributed.sharding`. A run without `torchrun` is a world of one, for
which every function here does nothing.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from finetune.errors import UserError

T = TypeVar("T")

BUCKET_BYTES = 2**28
"""Exchanged at once when many tensors are: enough for the link's full speed, and little memory."""


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None
    """All processes, for a thread that works beside the training: it must not mix its exchanges
    with those of the training."""

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
        """`sum` of many tensors of one type, in place. They are exchanged by way of few large ones:
        Moshi 7B with LoRA has 700 gradients, and every exchange takes time of its own."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            parts = self.sum(torch.cat([tensor.flatten() for tensor in bucket])).split(
                [tensor.numel() for tensor in bucket]
            )
            summed = [part.view_as(x) for part, x in zip(parts, bucket, strict=True)]
            torch._foreach_copy_(bucket, summed)

    def gather(self, thing: T) -> list[T]:
        """Return what each process has, by rank; exchanged by way of the host."""
        if self.size == 1:
            return [thing]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, thing, group=self.host_group)
        return found

    def first(self, thing: T | None) -> T | None:
        """Return what the first process has that has something."""
        return next((each for each in self.gather(thing) if each is not None), None)

    def in_step(
        self, items: Iterable[T], should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[T | None]:
        """The items of this process, and None as long as another one has more: so that all do the
        same number of forward passes, in which a sharded model needs every process. They stop
        together when one of them should."""
        remaining = iter(items)
        while True:
            item = next(remaining, None)
            state = torch.tensor([item is not None, should_stop()], device=self.device)
            any_left, any_stops = self.sum(state.float()).tolist()
            if any_stops or not any_left:
                return
            yield item

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The same, in groups of at least `BUCKET_BYTES`, but for the last."""
    bucket: list[torch.Tensor] = []
    num_bytes = 0
    for tensor in tensors:
        bucket.append(tensor)
        num_bytes += tensor.numel() * tensor.element_size()
        if num_bytes >= BUCKET_BYTES:
            yield bucket
            bucket, num_bytes = [], 0
    if bucket:
        yield bucket


def join_world(
    device: Literal["auto", "cpu", "cuda"], *, timeout: timedelta = timedelta(minutes=15)
) -> World:
    """Join the processes that `torchrun` started, or be alone.

    Args:
        timeout: how long an exchange between processes may take at most.

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
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout)
    host_group = dist.new_group(backend="gloo", timeout=timeout) if size > 1 else None
    return World(rank, size, place, host_group)


def peak_memory_gb(device: torch.device) -> float:
    """The most that this process has held so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: there a process starts with the peak of the one that started it.
        peak_kb = next(
            x for x in status.read_text(encoding="utf-8").splitlines() if x.startswith("VmHWM:")
        )
        return int(peak_kb.split()[1]) * 1024 / 1e9
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if sys.platform == "darwin" else peak * 1024) / 1e9
