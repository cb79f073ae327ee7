"""The lines of `many_gpus.py`, and the processes that measure them."""

import argparse
import gc
import json
import os
import statistics
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moshi.models import loaders
from train_step import profile
from training_arms import TINY, TTT, OurRun, random_codes
from training_arms import Arm as Codes

from finetune.config import DataArgs, LoraArgs, ModelPaths, OptimArgs, ParallelArgs, TrainArgs
from finetune.distributed import World, build_sharding, join_world, num_processes, shard_size
from finetune.model import load_model, plan_model
from finetune.plan import estimate
from ttt import TTTArgs

GB = 1e9


@dataclass(frozen=True)
class Arm:
    """A line of the table."""

    name: str
    is_sharded: bool = False
    on_all: bool = False
    """On all GPUs; else on one."""
    ttt: bool = True
    is_full: bool = False
    """All weights train; else LoRA."""
    has_few_layers: bool = False
    reference: str | None = None
    """The line whose losses it must have."""
    num_compared: int | None = None
    """Of the losses; None: all."""


ALL: dict[str, Any] = {"on_all": True}
FSDP: dict[str, Any] = {"on_all": True, "is_sharded": True}
FEW: dict[str, Any] = {"is_full": True, "has_few_layers": True}
ARMS = [
    Arm("one GPU"),
    Arm("one GPU, TTT off", ttt=False),
    Arm("one GPU, full, fewer layers", **FEW),
    Arm("replicas", **ALL, reference="one GPU"),
    Arm("sharded", **FSDP, reference="one GPU"),
    Arm("sharded, full", **FSDP, is_full=True, reference="one GPU", num_compared=1),
    Arm("replicas, TTT off", **ALL, ttt=False, reference="one GPU, TTT off"),
    Arm("sharded, TTT off", **FSDP, ttt=False, reference="one GPU, TTT off"),
    Arm("sharded, full, fewer layers", **FSDP, **FEW, reference="one GPU, full, fewer layers"),
]


def train_args(arm: Arm, options: argparse.Namespace) -> TrainArgs:
    """The configuration of a line."""
    layers: dict[str, Any] = {"start_layer": 1} if options.model == "tiny" else {}
    return TrainArgs(
        DataArgs(),
        run_dir="",
        moshi_paths=ModelPaths(hf_repo_id=None, random_init=True),
        full_finetuning=arm.is_full,
        lora=LoraArgs(enable=not arm.is_full, rank=options.rank),
        ttt=TTTArgs(enabled=arm.ttt, **TTT["in_place delta"], **layers) if arm.ttt else TTTArgs(),
        duration_sec=options.frames / 12.5,
        batch_size=options.batch,
        optim=OptimArgs(lr=options.lr),
        param_dtype=options.dtype,
        compile=options.compile,
        parallel=ParallelArgs(shard_size=options.gpus if arm.is_sharded else 1),
    )


def measure(arm: Arm, options: argparse.Namespace) -> dict[str, Any]:
    """Losses, seconds per step and memory."""
    started = time.monotonic()
    args = train_args(arm, options)
    world = join_world(options.device, shard_size=shard_size(args, num_processes()))
    kwargs = dict(TINY if options.model == "tiny" else loaders._lm_kwargs)
    if arm.has_few_layers:
        kwargs["num_layers"] = min(kwargs["num_layers"], options.full_layers)
    nothing = Path("none")
    info = loaders.CheckpointInfo(nothing, nothing, nothing, lm_config=kwargs)
    planned = estimate(args, plan_model(args, info), world.size)
    is_cuda = world.device.type == "cuda"
    if is_cuda:
        held_before = torch.cuda.memory_allocated()
    sharding = build_sharding(args, world)
    model = load_model(args, info, world.device, sharding)
    run = OurRun(model, options, world, sharding)
    built_sec = time.monotonic() - started

    whole = random_codes(options.gpus * options.batch, Codes("codes"), options)
    batches = whole.split(options.batch)
    own = batches[world.rank : world.rank + 1] if arm.on_all else batches
    losses, seconds = [], []
    for number in range(options.loss_steps + options.warmup + options.steps):
        is_compared = number < options.loss_steps
        if is_cuda:
            torch.cuda.synchronize()
            if number == options.loss_steps:
                torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        loss = run.step(*(own if is_compared else own[:1]))
        if is_cuda:
            torch.cuda.synchronize()
        losses += [loss] if is_compared else []
        seconds.append(time.perf_counter() - begin)
    tokens = world.size * options.batch * options.frames * (1 + model.dep_q)
    step_sec = statistics.median(seconds[-options.steps :])
    result = {
        "name": arm.name,
        "gpus": world.size,
        "batch": options.batch,
        "losses": losses,
        "step_sec": step_sec,
        "all_step_sec": seconds,
        "tokens_per_sec": tokens / step_sec,
        "plan_gb": planned.peak / GB,
        "plan": {name: value / GB for name, value in vars(planned).items()},
        "build_sec": built_sec,
    }
    if is_cuda:
        peaks = world.gather(torch.cuda.max_memory_allocated() / GB)
        result |= {
            "peak_gb": max(peaks),
            "all_peak_gb": peaks,
            "resident_gb": torch.cuda.memory_allocated() / GB,
            "held_before_gb": held_before / GB,
        }
    if arm.name in options.profile:
        # All take the step; one writes.
        if world.is_main:
            profile(run, own[0], arm, options)  # type: ignore[arg-type]
        else:
            run.step(own[0])
    return {**result, "total_sec": time.monotonic() - started}


def link(world: World) -> dict[str, Any]:
    """Measure how long the processes take to sum a GB of float32."""
    tensor = torch.zeros(250_000_000 if world.device.type == "cuda" else 1000, device=world.device)
    seconds = []
    for _ in range(4):
        world.barrier()
        begin = time.perf_counter()
        world.sum(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return {"sum_of_a_gb_ms": 1e3 * min(seconds)}


def work(options: argparse.Namespace) -> None:
    """Run the lines that are named, and write each result as a line of JSON."""

    def write(result: dict[str, Any]) -> None:
        with options.worker.open("a") as file:
            file.write(json.dumps(result) + "\n")

    world = join_world(options.device)
    chosen = [arm for arm in ARMS if arm.name in options.arms]
    if world.size > 1:
        speed = link(world)
        if world.is_main:
            write(speed)
    for arm in chosen:
        try:
            result = measure(arm, options)
        except Exception as error:
            traceback.print_exc()
            kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else repr(error)
            write({"name": arm.name, "wrong": f"rank {world.rank}: {kind[:300]}"})
            sys.stderr.flush()
            # The other processes wait in an exchange: torchrun ends them.
            os._exit(1)
        if world.is_main:
            write(result)
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    world.close()
