"""What `moshi-ttt evaluate` can be told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune.args import WandbArgs
from finetune.errors import UserError

TASKS = ("position", "pairs", "health")
ARMS = ("on", "off", "reset", "carried")


@dataclass(frozen=True)
class PairOptions:
    """How the likelihood of a recording is made of those of its tokens: weights of the streams, and
    whether the weighted sum is divided by the number of frames (`mean`) or not (`sum`)."""

    side: Literal["moshi", "user"] = "moshi"
    text: Literal["padding", "transcript"] = "padding"
    text_weight: float = 0.0
    first_codebook_weight: float = 1.0
    other_codebooks_weight: float = 0.0
    length_norm: Literal["mean", "sum"] = "mean"


@dataclass(frozen=True)
class HealthOptions:
    """Seeded continuations: how many, of how long a prompt, and how long they are."""

    num_continuations: int = 8
    prompt_sec: float = 5.0
    health_sec: float = 20.0
    temperature: float = 0.8
    text_temperature: float = 0.7


@dataclass(frozen=True)
class Options:
    checkpoint: Path
    out: Path
    tasks: tuple[str, ...]
    data: str | None = None
    pairs: Path | None = None
    arms: tuple[str, ...] = ARMS
    reset_frames: int | None = None
    bin_sec: float = 10.0
    max_sec: float | None = None
    limit: int | None = None
    batch_size: int = 4
    block_frames: int = 250
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    baseline: Path | None = None
    pair: PairOptions = field(default_factory=PairOptions)
    health: HealthOptions = field(default_factory=HealthOptions)
    wandb_project: str | None = None
    wandb_run_name: str | None = None
    wandb_offline: bool = False

    @property
    def wandb(self) -> WandbArgs:
        return WandbArgs(self.wandb_project, self.wandb_offline, run_name=self.wandb_run_name)


def check_options(options: Options) -> None:
    """
    Raises:
        UserError: an option that has no effect without another one, or lacks another one.
    """
    if "pairs" in options.tasks and options.pairs is None:
        raise UserError("--tasks: pairs needs --pairs, the JSONL of the pairs.")
    if "pairs" not in options.tasks and options.pairs is not None:
        raise UserError("--pairs: counts for the task pairs alone; add it to --tasks.")
    if "position" not in options.tasks and options.baseline is not None:
        raise UserError("--baseline: counts for the task position alone; add it to --tasks.")
    if options.wandb_project is None:
        for name, value in (
            ("offline", options.wandb_offline),
            ("run_name", options.wandb_run_name),
        ):
            if value:
                raise UserError(f"--wandb.{name}: name the project too: --wandb.project=NAME.")


def choices(name: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The words of `a,b,c`, each of which must be known.

    Raises:
        UserError: naming the word and what there is.
    """
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    for word in words:
        if word not in known:
            raise UserError(f"--{name}: there is no {word!r}; choose from {', '.join(known)}.")
    if not words:
        raise UserError(f"--{name}: name at least one of {', '.join(known)}.")
    return tuple(word for word in known if word in words)


def one_of(name: str, word: str, known: tuple[str, ...]) -> Any:
    """`word`, which must be known; for options that are literals.

    Raises:
        UserError: naming the word and what there is.
    """
    if word not in known:
        raise UserError(f"--{name}: there is no {word!r}; choose from {', '.join(known)}.")
    return word


def default_out(checkpoint: Path) -> Path:
    """`evaluation/RUN/CHECKPOINT` in the current folder. Not in the run folder: checkpoints there
    come and go."""
    checkpoint = checkpoint.absolute()
    run = checkpoint.parent.parent.name if checkpoint.parent.name == "checkpoints" else ""
    return Path("evaluation") / run / checkpoint.name
