"""What a machine cannot do for a run, whatever its model and data: it is known before the first."""

from collections.abc import Iterable, Iterator

from finetune.distributed import device_of, shard_size
from finetune.errors import UserError
from finetune.model import require_machine
from finetune.monitoring import require_wandb
from finetune.sweep.plan import PlannedRun, Sweep, grouped


def machine_problems(sweep: Sweep, runs: Iterable[PlannedRun], *, here: bool) -> Iterator[str]:
    """Yield why runs would fail, each reason once.

    Args:
        here: they are to run on this machine; else only their processes are looked at.
    """
    found = []
    for run in runs:
        try:
            _require_all(run, sweep.processes, here=here)
        except UserError as error:
            found.append((run.name, str(error)))
    return grouped(found, len(sweep.runs))


def _require_all(run: PlannedRun, num_processes: int, *, here: bool) -> None:
    """
    Raises:
        UserError: the first that is missing, in the order in which the run would find it.
    """
    shard_size(run.args, num_processes)
    if here:
        require_machine(run.args, device_of(run.args.device, num_processes - 1))
        if run.args.wandb.project:
            require_wandb()
