"""Options of `moshi-ttt recall`."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from finetune.config import FilePath, Seed, Size
from finetune.errors import UserError
from finetune.recall.arms import check_arms
from ttt.options import abbreviated

Variant = Literal["text", "audio", "joint", "segments"]
_COMMON = {"seeds", "workers", "device"}
_READ = {
    None: {"preset", "variant", "arms", "steps", "lengths"} | _COMMON,
    "scale": {"widths"} | _COMMON,
    "keys": {"widths"},
}


@dataclass(frozen=True)
class RecallOptions:
    out: FilePath | None = None
    """The folder for results, table (report.md, recall.csv) and picture (recall.png); null:
    runs/recall/VARIANT, runs/recall/gpu_VARIANT or runs/recall/study_NAME."""

    preset: Literal["cpu", "gpu"] | None = None
    """`cpu` (if not given): ten minutes on two cores; `gpu`: 64 million parameters."""

    variant: Variant | None = None
    """Where the facts are: text (if not given), audio (the first codebook), joint (the key in the
    text, the value in the codebook, one frame) or segments (heard twice)."""

    arms: tuple[str, ...] | None = None
    """Arms to run; null: all of the preset."""

    seeds: tuple[Seed, ...] | None = None
    """Seeds to run each arm with; null: 0."""

    steps: Annotated[int, Ge(2), Le(10**9)] | None = None
    """Optimizer steps; null: the preset's."""

    lengths: tuple[Annotated[int, Ge(0), Le(10_000)], ...] | None = None
    """How many times longer sequences are tried after training, as in 4,16; 0: none; null: the
    preset's."""

    study: Literal["scale", "keys"] | None = None
    """Instead: `scale`: how the forms of the update fare over sizes of embeddings, widths and
    chunks; `keys`: how well untrained models tell keys apart."""

    widths: tuple[Annotated[int, Ge(16), Le(2**16)], ...] | None = None
    """Widths of a study's models; null: all."""

    workers: Size | None = None
    """Runs at a time; null: 1."""

    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where to compute; null: auto, on the GPU if there is one."""

    def check(self) -> None:
        """
        Raises:
            UserError: an option that what is asked for does not read, or a value out of its range.
        """
        given = {each.name for each in fields(self) if getattr(self, each.name) is not None}
        if unread := given - {"out", "study"} - _READ[self.study]:
            names = ", ".join(f"--{name}" for name in sorted(unread))
            mode = f"with --study {self.study}" if self.study else "without --study"
            raise UserError(f"{names}: not read {mode}; leave it out.")
        check_arms(self.arms or ())
        if self.lengths and self.lengths != (0,) and min(self.lengths) < 2:
            got = abbreviated(",".join(map(str, self.lengths)))
            raise UserError(
                "--lengths: expected whole numbers of at least 2 (the trained length is always "
                f"measured), or 0 alone for none, got {got}."
            )
        for width in self.widths or ():
            if width % (2 * num_heads(width)):
                raise UserError(
                    f"--widths: {width} cannot be divided into {num_heads(width)} heads of an even "
                    f"size; choose a multiple of {2 * num_heads(width)}."
                )

    @property
    def folder(self) -> Path:
        """Return where results go: if nothing is said, no two experiments into one folder."""
        variant = "gpu_" * (self.preset == "gpu") + (self.variant or "text")
        return self.out or Path("runs/recall") / (f"study_{self.study}" if self.study else variant)


def num_heads(width: int) -> int:
    """Return the number of heads of a study's model."""
    return max(4, width // 64)
