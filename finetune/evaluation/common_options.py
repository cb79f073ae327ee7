"""Options that all tasks of an evaluation share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from finetune.config import (
    CHECKPOINT,
    POSITIONAL,
    SOURCES,
    WRITABLE_FOLDER,
    FilePath,
    PathsText,
    Seed,
    Size,
    WandbArgs,
)
from ttt.options import Count, Frames

DEFAULT_OUT = Path("evaluation/RUN/CHECKPOINT")
ALWAYS_READ = ("checkpoint", "tasks", "out", "overwrite", "device", "wandb")
"""Options that every evaluation reads. Of the others, each task says which it reads."""


@dataclass(frozen=True)
class CommonOptions:
    """The options that a bench and its tasks see; `Options` completes them for a command line."""

    checkpoint: Annotated[FilePath, POSITIONAL, CHECKPOINT]
    """A folder run_dir/checkpoints/checkpoint_NNNNNN, or of a stock Moshi."""

    tasks: tuple[str, ...] = ()
    """What to measure."""

    data: Annotated[PathsText | None, SOURCES] = None
    """A JSONL of recordings as for training; null: the run's data.eval_data."""

    out: Annotated[FilePath, WRITABLE_FOLDER] = DEFAULT_OUT
    """The folder to write to."""

    overwrite: bool = False
    """Replace a report, and results, of another checkpoint, other data or other settings."""

    limit: Count | None = None
    """Read no more than the first so many recordings."""

    batch_size: Size = 4
    """Recordings side by side."""

    block_frames: Frames = 250
    """Frames computed at once; it bounds the memory and changes no result."""

    seed: Seed = 0
    """Seed of continuations, of the talks of spoken recall, and of the bootstrap."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto`: on the GPU if there is one."""

    wandb: WandbArgs = field(default_factory=WandbArgs)


def what_takes_less(options: CommonOptions) -> str:
    """Return which options make an evaluation take less memory of the GPU."""
    sizes = {"batch_size": options.batch_size, "block_frames": options.block_frames}
    ways = [f"a smaller --{name} (now {size})" for name, size in sizes.items() if size > 1]
    return "; ".join([*ways, "--device cpu, which is slow"])


def default_out(checkpoint: Path) -> Path:
    """`evaluation/RUN/CHECKPOINT` in the current folder. Not in the run folder: checkpoints there
    come and go."""
    checkpoint = checkpoint.absolute()
    run = checkpoint.parent.parent.name if checkpoint.parent.name == "checkpoints" else ""
    return Path("evaluation") / run / checkpoint.name
