"""Several small runs one after the other, in the same processes, which know of each other."""

import dataclasses
import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

os.environ["NO_TORCH_COMPILE"] = "1"

import torch
import torch.distributed as dist

import finetune.distributed.world
import finetune.trainer
import ttt.layers.depth
from finetune.config import load_config
from finetune.distributed import World, join_world
from finetune.trainer import Trainer
from ttt.layers import execution

# Several chunks in training, and one in evaluation where a batch is small.
ttt.layers.depth.CHUNK_FRAMES = 30
# Gradients in several pieces.
finetune.distributed.world.BUCKET_BYTES = 10_000


def join_with_toy_dimension(
    device: Literal["auto", "cpu", "cuda"],
    *,
    shard_size: int = 1,
    timeout: timedelta = timedelta(minutes=15),
    host_timeout: timedelta | None = None,
) -> World:
    """`join_world` where each two neighbors read the same data, and compute the same."""
    world = join_world(device, timeout=timeout, host_timeout=host_timeout)
    sizes: dict[str, Any] = {
        "replicate": world.size // shard_size // 2,
        "shard": shard_size,
        "toy": 2,
    }
    mesh = finetune.distributed.world.build_mesh(world.device, sizes)
    return dataclasses.replace(world, mesh=mesh)


def main(cases_file: str) -> None:
    # The next run needs the same processes.
    World.close = lambda self: None  # type: ignore[method-assign]
    if not torch.cuda.is_available():
        execution.BACKEND = "aot_eager"  # inductor takes long
    for case in json.loads(Path(cases_file).read_text()):
        toy = case["has_toy_dimension"]
        finetune.trainer.join_world = join_with_toy_dimension if toy else join_world
        Trainer(load_config(case["config"], case["overrides"])).train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
