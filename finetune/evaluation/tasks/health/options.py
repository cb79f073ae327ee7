"""Options of the task `health`."""

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Le

from finetune.config import Prefix, Size
from finetune.evaluation.tasks.base import TaskOptions
from ttt.options import NonNegative


@dataclass(frozen=True)
class ContinuationOptions:
    """Seeded continuations: how many, of how long a prompt, and how long they are."""

    num_continuations: Size = 8
    """How many continuations are made for health."""

    prompt_sec: Annotated[float, Ge(0.08), Le(86_400)] = 5.0
    """Seconds of each recording before Moshi takes over."""

    health_sec: Annotated[float, Ge(1), Le(86_400)] = 20.0
    """Seconds of each continuation."""

    temperature: NonNegative = 0.8
    """Temperature of the audio of continuations."""

    text_temperature: NonNegative = 0.7
    """Temperature of their text."""


@dataclass(frozen=True)
class HealthOptions(TaskOptions):
    """The continuations."""

    health: Annotated[ContinuationOptions, Prefix("")] = field(default_factory=ContinuationOptions)
