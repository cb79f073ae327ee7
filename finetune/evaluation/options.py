"""Options of `moshi-ttt evaluate`: those that all tasks share, and those of each task."""

from dataclasses import dataclass, fields, make_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from finetune.errors import UserError
from finetune.evaluation.common_options import DEFAULT_OUT, CommonOptions, default_out
from finetune.evaluation.earlier import files_of
from finetune.evaluation.tasks import TASKS
from finetune.evaluation.tasks.base import TaskOptions
from finetune.kept import Output
from ttt.options import OneOf


@dataclass(frozen=True)
class Options(CommonOptions, TaskOptions):
    """The options that all tasks share; `Options.complete()` has those of the tasks as well, and is
    what is made of a command line."""

    tasks: tuple[Annotated[str, OneOf(TASKS.keys)], ...] = ()
    """What to measure; position and health if not given, and pairs with --pairs. pairs and
    spoken_recall need no --data."""

    @classmethod
    def complete(cls) -> Any:
        """Return the class of all options: these, and those of every task that there is now."""
        return _complete(tuple(task.options for task in TASKS.values()))

    def __post_init__(self) -> None:
        """Put in what follows from the other options where nothing is given."""
        super().__post_init__()
        tasks = self.tasks or [name for name, task in TASKS.items() if task.runs_unasked(self)]
        object.__setattr__(self, "tasks", tuple(name for name in TASKS if name in tasks))
        if self.out == DEFAULT_OUT:
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

    def outputs(self) -> list[Output]:
        """Return the files in `out`, of which none may be one that is read. Whether they are of
        another evaluation is known when the checkpoint is."""
        names = [*files_of(self.tasks), *(f"{task}.jsonl" for task in self.tasks)]
        return [Output(self.out / name, is_own=Path.is_file, is_needed=False) for name in names]


@cache
def _complete(of_tasks: tuple[type[TaskOptions], ...]) -> Any:
    own = [cls for cls in dict.fromkeys(of_tasks) if cls is not TaskOptions]
    classes: list[type[TaskOptions]] = [Options, *own]
    names = [each.name for cls in classes for each in fields(cls)]
    assert len(names) == len({*names}), f"two options have the same name: {sorted(names)}"
    # A dataclass has the fields of its last base first.
    return make_dataclass("EvaluateOptions", [], bases=(*reversed(own), Options), frozen=True)
