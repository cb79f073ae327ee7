"""This package says who the processes of a run are, and what each of them holds."""

from finetune.distributed.sharding import (
    FEW,
    Sharding,
    build_sharding,
    let_go,
    like_parameter,
    local,
    shard_size,
    sum_gradients_when_needed,
    whole,
)
from finetune.distributed.watchdog import Watch
from finetune.distributed.world import World, device_of, join_world, num_processes, peak_memory_gb

__all__ = [
    "FEW",
    "Sharding",
    "Watch",
    "World",
    "build_sharding",
    "device_of",
    "join_world",
    "let_go",
    "like_parameter",
    "local",
    "num_processes",
    "peak_memory_gb",
    "shard_size",
    "sum_gradients_when_needed",
    "whole",
]
