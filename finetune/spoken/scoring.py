"""An answer is the first value of the fact's kind that is said in a question's window.

The words are those of a text stream or of a transcript. They are compared in a normal form: small
letters without accents, signs and a possessive 's, and numbers as numbers, so that "20", "twenty"
and "Twenty!" are the same, and "twenty-five" is not twenty. Apart from that a word must be the
value itself: nothing is guessed from how it is spelled, and the name in the answer does not count.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Literal, NamedTuple

from finetune.spoken.facts import KINDS

TimedWord = tuple[str, float, float]
"""A word, and when it begins and ends, in seconds."""
Outcome = Literal["right", "told", "other", "none"]
OUTCOMES: dict[Outcome, str] = {
    "right": "right",
    "told": "another fact's value",
    "other": "a value not told",
    "none": "no answer",
}
"""What an answer can be, and its name for people."""

_SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
)  # fmt: skip
_UNITS = {word: number for number, word in enumerate(_SMALL)}
_ROUND = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_TENS = {word: 10 * number for number, word in enumerate(_ROUND, 2)}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6}


def in_window(words: Iterable[TimedWord], start_sec: float, stop_sec: float) -> list[TimedWord]:
    """Return the words that begin in a window: at its start or later, and before its end."""
    return [word for word in words if start_sec <= word[1] < stop_sec]


def said_value(text: str, kind: str) -> str | None:
    """Return the first value of a kind of facts in a text, as `KINDS` has it; None: it has none.

    A number that is none of the kind's values is passed over, as any other word is.
    """
    if kind == "number":
        by_number = _values_by_number()
        return next((by_number[n] for n in numbers_in(text) if n in by_number), None)
    by_word = {value.lower(): value for value in KINDS[kind].values}
    return next((by_word[word] for word in _normal(text) if word in by_word), None)


def outcome(said: str | None, answer: str, told: Iterable[str]) -> Outcome:
    """Return what an answer is.

    Args:
        said: the value, of `said_value`.
        answer: the right one.
        told: all values that the user has told.
    """
    if said is None:
        return "none"
    if said == answer:
        return "right"
    return "told" if said in told else "other"


def _normal(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", text.replace("’", "'")).lower()
    plain = "".join(sign for sign in plain if not unicodedata.combining(sign))
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", plain)  # 1,000
    plain = re.sub(r"'s\b|[-‐‑–_]", " ", plain)
    return re.findall(r"[a-z0-9]+(?:\.\d+)?|[^\sa-z0-9'\"]", plain)


def numbers_in(text: str) -> Iterable[int]:
    """Yield the numbers in a text, in words or digits, whole ones, each as far as it goes."""
    words = _normal(text)
    at = 0
    while at < len(words):
        found = _number_at(words, at)
        if found is None:
            at += 1
        else:
            number, at = found
            yield number


def _number_at(words: Sequence[str], at: int) -> tuple[int, int] | None:
    """Return the number that begins at a word, and where it ends; None: none begins there."""
    found = _small_at(words, at)
    if found is None and words[at] in _SCALES:
        found = 1, at  # "hundred" is one hundred
    if found is None:
        return None
    last, at = found
    # "two million three hundred five" is 2,000,000 + 300 + 5: what follows a part must be below its
    # scale. A greater scale multiplies all parts below it: (one hundred and twenty) thousand.
    before: list[_Part] = []
    scale = 0  # nothing can follow but a scale
    while at < len(words):
        if words[at] in _SCALES:
            scale = _SCALES[words[at]]
            while before and before[-1].value + last < scale:
                last += before.pop().value
            last *= scale
            if before and last >= before[-1].scale:
                # "one hundred, two hundred" without the comma: two numbers.
                return sum(part.value for part in before), before[-1].end
            at += 1
            continue
        rest = _small_at(words, at + 1 if words[at] == "and" and at + 1 < len(words) else at)
        if rest is None or rest[0] >= scale:
            break
        before.append(_Part(last, scale, at))
        (last, at), scale = rest, 0
    return last + sum(part.value for part in before), at


class _Part(NamedTuple):
    """A part of a number: its value, its last scale, and where it ends."""

    value: int
    scale: int
    end: int


def _small_at(words: Sequence[str], at: int) -> tuple[int, int] | None:
    """Return a number in digits, or one below a hundred in words, and where it ends."""
    word = words[at]
    if word.isdecimal() and len(word) < 10:
        return int(word), at + 1
    if word in _TENS:
        unit = _UNITS.get(words[at + 1], 0) if at + 1 < len(words) else 0
        return (_TENS[word] + unit, at + 2) if 0 < unit < 10 else (_TENS[word], at + 1)
    return (_UNITS[word], at + 1) if word in _UNITS else None


@cache
def _values_by_number() -> dict[int, str]:
    found = {}
    for value in KINDS["number"].values:
        number = _number_at([value.lower()], 0)
        assert number is not None, f"{value} is no number"
        found[number[0]] = value
    return found
