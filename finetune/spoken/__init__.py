"""This package speaks: text to speech with word times, sentences to say, and facts that a user
tells and asks for again beyond the reach of attention."""

from typing import Any

from finetune.spoken import texts
from finetune.spoken.facts import ACKNOWLEDGMENTS, KINDS, NAMES, Fact, FactKind

__all__ = [
    "ACKNOWLEDGMENTS",
    "KINDS",
    "NAMES",
    "SAMPLE_RATE",
    "Fact",
    "FactKind",
    "Speech",
    "Voice",
    "Word",
    "synthesize",
    "texts",
]

_SPEECH = {"SAMPLE_RATE", "Speech", "Voice", "Word", "synthesize"}


def __getattr__(name: str) -> Any:
    """Import what is slow to import only when it is asked for."""
    if name in _SPEECH:
        from finetune.spoken import speech

        return getattr(speech, name)
    raise AttributeError(name)
