"""The processes of a run: who this one is, and sums over them.

The processes stand in a mesh of named dimensions. `replicate` counts copies of the model, `shard`
the processes that share a copy (see `finetune.distributed.sharding`). Along these two, every
process trains on its own batches, and gradients are summed: they are the data dimensions. Processes
that differ along another dimension only read the same batches, so a process's rank is not its
share of the data: that is `data_rank` of `data_size`. A run without `torchrun` is a world of one,
for which every function here does nothing.
"""

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from finetune.errors import UserError

T = TypeVar("T")

BUCKET_BYTES = 2**28
"""Exchanged at once when many tensors are: enough for the link's full speed, and little memory."""


DATA_DIMENSIONS = ("replicate", "shard")
"""Along these dimensions of the mesh, every process reads other data."""


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None
    """All processes, for a thread that works beside the training: it must not mix its exchanges
    with those of the training."""
    mesh: DeviceMesh | None = None
    """All processes by named dimensions, without those of size 1; None in a world of one."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """Into how many shares the data is divided."""
        return math.prod(self.dimension_size(name) for name in DATA_DIMENSIONS)

    @property
    def data_rank(self) -> int:
        """Number of the share of the data that this process reads, from 0 on."""
        rank = 0
        for name in self.data_dimensions:
            assert self.mesh is not None
            rank = rank * self.dimension_size(name) + self.mesh.get_local_rank(name)
        return rank

    @property
    def data_dimensions(self) -> tuple[str, ...]:
        """The names of the dimensions of the mesh along which the data differs."""
        return tuple(name for name in DATA_DIMENSIONS if name in self._sizes())

    def dimension_size(self, name: str) -> int:
        """Return how many processes there are along a dimension; 1 where the mesh has no such."""
        return self._sizes().get(name, 1)

    def _sizes(self) -> dict[str, int]:
        if self.mesh is None:
            return {}
        assert self.mesh.mesh_dim_names is not None
        return dict(zip(self.mesh.mesh_dim_names, self.mesh.shape, strict=True))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of `tensor` over all processes; also stored in `tensor` itself."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in one of the processes."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def sum_over_data(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of `tensor` over all shares of the data, each counted once; also stored in
        `tensor` itself."""
        if self.data_size == self.size:
            return self.sum(tensor)
        for name in self.data_dimensions:
            assert self.mesh is not None
            dist.all_reduce(tensor, group=self.mesh.get_group(name))
        return tensor

    def sum_all_over_data(self, tensors: Iterable[torch.Tensor]) -> None:
        """`sum_over_data` of many tensors of one type, in place. They are exchanged by way of few
        large ones: Moshi 7B with LoRA has 700 gradients, and every exchange takes time of its
        own."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            parts = self.sum_over_data(torch.cat([tensor.flatten() for tensor in bucket])).split(
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

    def done_by_first(self, do: Callable[[], T]) -> T:
        """Return what the first process gets of doing something that it alone does.

        Raises:
            UserError: it was refused there; on all processes, which then end as it does.
        """
        done, problem = None, None
        if self.is_main:
            try:
                done = do()
            except UserError as error:
                problem = str(error)
        problem = self.first(problem)
        if problem is not None:
            raise UserError(problem)
        found = self.first(done)
        assert found is not None
        return found

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
        """Wait for all processes; by way of the host, so that no GPU is busy with it."""
        if self.size > 1:
            dist.barrier(group=self.host_group)

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield the same, in groups of at least `BUCKET_BYTES`, but for the last."""
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


def num_processes() -> int:
    """Return how many processes `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def device_of(device: Literal["auto", "cpu", "cuda"], local_rank: int) -> torch.device:
    """Return where a process of this host computes.

    Raises:
        UserError: `cuda` was asked for and there is none, or there are fewer than processes.
    """
    available = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise UserError("device: cuda, and PyTorch sees no GPU here. Set device: cpu, or auto.")
    if local_rank >= available:
        raise UserError(
            f"device: this host has {available} CUDA devices, and process {local_rank} of it needs "
            "one. Start fewer processes (torchrun --nproc-per-node, or processes in the file of a "
            "sweep), or set device: cpu."
        )
    return torch.device("cuda", local_rank)


def join_world(
    device: Literal["auto", "cpu", "cuda"],
    *,
    shard_size: int = 1,
    timeout: timedelta = timedelta(minutes=15),
    host_timeout: timedelta | None = None,
) -> World:
    """Join the processes that `torchrun` started, or be alone.

    Args:
        shard_size: how many processes share a copy of the model; it divides their number.
        timeout: how long an exchange between processes may take at most, and how long they may
            come after one another.
        host_timeout: the same of exchanges by way of the host, once all are there (`barrier`,
            `gather`); None: `timeout`.

    Raises:
        UserError: see `device_of`; or what `torchrun` sets is there in part.
    """
    size = num_processes()
    if size > 1 and "RANK" not in os.environ:
        raise UserError(
            f"WORLD_SIZE is {size} in the environment, and RANK is not set: start with torchrun, "
            "which sets both, or unset WORLD_SIZE."
        )
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    place = device_of(device, local_rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout)
    host_timeout = host_timeout or timeout
    host_group = dist.new_group(backend="gloo", timeout=host_timeout) if size > 1 else None
    mesh = build_mesh(place, {"replicate": size // shard_size, "shard": shard_size})
    return World(rank, size, place, host_group, mesh)


def build_mesh(device: torch.device, sizes: dict[str, int]) -> DeviceMesh | None:
    """Return the mesh of all processes, or None for one process alone.

    Args:
        sizes: of each dimension by name; ranks count along the last one first. A dimension of
            size 1 is left out: it would only cost groups of one process each.
    """
    several = {name: size for name, size in sizes.items() if size > 1}
    if not several:
        return None
    return init_device_mesh(device.type, tuple(several.values()), mesh_dim_names=tuple(several))


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
