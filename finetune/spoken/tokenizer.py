"""A small tokenizer whose names and values are tokens of their own."""

import io
import random
from collections.abc import Iterable

import sentencepiece

from finetune.spoken import texts
from finetune.spoken.bank import BankArgs
from finetune.spoken.facts import ACKNOWLEDGMENTS, NAMES, Fact

VOCAB_SIZE = 576
_NUM_TURNS = 3000
_TIMES = 3
"""How often each fact is in the texts."""


def train_tokenizer(args: BankArgs) -> bytes:
    """Return a sentencepiece model: for the same kinds of facts the same bytes, by one version of
    sentencepiece. Another version may choose other pieces, so a model keeps its tokenizer.

    Special pieces as in Moshi's tokenizer: unknown 0, begin 1, end 2, padding 3.
    """
    lines = list(texts.corpus(_NUM_TURNS))
    for kind, value in args.values:
        for name in NAMES:
            fact = Fact(kind, name, value)
            lines += [f"{fact.repetition} {value}.", fact.sentence] * _TIMES
    lines += list(ACKNOWLEDGMENTS) * 100
    random.Random(0).shuffle(lines)
    words = (*NAMES, *(value for _, value in args.values))
    return train_on(lines, VOCAB_SIZE, words)


def train_on(lines: Iterable[str], vocab_size: int, words: Iterable[str] = ()) -> bytes:
    """Return a sentencepiece unigram model of `lines`; letters that they lack are spelled in bytes.

    Args:
        words: that are pieces of their own.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        byte_fallback=True,
        user_defined_symbols=[f"▁{word}" for word in words],
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
