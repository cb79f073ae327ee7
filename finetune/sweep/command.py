"""`moshi-ttt sweep`: check everything, run what is left to run, compare."""

from collections.abc import Mapping
from functools import partial

from finetune.errors import UserError
from finetune.kept import Output, require_outputs
from finetune.monitoring import console
from finetune.sweep.at_once import refuse
from finetune.sweep.content import TABLE
from finetune.sweep.options import SweepOptions
from finetune.sweep.plan import Sweep, option, read_sweep
from finetune.sweep.record import has_record
from finetune.sweep.remarks import cautions, seed_remarks
from finetune.sweep.report import plot_sweep, write_page
from finetune.sweep.run import run_sweep, runnable_problems
from finetune.sweep.slurm import SCRIPT, is_script, write_array
from finetune.sweep.table import (
    collect,
    only_in_file,
    print_table,
    table_is_there,
    write_tables,
)

PICTURE_NAME, PAGE_NAME = "loss.png", "report.html"
OVERWRITES = (
    "with --overwrite_run_dir in it, this script replaces finished runs without asking if it is "
    "submitted again after a change of the sweep's file or its base. Write it anew without that "
    "option once these runs have begun."
)


def run_command(options: SweepOptions, overrides: Mapping[str, object]) -> int:
    """Check what is slow to check, then do what the options say; first is `require_sound_sweep`.

    Returns:
        An exit status: 0 if all that was to be run is finished.

    Raises:
        UserError: anything that can be known to be wrong before the first run.
    """
    sweep = _checked(options, overrides)
    only = options.only or tuple(sweep.runs)
    if options.slurm:
        arguments = [f"--{option(key, value)}" for key, value in overrides.items()]
        if options.sweep_dir:
            arguments.append(f"--sweep_dir={options.sweep_dir}")
        arguments += [
            f"--{name}" for name in ("force", "overwrite_run_dir") if getattr(options, name)
        ]
        warning = OVERWRITES if options.overwrite_run_dir else ""
        script = write_array(sweep, only, arguments, warning)
        console.print(f"wrote {script}; submit it with sbatch", markup=False, soft_wrap=True)
        if warning:
            console.print(f"Warning: {OVERWRITES}", markup=False, soft_wrap=True)
        return 0
    status = 0
    if not options.table:
        status = run_sweep(sweep, only, force=options.force, overwrite=options.overwrite_run_dir)
    show_results(sweep, overwrite=options.overwrite_run_dir)
    return status


def _checked(options: SweepOptions, overrides: Mapping[str, object]) -> Sweep:
    """Return the sweep, if nothing is wrong with its models, its data or its folder, where
    `require_sound_sweep` has found nothing.

    Raises:
        UserError: naming all that is.
    """
    sweep, of_file = read_sweep(
        options.file, overrides, options.sweep_dir, with_inputs=not options.table
    )
    chosen = options.only or tuple(sweep.runs)
    how = {"overwrite": options.overwrite_run_dir, "here": not options.slurm}
    others = [] if options.table else list(runnable_problems(sweep, chosen, **how))
    refuse(options.file, of_file, others)
    require_outputs(_outputs(sweep, slurm=options.slurm), inputs=[options.file, sweep.base])
    return sweep


def _outputs(sweep: Sweep, *, slurm: bool) -> list[Output]:
    """Return the files that are written into the sweep's folder, which is a sweep's where there is
    a table of one, or a record of one of these runs."""
    is_own = table_is_there(sweep.folder) or any(map(has_record, sweep.runs.values()))
    written = partial(Output, option="--sweep_dir", command="sweep", is_needed=False)
    if slurm:
        return [written(sweep.folder / SCRIPT, is_own=is_script)]
    names = [f"{TABLE}.csv", f"{TABLE}.json", PICTURE_NAME, PAGE_NAME]
    return [written(sweep.folder / name, is_own=lambda _: is_own) for name in names]


def show_results(sweep: Sweep, *, overwrite: bool = False) -> None:
    """Print the table, and write it, the curves and the page into the sweep's folder.

    Args:
        overwrite: also where the table in the folder has numbers that this one has not.
    """
    if not sweep.folder.is_dir():
        raise UserError(f"sweep_dir: {sweep.folder} does not exist; nothing has been run yet.")
    rows = collect(sweep)
    console.print()
    print_table(rows)
    warned = [f"Warning: {names}: {text}" for names, text in cautions(rows)]
    for line in [*warned, *seed_remarks(sweep, rows)]:
        console.print(line, markup=False, soft_wrap=True)
    if lost := [] if overwrite else only_in_file(rows, sweep.folder):
        console.print(f"\n{_explain_not_replaced(sweep, lost)}", markup=False, soft_wrap=True)
        return
    written = write_tables(rows, sweep.folder)
    picture = plot_sweep(sweep, sweep.folder / PICTURE_NAME)
    written += [picture, write_page(sweep, rows, picture, sweep.folder / PAGE_NAME)]
    console.print(f"\nwrote {', '.join(str(path) for path in written)}", soft_wrap=True)


def _explain_not_replaced(sweep: Sweep, lost: list[str]) -> str:
    return (
        f"Not written: the table and the page in {sweep.folder} have numbers of "
        f"{', '.join(lost)}, which {sweep.file} with these keys has not. The same "
        "with --table --overwrite_run_dir, which runs nothing, replaces them."
    )
