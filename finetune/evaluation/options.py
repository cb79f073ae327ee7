"""What `moshi-ttt evaluate` can be told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from finetune.config import FilePath, PathsText, Prefix, Seed, Size, WandbArgs
from finetune.errors import UserError
from ttt.options import Count, Frames, NonNegative

Task = Literal["position", "pairs", "health"]
Arm = Literal["on", "off", "reset", "carried"]
TASKS: tuple[Task, ...] = ("position", "pairs", "health")
ARMS: tuple[Arm, ...] = ("on", "off", "reset", "carried")
Duration = Annotated[float, Ge(0.08), Le(86_400)]
_OUT = Path("evaluation/RUN/CHECKPOINT")


@dataclass(frozen=True)
class PairOptions:
    """How the likelihood of a recording is made of those of its tokens: weights of the streams, and
    whether the weighted sum is divided by the number of frames (`mean`) or not (`sum`)."""

    side: Literal["moshi", "user"] = "moshi"
    """Whose voice a mono recording is; the other side is silent."""

    text: Literal["padding", "transcript"] = "padding"
    """`transcript`: the words of the .json beside each recording."""

    text_weight: NonNegative = 0.0
    """Weight of the text stream in the likelihood."""

    first_codebook_weight: NonNegative = 1.0
    """Weight of the first codebook."""

    other_codebooks_weight: NonNegative = 0.0
    """Weight of each other codebook."""

    length_norm: Literal["mean", "sum"] = "mean"
    """`mean`: divide by the number of frames; `sum`: do not."""


@dataclass(frozen=True)
class HealthOptions:
    """Seeded continuations: how many, of how long a prompt, and how long they are."""

    num_continuations: Size = 8
    """How many continuations are made for health."""

    prompt_sec: Duration = 5.0
    """Seconds of each recording before Moshi takes over."""

    health_sec: Annotated[float, Ge(1), Le(86_400)] = 20.0
    """Seconds of each continuation."""

    temperature: NonNegative = 0.8
    """Temperature of the audio of continuations."""

    text_temperature: NonNegative = 0.7
    """Temperature of their text."""


@dataclass(frozen=True)
class Options:
    checkpoint: FilePath
    """A folder run_dir/checkpoints/checkpoint_NNNNNN, or of a stock Moshi."""

    tasks: tuple[Task, ...] = ()
    """Some of position, pairs, health; position and health if not given, and pairs with --pairs."""

    data: PathsText | None = None
    """A JSONL of recordings as for training; null: the run's data.eval_data."""

    pairs: FilePath | None = None
    """A JSONL of {"good": "a.wav", "bad": "b.wav", "id": "17", "group": "agreement"}."""

    out: FilePath = _OUT
    """The folder to write to."""

    arms: tuple[Arm, ...] = ARMS
    """Arms of loss by position: with TTT, without, TTT reset now and then, TTT starting from the
    state of another recording."""

    reset_frames: Frames | None = None
    """How often the arm `reset` resets, more than a chunk; null: what attention sees, and at least
    two chunks."""

    baseline: FilePath | None = None
    """The output folder of an evaluation of another checkpoint, to compare with."""

    bin_sec: Duration = 10.0
    """Width of the bins of position."""

    max_sec: Duration | None = None
    """Read no more than this of each recording."""

    limit: Count | None = None
    """Read no more than the first so many recordings."""

    batch_size: Size = 4
    """Recordings side by side."""

    block_frames: Frames = 250
    """Frames computed at once; it bounds the memory and changes no result."""

    pair: Annotated[PairOptions, Prefix("pair_")] = field(default_factory=PairOptions)
    health: Annotated[HealthOptions, Prefix("")] = field(default_factory=HealthOptions)

    seed: Seed = 0
    """Seed of continuations and of the bootstrap."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto`: on the GPU if there is one."""

    wandb: WandbArgs = field(default_factory=WandbArgs)

    def __post_init__(self) -> None:
        """Put in what follows from the other options where nothing is given."""
        default = ("position", "health", "pairs" if self.pairs else "health")
        tasks = self.tasks or default
        object.__setattr__(self, "tasks", tuple(task for task in TASKS if task in tasks))
        object.__setattr__(self, "arms", tuple(arm for arm in ARMS if arm in self.arms))
        if self.out == _OUT:
            object.__setattr__(self, "out", default_out(Path(self.checkpoint)))

    def check(self) -> None:
        """
        Raises:
            UserError: an option that has no effect without another one, or lacks another one.
        """
        if "pairs" in self.tasks and self.pairs is None:
            raise UserError("--tasks: pairs needs --pairs, the JSONL of the pairs.")
        if "pairs" not in self.tasks and self.pairs is not None:
            raise UserError("--pairs: counts for the task pairs alone; add it to --tasks.")
        if "position" not in self.tasks and self.baseline is not None:
            raise UserError("--baseline: counts for the task position alone; add it to --tasks.")
        if self.wandb.project is None:
            for name in ("offline", "run_name"):
                if getattr(self.wandb, name):
                    raise UserError(f"--wandb.{name}: name the project too: --wandb.project=NAME.")


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
