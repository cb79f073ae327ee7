"""`plan --table` says which kind of training fits which GPU, and how large its batches may be."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from functools import partial

from finetune.config import TrainArgs
from finetune.errors import UserError
from finetune.model import plan_model
from finetune.plan.memory import fits
from finetune.plan.plan import GB, shape_of
from finetune.plan.search import ENOUGH_BATCH, Choice, Search

GPUS_GB = (16, 24, 40, 48, 80, 141)
LARGEST_BATCH = 256
COMPARED = (
    *("full_finetuning", "lora.enable", "batch_size", "gradient_checkpointing"),
    *("selective_layers", "base_precision", "optim.state"),
)
"""Keys that the table gives values of its own: that is what it compares."""


def table(
    args: TrainArgs,
    *,
    num_gpus: int = 1,
    gpu_memory_gb: float | None = None,
    given: Collection[str] = (),
) -> Iterator[str]:
    """Yield the lines of a table in Markdown: GPUs by kinds of training; in each cell the largest
    batch with the setting that `Search` prefers, and what is to be set for it.

    Args:
        gpu_memory_gb: of the only GPU that is wanted; None: all of `GPUS_GB`.
        given: keys that stand on the command line.

    Raises:
        UserError: an impossible configuration, but for TTT that is off, of which a line says so; or
            a key is given that the table sets itself.
    """
    if refused := [f"--{key}" for key in COMPARED if key in given]:
        raise UserError(
            f"--table compares settings of its own, and would not read {', '.join(refused)}. Leave "
            "that out, or leave --table out."
        )
    columns = {
        "LoRA": _kind(args, lora=True, ttt=False, full=False),
        "LoRA and TTT": _kind(args, lora=True, ttt=True, full=False),
        "TTT alone": _kind(args, lora=False, ttt=True, full=False),
        "all weights": _kind(args, lora=False, ttt=args.ttt.enabled, full=True),
    }
    without_ttt = "" if args.ttt.enabled else _why_no_ttt(columns["TTT alone"])
    if without_ttt:
        columns = {name: kind for name, kind in columns.items() if not kind.ttt.enabled}
    gpus_gb = GPUS_GB if gpu_memory_gb is None else (gpu_memory_gb,)
    cells = {name: list(_cells(kind, num_gpus, gpus_gb)) for name, kind in columns.items()}
    rank = f"rank {args.lora.rank}"
    where = "one GPU" if num_gpus == 1 else f"each of {num_gpus} GPUs"
    sequences = f"sequences of {args.duration_sec:g} s"
    yield f"batch_size, for {sequences} on {where}, by estimate (LoRA: {rank});"
    yield "the largest, with the setting that saves the fewest bits of those that let"
    yield f"{ENOUGH_BATCH} fit; or else the largest of all settings:"
    yield ""
    yield f"| GPU | {' | '.join(cells)} |"
    yield f"| ---: {'| --- ' * len(cells)}|"
    for row, gpu_gb in enumerate(gpus_gb):
        yield f"| {gpu_gb:g} GB | {' | '.join(column[row] for column in cells.values())} |"
    if without_ttt:
        yield ""
        yield f"no columns with TTT, which this run has not: as it is set, {without_ttt}"


def _why_no_ttt(with_ttt: TrainArgs) -> str:
    """Return why a model cannot have the TTT of a configuration; nothing if it can."""
    try:
        plan_model(with_ttt, shape_of(with_ttt.moshi_paths)[0])
    except UserError as error:
        return str(error)
    return ""


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
    )


def _cells(args: TrainArgs, num_gpus: int, gpus_gb: Sequence[float]) -> Iterator[str]:
    """Yield what each GPU takes of one kind of training."""
    search = Search(args, shape_of(args.moshi_paths)[0], num_gpus)
    for gpu_gb in gpus_gb:
        choice = search.best(partial(fits, gpu_bytes=gpu_gb * GB), LARGEST_BATCH)
        yield "–" if choice is None else _described(choice, args)


def _described(choice: Choice, args: TrainArgs) -> str:
    changes = "".join(f", `{change}`" for change in choice.setting.changes(args))
    return f"**{choice.batch_size}**{changes}"
