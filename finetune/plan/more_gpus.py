"""A run on more GPUs, which share its model: what it takes there, and what a step is then."""

import dataclasses
from collections.abc import Sequence

from finetune.config import TrainArgs
from finetune.plan.memory import estimate
from finetune.plan.search import Changes, to_set
from ttt import TTTLMModel

_NUMBERS = (2, 4, 8, 16, 32, 64)


def on_more_gpus(runs: Sequence[TrainArgs], model: TTTLMModel, num_processes: int) -> Changes:
    """Yield the fewest GPUs first; each has batches of its own.

    Args:
        runs: the run as it is, and as it may be too, the same but for what is kept for speed.
        num_processes: of the run, which may share the model as well.
    """
    for number in (num_processes, *_NUMBERS):
        if not 1 < number >= num_processes:
            continue
        for run in runs:
            parallel = dataclasses.replace(run.parallel, shard_size=number)
            args = dataclasses.replace(run, parallel=parallel)
            changes = [f"parallel.shard_size: {number}"]
            if run.optim.state == "int8":
                # Its blocks are those of whole parameters: a sharded model has none.
                optim = dataclasses.replace(run.optim, state="bfloat16")
                args = dataclasses.replace(args, optim=optim)
                changes.append("optim.state: bfloat16")
            if less := to_set(runs[0], run):
                changes.append(less)
            what = f"GPUs: {number} with {', '.join(changes)}"
            yield f"{what}{_of_step(run, num_processes, number)}", estimate(args, model, number)


def _of_step(args: TrainArgs, num_processes: int, number: int) -> str:
    """Return how many segments a step has on more GPUs, and what to set to keep their number, where
    it can be kept."""
    if number == num_processes:
        return ""
    of_process = args.batch_size * args.num_microbatches
    now = of_process * num_processes
    said = f"{of_process * number} segments a step, not {now}"
    own, rest = divmod(now, number)
    if rest:
        return f" ({said}; nothing keeps {now})"
    # The largest batch keeps a step short; no larger than now, it fits.
    batch_size = next(size for size in range(min(args.batch_size, own), 0, -1) if own % size == 0)
    then = dataclasses.replace(args, batch_size=batch_size, num_microbatches=own // batch_size)
    return f" ({said}; {to_set(args, then)} keeps {now})"
