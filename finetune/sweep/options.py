"""Options of `moshi-ttt sweep`."""

from dataclasses import dataclass
from typing import Annotated

from finetune.config import CONFIGURATION, POSITIONAL, WRITABLE_FOLDER, FilePath


@dataclass(frozen=True)
class SweepOptions:
    file: Annotated[FilePath, POSITIONAL, CONFIGURATION]
    """The sweep's YAML file."""

    only: tuple[str, ...] | None = None
    """Names of runs, with commas between them; null: all."""

    sweep_dir: Annotated[FilePath | None, WRITABLE_FOLDER] = None
    """The folder to write to, instead of the file's."""

    table: bool = False
    """Run nothing, show what there is."""

    slurm: bool = False
    """Run nothing, write a script for a SLURM job array."""

    overwrite_run_dir: bool = False
    """Replace the runs that `sweep_dir` holds where they are of other settings, and its table."""

    force: bool = False
    """Start runs although their estimated memory is more than there is."""
