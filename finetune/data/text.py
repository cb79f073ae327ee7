"""The text stream that is made of words: one token a frame."""

import hashlib
import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import sentencepiece

from finetune.data.transcripts import MAIN_SPEAKER, Word

FRAME_RATE_HZ = 12.5


def count_frames(duration_sec: float) -> int:
    """Frames of a segment of this length, rounded up."""
    # The tolerance keeps rounding, as in 1.04 * 12.5 = 13.000000000000002, from adding a frame.
    return math.ceil(duration_sec * FRAME_RATE_HZ - 1e-6)


class TimedTokens(NamedTuple):
    """The tokens of one word and when it starts, in frames from the start of the segment."""

    start_frames: float
    tokens: list[int]


@dataclass(frozen=True)
class TextEncoder:
    """A text tokenizer and the model's special tokens: from words to the text stream."""

    tokenizer: sentencepiece.SentencePieceProcessor
    text_padding_id: int = 3
    end_of_text_padding_id: int = 0
    word_start: Literal["auto", "always", "never"] = "always"
    """See `data.word_start`."""

    @property
    def fingerprint(self) -> bytes:
        """Return what tokens depend on besides words."""
        ids = (self.text_padding_id, self.end_of_text_padding_id, self.word_start)
        proto = self.tokenizer.serialized_model_proto()
        return hashlib.blake2b(repr(ids).encode() + proto, digest_size=16).digest()

    def tokenize(self, word: str) -> list[int]:
        """The tokens of one word, by itself, without begin-of-sentence."""
        word = word.strip()
        with_mark = self.word_start == "always" or (
            self.word_start == "auto" and not _has_no_spaces(word)
        )
        tokenizer = self.tokenizer if with_mark else _without_mark(self.tokenizer)
        tokens: list[int] = tokenizer.encode(word, add_bos=False, add_eos=False)
        return tokens

    def tokenize_often(self, word: str) -> list[int]:
        """Tokenize a word as `tokenize` does, for all words of all data: most come again and
        again."""
        return _tokenized(self, word)

    def stream(self, words: Iterable[Word], start_frame: int, num_frames: int) -> list[int]:
        """The text stream of a segment, see `tokenize_segment` and `text_stream`."""
        return text_stream(
            tokenize_segment(words, start_frame, num_frames, self.tokenize),
            num_frames,
            text_padding_id=self.text_padding_id,
            end_of_text_padding_id=self.end_of_text_padding_id,
        )


_SCRIPTS_WITHOUT_SPACES = (
    "CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN",
)  # fmt: skip


def _has_no_spaces(word: str) -> bool:
    """Return whether a word begins in a script that puts no spaces between words."""
    first = next((letter for letter in word if letter.isalpha()), "")
    return bool(first) and unicodedata.name(first, "").startswith(_SCRIPTS_WITHOUT_SPACES)


@lru_cache(maxsize=8)
def _without_mark(
    tokenizer: sentencepiece.SentencePieceProcessor,
) -> sentencepiece.SentencePieceProcessor:
    """Return the same tokenizer, but words do not begin with its mark."""
    # Protocol buffers that follow one another are merged: normalizer_spec.add_dummy_prefix = false.
    proto = tokenizer.serialized_model_proto() + b"\x1a\x02\x18\x00"
    return sentencepiece.SentencePieceProcessor(model_proto=proto)


@lru_cache(maxsize=2**17)
def _tokenized(text: TextEncoder, word: str) -> list[int]:
    return text.tokenize(word)


def is_spoken(word: Word) -> bool:
    """Return whether a word becomes text: one of the main speaker, of positive duration, with
    anything in it."""
    return (
        word.speaker == MAIN_SPEAKER and word.end_sec > word.start_sec and bool(word.text.strip())
    )


def tokenize_segment(
    words: Iterable[Word],
    start_frame: int,
    num_frames: int,
    tokenize: Callable[[str], list[int]],
) -> list[TimedTokens]:
    """The words of the main speaker that start in a segment, sorted by start and tokenized.

    Empty words, and those without a positive duration, are left out. The segment covers the frames
    `start_frame … start_frame + num_frames − 1` of the recording.
    """
    selected = []
    for word in words:
        # Counting in frames from the recording's start, and subtracting a whole number, keeps a
        # word in the same frame wherever the segment begins.
        start_frames = word.start_sec * FRAME_RATE_HZ - start_frame
        if is_spoken(word) and 0 <= start_frames < num_frames:
            selected.append((start_frames, word.text))
    selected.sort(key=lambda item: item[0])
    return [TimedTokens(start_frames, tokenize(text)) for start_frames, text in selected]


def text_stream(
    words: Sequence[TimedTokens],
    num_frames: int,
    *,
    text_padding_id: int,
    end_of_text_padding_id: int,
) -> list[int]:
    """The text stream of a segment: `num_frames` tokens, one a frame.

    Every word that starts before the end of frame t replaces what is left of the word before.
    While tokens are left, one goes on each frame, and a padding on the frame before becomes
    end-of-padding. Everything else is padding.

    Args:
        words: sorted by start.
    """
    stream = [text_padding_id] * num_frames
    remaining: list[int] = []
    next_word = 0
    for frame in range(num_frames):
        while next_word < len(words) and words[next_word].start_frames < frame + 1:
            remaining = list(words[next_word].tokens)
            next_word += 1
        if remaining:
            if frame > 0 and stream[frame - 1] == text_padding_id:
                stream[frame - 1] = end_of_text_padding_id
            stream[frame] = remaining.pop(0)
    return stream
