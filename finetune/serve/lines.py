"""Lines that the page can say in a caller's place: two facts, small talk, and two questions.

They let a person without a microphone, or with an accent that the model has not heard, try its
memory: tell the facts, let time pass, ask.
"""

import io
import random
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

import soundfile

from finetune.spoken import SAMPLE_RATE_HZ, USER_VOICES, Fact, synthesize, texts

_FACTS = Fact("thing", "Laura", "oranges"), Fact("place", "Simon", "Berlin")
_TOPICS_IN_A_LINE = 3


@dataclass(frozen=True)
class Line:
    """A line is some sentences that are said at once."""

    kind: Literal["fact", "filler", "question"]
    text: str


def _filler(first_seed: int) -> Line:
    seeds = range(first_seed, first_seed + _TOPICS_IN_A_LINE)
    openings = [texts.topic(random.Random(seed), "eval")[0] for seed in seeds]
    return Line("filler", " ".join(openings))


LINES: tuple[Line, ...] = (
    *[Line("fact", fact.sentence) for fact in _FACTS],
    *[_filler(seed) for seed in (0, 3)],
    *[Line("question", fact.question) for fact in _FACTS],
)


def can_speak() -> bool:
    """Return whether espeak-ng is installed (`pip install 'moshi-ttt[demo]'`)."""
    return find_spec("espeakng_loader") is not None


@lru_cache(maxsize=len(LINES))
def spoken(index: int) -> bytes:
    """Return a line of `LINES` as a mono wav, in a voice that `example/memory` was trained on.

    Raises:
        UserError: espeak-ng cannot say it.
    """
    file = io.BytesIO()
    samples = synthesize(LINES[index].text, USER_VOICES[0]).samples
    soundfile.write(file, samples, SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
    return file.getvalue()
