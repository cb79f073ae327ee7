"""`plan --table` says which kind of training fits which GPU, and how large its batches may be."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from finetune.config import Precision, TrainArgs
from finetune.model import plan_model
from finetune.plan.memory import estimate, fits
from finetune.plan.plan import GB, shape_of
from ttt import TTTLMModel

GPUS_GB = (16, 24, 40, 48, 80, 141)
DURATION_SEC = 100.0
LARGEST_BATCH = 256

SMALLER: tuple[dict[str, Any], ...] = (
    {"base_precision": "bfloat16", "state": "float32"},
    {"base_precision": "nf4", "state": "float32"},
    {"base_precision": "nf4", "state": "int8"},
)
"""Settings of a frozen base, what changes least first: the first with which a sequence fits is
taken."""
SMALLER_FULL: tuple[dict[str, Any], ...] = tuple(
    {"base_precision": "bfloat16", "state": state} for state in ("float32", "bfloat16", "int8")
)


def table(args: TrainArgs) -> Iterator[str]:
    """Yield the lines of a table in Markdown: GPUs by kinds of training; in each cell the largest
    batch of 100 s, with what is to be set for it.

    Raises:
        UserError: an impossible configuration.
    """
    columns = {
        "LoRA": _kind(args, lora=True, ttt=False, full=False),
        "LoRA and TTT": _kind(args, lora=True, ttt=True, full=False),
        "TTT alone": _kind(args, lora=False, ttt=True, full=False),
        "all weights": _kind(args, lora=False, ttt=args.ttt.enabled, full=True),
    }
    cells = {name: list(_cells(kind)) for name, kind in columns.items()}
    rank = f"rank {args.lora.rank}"
    yield f"batch_size, for sequences of {DURATION_SEC:g} s on one GPU, by estimate (LoRA: {rank}):"
    yield ""
    yield f"| GPU | {' | '.join(cells)} |"
    yield f"| ---: {'| --- ' * len(cells)}|"
    for row, gpu_gb in enumerate(GPUS_GB):
        yield f"| {gpu_gb} GB | {' | '.join(column[row] for column in cells.values())} |"


def _kind(args: TrainArgs, *, lora: bool, ttt: bool, full: bool) -> TrainArgs:
    return dataclasses.replace(
        args,
        full_finetuning=full,
        lora=dataclasses.replace(args.lora, enable=lora),
        ttt=dataclasses.replace(args.ttt, enabled=ttt),
        parallel=dataclasses.replace(args.parallel, shard_size=1),
        duration_sec=DURATION_SEC,
        num_microbatches=1,
    )


def _cells(args: TrainArgs) -> Iterator[str]:
    """Yield what each GPU takes of one kind of training."""
    info, _ = shape_of(args.moshi_paths)
    models: dict[Precision, TTTLMModel] = {}
    for gpu_gb in GPUS_GB:
        cell = "–"
        for setting in SMALLER_FULL if args.full_finetuning else SMALLER:
            precision = setting["base_precision"]
            optim = dataclasses.replace(args.optim, state=setting["state"])
            chosen = dataclasses.replace(args, base_precision=precision, optim=optim)
            if precision not in models:
                models[precision] = plan_model(chosen, info)
            batch = _largest_batch(chosen, models[precision], gpu_gb * GB)
            if batch:
                cell = _described(batch, setting)
                break
        yield cell


def _largest_batch(args: TrainArgs, model: TTTLMModel, gpu_bytes: float) -> int:
    """Return 0 where not one sequence fits."""

    def is_enough(batch: int) -> bool:
        return fits(estimate(dataclasses.replace(args, batch_size=batch), model, 1), gpu_bytes)

    low, high = 0, 1
    while high <= LARGEST_BATCH and is_enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_enough(middle) else (low, middle)
    return low


def _described(batch: int, setting: dict[str, Any]) -> str:
    changed = []
    if setting["base_precision"] != "bfloat16":
        changed.append(f"`base_precision: {setting['base_precision']}`")
    if setting["state"] != "float32":
        changed.append(f"`optim.state: {setting['state']}`")
    return f"**{batch}**" + "".join(f", {each}" for each in changed)
