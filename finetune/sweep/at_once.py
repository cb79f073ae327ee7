"""What is wrong with a sweep and can be said at once: no model, no data and no run is looked at."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from finetune.config import list_problems
from finetune.errors import UserError
from finetune.sweep.options import SweepOptions
from finetune.sweep.plan import Sweep, read_sweep
from finetune.sweep.slurm import array_problems
from ttt.options import abbreviated


def require_sound_sweep(options: SweepOptions, overrides: Mapping[str, object]) -> None:
    """Check the sweep's file, the configurations of its runs, the command line, and that the files
    that they name are there.

    Raises:
        UserError: naming all that is wrong.
    """
    sweep, of_file = read_sweep(
        options.file,
        overrides,
        options.sweep_dir,
        with_inputs=not options.table,
        only_at_once=True,
    )
    others = list(_only_problems(sweep, options.only or ()))
    if options.slurm:
        others += array_problems(sweep, overrides)
    refuse(options.file, of_file, others)


def refuse(file: Path, of_file: Collection[str], others: Collection[str]) -> None:
    """
    Args:
        of_file: what is wrong with the file.
        others: what is wrong with something else, which says itself with what.

    Raises:
        UserError: there is anything.
    """
    if of_file or len(others) > 1:
        raise UserError(list_problems(file, [*of_file, *others]))
    for text in others:
        raise UserError(text)


def _only_problems(sweep: Sweep, only: Collection[str]) -> Iterator[str]:
    unknown = set(only) - sweep.runs.keys()
    if unknown:
        yield (
            f"--only: {sweep.file} has no run {abbreviated(', '.join(sorted(unknown)))}; it has "
            f"{', '.join(sweep.runs)}."
        )
