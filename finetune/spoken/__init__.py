"""This package speaks: text to speech with word times, sentences to say, and dialogues in which a
user tells facts and asks for them again beyond the reach of attention."""

from importlib import import_module
from typing import Any

from finetune.spoken import texts
from finetune.spoken.facts import ACKNOWLEDGMENTS, KINDS, NAMES, Fact, FactKind

_FOUND_IN = {
    "speech": ("SAMPLE_RATE", "Speech", "Voice", "Word", "synthesize"),
    "bank": ("MOSHI_VOICE", "USER_VOICES", "Bank", "BankArgs"),
    "dialogues": ("DialogueArgs",),
    "codes": ("Answer", "EncodedDialogues", "value_tokens"),
    "dataset": ("NUM_CODEBOOKS", "Dataset", "DatasetArgs", "build_dataset"),
    "tokenizer": ("VOCAB_SIZE",),
}
"""What is slow to import, and is imported only when it is asked for: names by module."""

__all__ = [
    "ACKNOWLEDGMENTS",
    "KINDS",
    "MOSHI_VOICE",
    "NAMES",
    "NUM_CODEBOOKS",
    "SAMPLE_RATE",
    "USER_VOICES",
    "VOCAB_SIZE",
    "Answer",
    "Bank",
    "BankArgs",
    "Dataset",
    "DatasetArgs",
    "DialogueArgs",
    "EncodedDialogues",
    "Fact",
    "FactKind",
    "Speech",
    "Voice",
    "Word",
    "build_dataset",
    "synthesize",
    "texts",
    "value_tokens",
]


def __getattr__(name: str) -> Any:
    """Import what is slow to import only when it is asked for."""
    for module, names in _FOUND_IN.items():
        if name in names:
            return getattr(import_module(f"finetune.spoken.{module}"), name)
    raise AttributeError(name)
