"""`moshi-ttt sweep`: check everything, run what is left to run, compare."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.errors import UserError
from finetune.monitoring import console
from finetune.safety import is_secret
from finetune.sweep.plan import Sweep, load_sweep
from finetune.sweep.report import plot_sweep, write_page
from finetune.sweep.run import run_sweep
from finetune.sweep.slurm import write_array
from finetune.sweep.table import collect, print_table, write_tables


def run_command(
    file: Path,
    overrides: Mapping[str, object],
    *,
    folder: Path | None,
    only: Sequence[str],
    table_only: bool,
    slurm: bool,
) -> int:
    """See `finetune.cli.sweep`.

    Returns:
        An exit status: 0 if all that was to be run is finished.

    Raises:
        UserError: anything that can be known to be wrong before the first run.
    """
    sweep = load_sweep(file, overrides, folder)
    unknown = set(only) - sweep.runs.keys()
    if unknown:
        raise UserError(
            f"--only: {file} has no run {', '.join(sorted(unknown))}; it has "
            f"{', '.join(sweep.runs)}."
        )
    if slurm:
        for key in overrides:
            if is_secret(key):
                raise UserError(
                    f"{key}: a script that stays on the disk is no place for secrets. Leave it "
                    f"out, and use `wandb login` once, or export WANDB_API_KEY before sbatch."
                )
        arguments = [f"--{key}={value}" for key, value in overrides.items()]
        if folder:
            arguments.append(f"--sweep_dir={folder}")
        console.print(f"wrote {write_array(sweep, arguments)}; submit it with sbatch")
        return 0
    status = 0 if table_only else run_sweep(sweep, only or list(sweep.runs))
    show_results(sweep)
    return status


def show_results(sweep: Sweep) -> None:
    """Print the table, and write it, the curves and the page into the sweep's folder."""
    if not sweep.folder.is_dir():
        raise UserError(f"sweep_dir: {sweep.folder} does not exist; nothing has been run yet.")
    rows = collect(sweep)
    console.print()
    print_table(rows)
    try:
        written = write_tables(rows, sweep.folder)
        picture = plot_sweep(sweep, sweep.folder / "loss.png")
        written += [picture, write_page(sweep, rows, picture, sweep.folder / "report.html")]
    except OSError as error:
        raise UserError(f"{sweep.folder} cannot be written: {error.strerror}.") from error
    console.print(f"\nwrote {', '.join(str(path) for path in written)}", soft_wrap=True)
