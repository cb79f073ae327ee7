"""This package speaks: text to speech with word times, sentences to say, and dialogues in which a
user tells facts and asks for them again beyond the reach of attention."""

from importlib import import_module
from typing import Any

from finetune.spoken import texts
from finetune.spoken.answers import (
    ARM_LABELS,
    crosses_window,
    example_table,
    guessing_text,
    question_json,
    recall_csv,
    recall_tables,
    score_words,
    summarize_recall,
)
from finetune.spoken.facts import ACKNOWLEDGMENTS, KINDS, NAMES, Fact, FactKind
from finetune.spoken.files import (
    RecallAudioOptions,
    RecallScoreOptions,
    score_recall,
    write_recall_audio,
)
from finetune.spoken.sample_rate import SAMPLE_RATE_HZ
from finetune.spoken.scoring import TimedWord, in_window, said_value
from finetune.spoken.talk import FORMAT, Talk, TalkOptions, make_talk

_FOUND_IN = {
    "speech": ("Speech", "Voice", "Word", "synthesize"),
    "bank": ("MOSHI_VOICE", "USER_VOICES", "Bank", "BankArgs"),
    "dialogues": ("Dialogue", "DialogueArgs", "compose"),
    "codes": ("Answer", "EncodedDialogues", "mix", "value_tokens"),
    "dataset": ("DATA_VERSION", "NUM_CODEBOOKS", "Dataset", "DatasetArgs", "build_dataset"),
    "tokenizer": ("VOCAB_SIZE",),
}
"""What is slow to import, and is imported only when it is asked for: names by module."""

__all__ = [
    "ACKNOWLEDGMENTS",
    "ARM_LABELS",
    "DATA_VERSION",
    "FORMAT",
    "KINDS",
    "MOSHI_VOICE",
    "NAMES",
    "NUM_CODEBOOKS",
    "SAMPLE_RATE_HZ",
    "USER_VOICES",
    "VOCAB_SIZE",
    "Answer",
    "Bank",
    "BankArgs",
    "Dataset",
    "DatasetArgs",
    "Dialogue",
    "DialogueArgs",
    "EncodedDialogues",
    "Fact",
    "FactKind",
    "RecallAudioOptions",
    "RecallScoreOptions",
    "Speech",
    "Talk",
    "TalkOptions",
    "TimedWord",
    "Voice",
    "Word",
    "build_dataset",
    "compose",
    "crosses_window",
    "example_table",
    "guessing_text",
    "in_window",
    "make_talk",
    "mix",
    "question_json",
    "recall_csv",
    "recall_tables",
    "said_value",
    "score_recall",
    "score_words",
    "summarize_recall",
    "synthesize",
    "texts",
    "value_tokens",
    "write_recall_audio",
]


def __getattr__(name: str) -> Any:
    """Import what is slow to import only when it is asked for."""
    for module, names in _FOUND_IN.items():
        if name in names:
            return getattr(import_module(f"finetune.spoken.{module}"), name)
    raise AttributeError(name)
