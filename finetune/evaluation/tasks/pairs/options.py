"""Options of the task `pairs`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from finetune.config import FILE, FilePath, Prefix
from finetune.evaluation.tasks.base import TaskOptions
from ttt.options import NonNegative


@dataclass(frozen=True)
class PairOptions:
    """Options of how the likelihood of a recording is made of those of its tokens: weights of the
    streams, and whether the weighted sum is divided by the number of frames (`mean`) or not
    (`sum`)."""

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
class PairsOptions(TaskOptions):
    """The pairs, and how they are scored."""

    pairs: Annotated[FilePath | None, FILE] = None
    """A JSONL of {"good": "a.wav", "bad": "b.wav", "id": "17", "group": "agreement"}."""

    pair: Annotated[PairOptions, Prefix("pair_")] = field(default_factory=PairOptions)
