"""Options of `moshi-ttt recall`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le, Lt

from finetune.config import WRITABLE_FOLDER, FilePath, Size
from finetune.errors import UserError
from finetune.kept import Output
from finetune.recall.arms import check_arms
from ttt.options import abbreviated

EXPERIMENT = "experiment.txt"
"""The file of a folder that tells which experiment's results are in it."""
Variant = Literal["text", "audio", "joint", "segments", "spoken"]


@dataclass(frozen=True)
class RecallOptions:
    out: Annotated[FilePath | None, WRITABLE_FOLDER] = None
    """The folder for results, table (report.md, recall.csv) and picture (recall.png); null:
    runs/recall/VARIANT or runs/recall/gpu_VARIANT."""

    preset: Literal["cpu", "gpu"] = "cpu"
    """`cpu`: ten minutes on two cores; `gpu`: 64 million parameters."""

    variant: Variant = "text"
    """Where the facts are: text, audio (the first codebook), joint (the key in the text, the value
    in the codebook, one frame), segments (heard twice) or spoken (a user tells them, in synthetic
    speech)."""

    arms: tuple[str, ...] | None = None
    """Arms to run; null: all of the preset."""

    # From 1500 on a stream that trains could be one that is measured.
    seeds: tuple[Annotated[int, Ge(0), Lt(1500)], ...] = (0,)
    """Seeds to run each arm with."""

    steps: Annotated[int, Ge(2), Le(10**9)] | None = None
    """Optimizer steps; null: the preset's."""

    lengths: tuple[Annotated[int, Ge(0), Le(10_000)], ...] | None = None
    """How many times longer sequences are tried after training, as in 4,16; 0: none; null: the
    preset's."""

    workers: Size = 1
    """Runs at a time."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto`: on the GPU if there is one."""

    def check(self) -> None:
        """
        Raises:
            UserError: a value out of its range.
        """
        check_arms(self.arms or ())
        if self.lengths and self.lengths != (0,) and min(self.lengths) < 2:
            got = abbreviated(",".join(map(str, self.lengths)))
            raise UserError(
                "--lengths: expected whole numbers of at least 2 (the trained length is always "
                f"measured), or 0 alone for none, got {got}."
            )

    @property
    def folder(self) -> Path:
        """Return where results go: if nothing is said, no two experiments into one folder."""
        return self.out or Path("runs/recall") / ("gpu_" * (self.preset == "gpu") + self.variant)

    def outputs(self) -> list[Output]:
        """Return the files of a folder that is no experiment's yet: of its own, they are made
        anew."""
        names = ("report.md", "recall.csv", "recall.png")
        is_own = (self.folder / EXPERIMENT).is_file()
        return [] if is_own else [Output(self.folder / name) for name in names]
