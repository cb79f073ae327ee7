"""What stands below a sweep's table: which of its numbers say less than they seem to."""

from collections.abc import Iterator, Sequence

import numpy as np

from finetune.config import TrainArgs, flatten, keys_that, public_dict
from finetune.sweep.content import OWN_KEYS
from finetune.sweep.plan import PlannedRun, Sweep, by_text
from finetune.sweep.table import Row
from ttt.options import HARMLESS

ONE_SEED = (
    "One seed says nothing about small differences: add runs to the file that differ from these in "
    "`seed` alone; their mean and spread stand here then."
)


def cautions(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return why TTT could do nothing, each reason behind the names of its runs."""
    found = by_text((row.run, row.caution) for row in rows if row.caution)
    return [(", ".join(names), text) for text, names in found.items()]


def seed_remarks(sweep: Sweep, rows: Sequence[Row]) -> Iterator[str]:
    """Yield how far runs spread that differ in their seed alone, and that others may as well."""
    compared = {row.run: loss for row in rows if (loss := _loss(row))}
    finished = [row.run for row in rows if row.status == "finished" and row.run in compared]
    groups: dict[tuple[object, ...], dict[tuple[int, ...], str]] = {}
    for name in finished:
        column, _ = compared[name]
        stages = list(_stages(sweep, sweep.runs[name]))
        same = (column, *(setting for stage in stages for setting in _settings(stage)))
        groups.setdefault(same, {}).setdefault(tuple(s.args.seed for s in stages), name)
    repeated = [list(group.values()) for group in groups.values() if len(group) > 1]
    for names in repeated:
        column, _ = compared[names[0]]
        losses = [compared[name][1] for name in names]
        yield (
            f"{', '.join(names)} differ in seed alone: {column} {np.mean(losses):.3f} ± "
            f"{np.std(losses, ddof=1):.3f} (mean and standard deviation)."
        )
    if len(compared) > max(1, sum(map(len, repeated))):
        yield ONE_SEED


def _loss(row: Row) -> tuple[str, float] | None:
    """Return the loss that a run is compared by, behind its column's name."""
    columns = (("eval loss", row.eval_loss), ("train loss", row.train_loss))
    return next(((name, loss) for name, loss in columns if loss is not None), None)


def _stages(sweep: Sweep, run: PlannedRun) -> Iterator[PlannedRun]:
    """Yield a run, and before it in the chain of `after` those that it depends on."""
    yield run
    if run.after:
        yield from _stages(sweep, sweep.runs[run.after])


def _settings(run: PlannedRun) -> Iterator[tuple[str, str]]:
    """Yield what a run's result depends on beside its seed, and beside the run before it."""
    without = keys_that(TrainArgs, HARMLESS) | OWN_KEYS.keys() | {"seed"}
    if run.after:
        without |= {"moshi_paths.init_from"}  # a folder, named like the run
    for key, value in flatten(public_dict(run.args)).items():
        if key not in without:
            yield key, str(value)
