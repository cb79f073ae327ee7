"""Options of the task `position`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from finetune.config import FOLDER, FilePath
from finetune.errors import UserError
from finetune.evaluation.tasks.base import TaskOptions
from finetune.kept import checkpoints_in, is_stock
from ttt.options import Frames

Arm = Literal["on", "off", "reset", "carried"]
ARMS: tuple[Arm, ...] = ("on", "off", "reset", "carried")
Duration = Annotated[float, Ge(0.08), Le(86_400)]
_MAX_SHOWN = 3
RESULTS = "position.jsonl"
"""The file of an evaluation's folder in which the loss of each recording is kept."""


def require_evaluation(folder: Path) -> None:
    """Check that a folder can be a baseline, before anything is read.

    Raises:
        UserError: no loss by position was measured there.
    """
    if not (folder / RESULTS).exists():
        raise UserError(
            f"--baseline: there is no evaluation of loss by position in {folder}. "
            f"{_what_to_name(folder)}"
        )


def _what_to_name(folder: Path) -> str:
    """Return what to do where a folder has no evaluation of loss by position."""
    found = [file.parent for depth in ("*", "*/*") for file in folder.glob(f"{depth}/{RESULTS}")]
    if found:
        return f"Did you mean {' or '.join(map(str, sorted(found)[:_MAX_SHOWN]))}?"
    checkpoints = [*checkpoints_in(folder / "checkpoints"), *checkpoints_in(folder)]
    if (folder / "consolidated").is_dir() or is_stock(folder):
        checkpoints = [folder]
    if checkpoints:
        return (
            "It holds a model, and no results: evaluate that first (`moshi-ttt evaluate "
            f"{checkpoints[-1]}`), and name the folder that this writes."
        )
    return (
        "Name the folder that `moshi-ttt evaluate` has written (its --out), with position among "
        "its --tasks."
    )


@dataclass(frozen=True)
class PositionOptions(TaskOptions):
    """Options of how recordings are read, and what they are read with."""

    arms: tuple[Arm, ...] = ARMS
    """Arms of loss by position: with TTT, without, TTT reset now and then, TTT starting from the
    state of another recording."""

    reset_frames: Frames | None = None
    """How often the arm `reset` resets, more than a chunk; null: what attention sees, and at least
    two chunks."""

    baseline: Annotated[FilePath | None, FOLDER] = None
    """The output folder of an evaluation of another checkpoint, to compare with."""

    bin_sec: Duration = 10.0
    """Width of the bins of position."""

    max_sec: Duration | None = None
    """Read no more than this of each recording."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "arms", tuple(arm for arm in ARMS if arm in self.arms))
