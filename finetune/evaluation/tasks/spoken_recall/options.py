"""Options of the task `spoken_recall`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Le

from finetune.config import Prefix
from finetune.evaluation.tasks.base import TaskOptions
from finetune.spoken import TalkOptions
from ttt.options import NonNegative

Arm = Literal["on", "off", "reset"]
ALL_ARMS: tuple[Arm, ...] = ("on", "off", "reset")


@dataclass(frozen=True)
class RecallOptions(TalkOptions):
    """The talks, and how they are heard."""

    arms: tuple[Arm, ...] = ALL_ARMS
    """With TTT, without, and TTT forgetting all just before each question."""

    max_minutes: Annotated[float, Ge(0.01), Le(1e5)] | None = None
    """Stop after so long; talks that were heard to their end count, and the same command goes on.
    null: no limit."""

    temperature: NonNegative = 0.8
    """Temperature of the audio that the model speaks in the talks."""

    text_temperature: NonNegative = 0.7
    """Temperature of its text."""


@dataclass(frozen=True)
class SpokenRecallOptions(TaskOptions):
    """The options of spoken recall; those of the talks are the same as of recall-audio."""

    recall: Annotated[RecallOptions, Prefix("recall_")] = field(default_factory=RecallOptions)
