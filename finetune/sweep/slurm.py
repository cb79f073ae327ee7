"""A sweep as a SLURM job array: a task for each run, or for each chain of runs."""

import shlex
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from finetune.kept import write_whole
from finetune.safety import is_secret
from finetune.sweep.plan import Sweep
from ttt.options import abbreviated

# Two minutes before the time is over the job is told to stop; it saves, and the same array goes on.
DEFAULTS = {"signal": "B:TERM@120"}
SCRIPT = "sweep.sbatch"
_SIGN = "what waits for a run is in its task."
"""In a comment of each script."""


def array_problems(sweep: Sweep, overrides: Iterable[str]) -> Iterator[str]:
    """Yield what cannot stand in a script.

    Args:
        overrides: keys of the command line.
    """
    for key in overrides:
        if is_secret(key):
            yield (
                f"{key}: a script that stays on the disk is no place for secrets. Leave it "
                f"out, and use `wandb login` once, or export WANDB_API_KEY before sbatch."
            )
    for key, value in _options(sweep, num_chains=1).items():
        if "\n" in value or not key.replace("-", "").isalnum():
            yield (
                f"slurm, {abbreviated(key)}: {abbreviated(repr(value))} is no option of sbatch in "
                "one line."
            )


def _options(sweep: Sweep, *, num_chains: int) -> dict[str, str]:
    folder = sweep.folder.resolve()
    return {
        "job-name": folder.name,
        "array": f"0-{num_chains - 1}",
        "output": f"{folder}/slurm-%A_%a.out",
        **DEFAULTS,
        **sweep.slurm,
    }


def is_script(path: Path) -> bool:
    """Return whether a file is a script of `write_array`."""
    try:
        return _SIGN in path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def write_array(
    sweep: Sweep, only: Collection[str], arguments: list[str], warning: str = ""
) -> Path:
    """Write `sweep.sbatch` into the sweep's folder, to be submitted with `sbatch`; see
    `array_problems` for what cannot be written.

    Args:
        only: the names of the runs that it is for.
        arguments: of the command line, that each task gets as well.
        warning: a line that stands in the script.

    Raises:
        UserError: a folder that cannot be written.
    """
    chains = sweep.chains(only)
    number = sum(map(len, chains))
    folder = sweep.folder.resolve()
    options = _options(sweep, num_chains=len(chains))
    command = [sys.executable, "-m", "finetune", "sweep", str(sweep.file.resolve()), *arguments]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{key}={value}" for key, value in options.items()),
        "",
        f"# {number} runs in {len(chains)} tasks; {_SIGN}",
        *([f"# Warning: {warning}"] if warning else []),
        "CHAINS=(",
        *(f"  {','.join(chain)}" for chain in chains),
        ")",
        f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
        "# exec: the signal is for the program, which saves and ends.",
        f'exec {shlex.join(command)} --only="${{CHAINS[$SLURM_ARRAY_TASK_ID]}}"',
    ]
    script = folder / SCRIPT
    write_whole(script, "\n".join(lines) + "\n")
    return script
