"""`moshi-ttt plan`: what a run takes, and at the end whether `train` would start."""

from collections.abc import Iterator, Mapping
from typing import Any

from finetune.config import PlanOptions, TrainArgs, flatten, require_inputs
from finetune.errors import UserError, counted
from finetune.plan.plan import plan
from finetune.plan.starter_yaml import made_for
from finetune.plan.table import table

_USUAL_GB = 80.0


def planned(options: PlanOptions, args: TrainArgs, overrides: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines to print.

    Raises:
        UserError: an impossible configuration, or no memory to fit into where that alone is asked;
            or, when all is said, the run does not fit, or names what `train` would end with.
    """
    of_init = made_for(options.config)
    num_gpus = options.gpus or (of_init[0] if of_init else 1)
    memory_gb = options.gpu_memory
    if options.table:
        given = flatten(overrides)
        yield from table(args, num_gpus=num_gpus, gpu_memory_gb=memory_gb, given=given)
        return
    if args.device != "cpu":
        sizes = (("--gpus", options.gpus), ("--gpu_memory", options.gpu_memory))
        not_given = ", ".join(name for name, value in sizes if value is None)
        if memory_gb is None:
            memory_gb = of_init[1] if of_init else _USUAL_GB
        if of_init and not_given:
            where = f"{counted(num_gpus, 'GPU')} of {memory_gb:g} GB"
            yield f"for {where}, as moshi-ttt init was told ({not_given})"
        elif options.gpu_memory is None:
            yield f"for GPUs of {memory_gb:g} GB, as no other size was given (--gpu_memory)"
    elif options.memory_only and memory_gb is None:
        raise UserError(
            "--memory_only: with device: cpu, give --gpu_memory, to see what fits into it."
        )
    verdict = yield from plan(
        args, num_gpus=num_gpus, gpu_memory_gb=memory_gb, memory_only=options.memory_only
    )
    problems = "\n".join(verdict.problems)
    if not options.memory_only:
        # Files that are not there are what train looks for first, and all that it says then.
        try:
            require_inputs(options.config, args, overrides)
        except UserError as error:
            problems = str(error)
    if problems:
        raise UserError(f"train would end with this: {problems}")
    if not verdict.fits:
        raise UserError("this run does not fit; change what is named above.")
