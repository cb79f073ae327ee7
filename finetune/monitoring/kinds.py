"""The kinds of a run's metrics."""

from typing import Literal

Kind = Literal["train", "eval"]
KINDS: tuple[Kind, ...] = ("train", "eval")
