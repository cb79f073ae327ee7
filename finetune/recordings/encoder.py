"""The text tokenizer, once in each process."""

from functools import cache
from pathlib import Path
from typing import Literal

from sentencepiece import SentencePieceProcessor

from finetune.data import TextEncoder
from finetune.errors import UserError

WordStart = Literal["auto", "always", "never"]


@cache
def text_encoder(path: Path, word_start: WordStart = "auto") -> TextEncoder:
    """Return the encoder with the tokenizer in a file.

    Args:
        word_start: see `data.word_start`.

    Raises:
        UserError: it is none.
    """
    try:
        tokenizer = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} is no sentencepiece model: {error}") from error
    return TextEncoder(tokenizer, word_start=word_start)
