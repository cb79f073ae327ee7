"""Options of the demonstration's commands."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from finetune.config import POSITIONAL, WRITABLE_FOLDER, FilePath, Seed

DialogueSec = Annotated[float, Ge(4), Le(3600)]


@dataclass(frozen=True)
class DemoOptions:
    out: Annotated[FilePath, WRITABLE_FOLDER] = Path("runs/demo")
    """The run folder; what an earlier demonstration left there is replaced, and no other run."""

    force: bool = False
    """Start although the estimated memory is more than there is."""


@dataclass(frozen=True)
class DemoDataOptions:
    out: Annotated[FilePath, POSITIONAL, WRITABLE_FOLDER]
    """Where to write train.jsonl, eval.jsonl, and the .wav and .json files."""

    num_dialogues: Annotated[int, Ge(2), Le(100_000)] = 60
    """How many; about a tenth is for evaluation."""

    min_sec: DialogueSec = 20.0
    """Shortest length of a dialogue."""

    max_sec: DialogueSec = 40.0
    """Longest length of a dialogue."""

    seed: Seed = 0
    """The same seed gives the same bytes."""
