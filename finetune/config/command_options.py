"""Options of commands whose own rooms are slow to import; all others' stand in their rooms."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from finetune.config.args import Size
from finetune.config.marks import ASKED, POSITIONAL
from finetune.config.must_exist import CONFIGURATION, FOLDER, SOURCE, WRITABLE
from finetune.config.values import FilePath, PathText, PngPath
from finetune.errors import UserError
from finetune.kept import Output, is_png


@dataclass(frozen=True)
class TrainOptions:
    config: Annotated[FilePath, POSITIONAL, CONFIGURATION]
    """The YAML file of the run; docs/configuration.md lists its keys."""

    force: bool = False
    """Start although the estimated memory is more than there is."""


@dataclass(frozen=True)
class KeyOptions:
    key: Annotated[str | None, POSITIONAL] = None
    """A key, as ttt.chunk_size, or a section; null: all keys are listed."""


@dataclass(frozen=True)
class PlanOptions:
    config: Annotated[FilePath, POSITIONAL, CONFIGURATION]
    """The YAML file of the run."""

    gpus: Size | None = None
    """How many GPUs, on all hosts together; null: those that `init` has made the file for, as its
    first line says, else 1."""

    gpu_memory: Annotated[float, Ge(1), Le(1e5)] | None = None
    """Memory of each GPU, in GB; null: as `init` was told, else 80; with `--table` each of 16 to
    141, and with `device: cpu` none."""

    table: bool = False
    """Instead: the largest batches of LoRA, TTT and all weights, on `--gpus` GPUs of each size."""

    memory_only: bool = False
    """Look at memory alone, also where the data are not at hand: the exit status is 0 if the run
    fits into `--gpu_memory`, else 1."""

    def check(self) -> None:
        """
        Raises:
            UserError: two options exclude one another.
        """
        if self.table and self.memory_only:
            raise UserError("--memory_only is about one run, and --table about many; give one.")


@dataclass(frozen=True)
class EncodeOptions:
    config: Annotated[FilePath, POSITIONAL, CONFIGURATION]
    """The YAML file of the run."""


@dataclass(frozen=True)
class InitOptions:
    out: Annotated[FilePath, POSITIONAL, WRITABLE] = Path("my.yaml")
    """The YAML file to write; one that is there is never replaced."""

    data: Annotated[FilePath | None, SOURCE, ASKED] = None
    """The JSONL to train on."""

    eval_data: Annotated[FilePath | None, SOURCE] = None
    """A JSONL to evaluate on; null: none."""

    goal: Annotated[Literal["remember", "adapt"] | None, ASKED] = None
    """`remember`: TTT that carries what was said beyond attention's reach. `adapt`: another voice,
    manner or subject, without TTT."""

    gpu_memory: Annotated[Annotated[float, Ge(1), Le(1e5)] | None, ASKED] = None
    """Memory of each GPU, in GB."""

    gpus: Size = 1
    """How many GPUs, on one host."""

    repo: PathText = "kyutai/moshiko-pytorch-bf16"
    """Moshi's weights: a Hugging Face repository, or a local folder of the same layout."""

    run_dir: FilePath = Path("runs/first")
    """The run folder that the file names; if that holds something, one of a similar name."""

    def outputs(self) -> list[Output]:
        return [Output(self.out)]


@dataclass(frozen=True)
class PlotOptions:
    run_dir: Annotated[FilePath, POSITIONAL, FOLDER]
    """The run's folder."""

    out: Annotated[PngPath | None, WRITABLE] = None
    """The PNG to write; null: RUN_DIR/loss.png."""

    @property
    def png(self) -> Path:
        """The picture that is written."""
        return self.out or self.run_dir / "loss.png"

    def outputs(self) -> list[Output]:
        # The run's own name for it: earlier versions left no mark.
        is_own = None if self.out else is_png
        return [Output(self.png, command="plot", is_own=is_own)]


@dataclass(frozen=True)
class CompletionOptions:
    shell: Annotated[Literal["bash", "zsh"], POSITIONAL]
    """The shell."""
