"""A task of an evaluation consists of what this module names.

The module of a task is imported whenever options are read, so it imports nothing heavy at its head:
torch, numpy and matplotlib come inside the functions that use them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from finetune.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from finetune.evaluation.bench import Bench, Inputs

Json = dict[str, Any]
Found = Mapping[str, Any]
"""What a task has found: its part of `results.json`."""


@dataclass(frozen=True)
class TaskOptions:
    """A task's own options, which are options of `moshi-ttt evaluate` beside the common ones.

    A field is an option, with its text below it; names of all tasks' options differ.
    """

    def __post_init__(self) -> None:
        """Put in what follows from other options; call it of `super()` when extending it."""


class Task(ABC):
    """A task is one kind of measurement, and all that is told of it.

    Its name is what `--tasks` takes, the key of its results in `results.json`, and the name of its
    files. Its methods receive the evaluation's options, in which its own are.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    """The heading of its part of the report."""
    options: ClassVar[type[TaskOptions]] = TaskOptions
    uses_recordings: ClassVar[bool] = True
    """Whether it reads the recordings of `--data`."""
    common_options: ClassVar[tuple[str, ...]] = ("batch_size", "block_frames", "seed")
    """Which of these it reads. An evaluation tells what its tasks read, and no other option."""
    more_files: ClassVar[tuple[str, ...]] = ()
    """What it writes beside its results and its table."""

    def options_read(self) -> set[str]:
        """Return the names of the options that it reads: its own, and common ones."""
        own = {each.name for each in fields(self.options)}
        return {*own, *self.common_options, *(("data", "limit") if self.uses_recordings else ())}

    def runs_unasked(self, options: Any) -> bool:
        """Return whether it runs where no --tasks is given."""
        return False

    def check(self, options: Any, *, is_chosen: bool) -> None:
        """Look at the options before anything else is done, also where the task does not run.

        Raises:
            UserError: an option that has no effect without another one, or lacks another one.
        """
        return None

    def prepare(self, inputs: Inputs, options: Any) -> Any:
        """Read what the task needs beside the recordings, before the model is loaded.

        Returns:
            Whatever `run` is to be given.

        Raises:
            UserError: it cannot be read, or does not fit the checkpoint.
        """
        return None

    @abstractmethod
    def run(self, bench: Bench, options: Any, prepared: Any) -> Json:
        """Measure what `bench.records` does not hold yet; return what has been found in all."""

    @abstractmethod
    def sentences(self, found: Found) -> Iterable[str]:
        """Return what the results say, and no more than their intervals allow. Sentences that begin
        with `Alarm` or `Warning` stand out."""

    def why_nothing(self, found: Found) -> str:
        """Return why nothing at all could be measured, the empty text if something was: then the
        command ends with this as its error, once the results are written."""
        return ""

    def note(self, found: Found) -> str:
        """Return what a reader of the figure and the tables has to know; it stands above them."""
        return ""

    @abstractmethod
    def figure(self, found: Found, model: Found) -> Figure | None:
        """Return the picture, None if there is nothing to be seen.

        Args:
            model: what `results.json` says of the model.
        """

    @abstractmethod
    def tables(self, found: Found) -> Sequence[Table]:
        """Return the tables of the report; those without rows are left out."""

    @abstractmethod
    def csv(self, found: Found) -> Table:
        """Return all numbers as one table, which becomes `NAME.csv`."""

    def scalars(self, found: Found) -> dict[str, float | None]:
        """Return single numbers by name, for dashboards."""
        return {}
