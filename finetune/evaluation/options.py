"""What `moshi-ttt evaluate` can be told."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune.config import WandbArgs, choices, flag, number, one_of, whole_number
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


def read_options(given: Mapping[str, str], wandb: Mapping[str, Any]) -> Options:
    """The options of `moshi-ttt evaluate` from what the command line says.

    Args:
        given: by name, as typed; what is not there has no default.
        wandb: `project`, `offline` and `run_name`, None where they were not given.

    Raises:
        UserError: a value that an option cannot have.
    """
    checkpoint, pairs, baseline = (given.get(name) for name in ("checkpoint", "pairs", "baseline"))
    assert checkpoint is not None

    def count(name: str) -> int:
        return whole_number(name, given[name], low=1)

    def at_least(low: float, name: str) -> float:
        return number(name, given[name], low=low)

    tasks = given["tasks"] or f"position,health{',pairs' * bool(pairs)}"
    return Options(
        checkpoint=Path(checkpoint),
        out=Path(given["out"]) if given.get("out") else default_out(Path(checkpoint)),
        tasks=choices("tasks", tasks, TASKS),
        data=given.get("data"),
        pairs=None if pairs is None else Path(pairs),
        arms=choices("arms", given["arms"], ARMS),
        reset_frames=count("reset_frames") if "reset_frames" in given else None,
        baseline=None if baseline is None else Path(baseline),
        bin_sec=at_least(0.08, "bin_sec"),
        max_sec=at_least(0.08, "max_sec") if "max_sec" in given else None,
        limit=count("limit") if "limit" in given else None,
        batch_size=count("batch_size"),
        block_frames=count("block_frames"),
        device=one_of("device", given["device"], ("auto", "cpu", "cuda")),
        seed=whole_number("seed", given["seed"], low=0),
        pair=PairOptions(
            side=one_of("pair_side", given["pair_side"], ("moshi", "user")),
            text=one_of("pair_text", given["pair_text"], ("padding", "transcript")),
            text_weight=at_least(0.0, "pair_text_weight"),
            first_codebook_weight=at_least(0.0, "pair_first_codebook_weight"),
            other_codebooks_weight=at_least(0.0, "pair_other_codebooks_weight"),
            length_norm=one_of("pair_length_norm", given["pair_length_norm"], ("mean", "sum")),
        ),
        health=HealthOptions(
            num_continuations=count("num_continuations"),
            prompt_sec=at_least(0.08, "prompt_sec"),
            health_sec=at_least(1.0, "health_sec"),
            temperature=at_least(0.0, "temperature"),
            text_temperature=at_least(0.0, "text_temperature"),
        ),
        wandb_project=wandb["project"],
        wandb_run_name=wandb["run_name"],
        wandb_offline=flag("wandb.offline", str(wandb["offline"] or False)),
    )


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


def what_takes_less(options: Options) -> str:
    """Which options make an evaluation take less memory of the GPU."""
    sizes = {"batch_size": options.batch_size, "block_frames": options.block_frames}
    ways = [f"a smaller --{name} (now {size})" for name, size in sizes.items() if size > 1]
    return "; ".join([*ways, "--device cpu, which is slow"])


def default_out(checkpoint: Path) -> Path:
    """`evaluation/RUN/CHECKPOINT` in the current folder. Not in the run folder: checkpoints there
    come and go."""
    checkpoint = checkpoint.absolute()
    run = checkpoint.parent.parent.name if checkpoint.parent.name == "checkpoints" else ""
    return Path("evaluation") / run / checkpoint.name
