"""`plan --table` says which kind of training fits which GPU, and how large its batches may be."""

import dataclasses
from collections.abc import Iterator
from functools import partial

from finetune.config import TrainArgs
from finetune.plan.memory import fits
from finetune.plan.plan import GB, shape_of
from finetune.plan.search import ENOUGH_BATCH, Choice, Search

GPUS_GB = (16, 24, 40, 48, 80, 141)
DURATION_SEC = 100.0
LARGEST_BATCH = 256


def table(args: TrainArgs) -> Iterator[str]:
    """Yield the lines of a table in Markdown: GPUs by kinds of training; in each cell the largest
    batch of 100 s with the setting that `Search` prefers, and what is to be set for it.

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
    yield f"batch_size, for sequences of {DURATION_SEC:g} s on one GPU, by estimate (LoRA: {rank});"
    yield "the largest, with the setting that saves the fewest bits of those that let"
    yield f"{ENOUGH_BATCH} fit; or else the largest of all settings:"
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
        gradient_checkpointing=True,
        selective_layers=0,
        base_precision="bfloat16",
        optim=dataclasses.replace(args.optim, state="float32"),
        parallel=dataclasses.replace(args.parallel, shard_size=1),
        duration_sec=DURATION_SEC,
        num_microbatches=1,
    )


def _cells(args: TrainArgs) -> Iterator[str]:
    """Yield what each GPU takes of one kind of training."""
    search = Search(args, shape_of(args.moshi_paths)[0])
    for gpu_gb in GPUS_GB:
        choice = search.best(partial(fits, gpu_bytes=gpu_gb * GB), LARGEST_BATCH)
        yield "–" if choice is None else _described(choice, args)


def _described(choice: Choice, args: TrainArgs) -> str:
    changes = "".join(f", `{change}`" for change in choice.setting.changes(args))
    return f"**{choice.batch_size}**{changes}"
