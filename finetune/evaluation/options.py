"""Options of `moshi-ttt evaluate`."""

from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from finetune.config import (
    CHECKPOINT,
    POSITIONAL,
    SOURCES,
    FilePath,
    PathsText,
    Seed,
    Size,
    WandbArgs,
)
from finetune.errors import UserError
from finetune.evaluation.tasks import TASKS
from finetune.evaluation.tasks.base import TaskOptions
from ttt.options import Count, Frames, OneOf

_OUT = Path("evaluation/RUN/CHECKPOINT")


@dataclass(frozen=True)
class Options(TaskOptions):
    """The options that all tasks share; `Options.complete()` has those of the tasks as well, and is
    what is made of a command line."""

    checkpoint: Annotated[FilePath, POSITIONAL, CHECKPOINT]
    """A folder run_dir/checkpoints/checkpoint_NNNNNN, or of a stock Moshi."""

    tasks: tuple[Annotated[str, OneOf(TASKS.keys)], ...] = ()
    """What to measure; position and health if not given, and pairs with --pairs. pairs and
    spoken_recall need no --data."""

    data: Annotated[PathsText | None, SOURCES] = None
    """A JSONL of recordings as for training; null: the run's data.eval_data."""

    out: FilePath = _OUT
    """The folder to write to."""

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

    @classmethod
    def complete(cls) -> Any:
        """Return the class of all options: these, and those of every task that there is now."""
        return _complete(tuple(task.options for task in TASKS.values()))

    def __post_init__(self) -> None:
        """Put in what follows from the other options where nothing is given."""
        super().__post_init__()
        tasks = self.tasks or [name for name, task in TASKS.items() if task.runs_unasked(self)]
        object.__setattr__(self, "tasks", tuple(name for name in TASKS if name in tasks))
        if self.out == _OUT:
            object.__setattr__(self, "out", default_out(Path(self.checkpoint)))

    def check(self) -> None:
        """
        Raises:
            UserError: an option that has no effect without another one, or lacks another one.
        """
        for name, task in TASKS.items():
            task.check(self, is_chosen=name in self.tasks)
        if self.wandb.project is None:
            for name in ("offline", "run_name"):
                if getattr(self.wandb, name):
                    raise UserError(f"--wandb.{name}: name the project too: --wandb.project=NAME.")


@cache
def _complete(of_tasks: tuple[type[TaskOptions], ...]) -> Any:
    own = [cls for cls in dict.fromkeys(of_tasks) if cls is not TaskOptions]
    classes: list[type[TaskOptions]] = [Options, *own]
    names = [each.name for cls in classes for each in fields(cls)]
    assert len(names) == len({*names}), f"two options have the same name: {sorted(names)}"
    # A dataclass has the fields of its last base first.
    return make_dataclass("EvaluateOptions", [], bases=(*reversed(own), Options), frozen=True)


def what_takes_less(options: Options) -> str:
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
