"""Words as they are written become words and sounds of the aligner's English dictionary."""

import re
import unicodedata
from collections.abc import Callable

_SIGNS = {"&": "and", "%": "percent", "+": "plus", "@": "at", "=": "equals", "°": "degrees"}
_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    *("eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_POWERS = ((10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred"))
_PART = re.compile(r"\d+|[a-z][a-z']*|[&%+@=°]")
_ORDINAL = re.compile(r"(?<=\d)(st|nd|rd|th)\b")

_SOUNDS = {
    **{"tch": "CH", "sch": "SH", "igh": "AY", "eau": "OW", "ough": "OW", "tion": "SH AH N"},
    **{"sion": "ZH AH N", "ch": "CH", "sh": "SH", "th": "TH", "ph": "F", "gh": "G", "wh": "W"},
    **{"ck": "K", "ng": "NG", "qu": "K W", "kn": "N", "wr": "R", "ee": "IY", "ea": "IY"},
    **{"oo": "UW", "ou": "AW", "ow": "OW", "oi": "OY", "oy": "OY", "ai": "EY", "ay": "EY"},
    **{"au": "AO", "aw": "AO", "ie": "IY", "ei": "EY", "ey": "IY", "er": "ER", "ir": "ER"},
    **{"ur": "ER", "ar": "AA R", "or": "AO R", "a": "AE", "b": "B", "c": "K", "d": "D"},
    **{"e": "EH", "f": "F", "g": "G", "h": "HH", "i": "IH", "j": "JH", "k": "K", "l": "L"},
    **{"m": "M", "n": "N", "o": "OW", "p": "P", "q": "K", "r": "R", "s": "S", "t": "T"},
    **{"u": "AH", "v": "V", "w": "W", "x": "K S", "y": "IY", "z": "Z"},
}
"""How groups of letters sound, in ARPABET. Rough, but times need no more than that."""


def spoken_form(word: str) -> list[str]:
    """Return what is said for a written word: "twenty-one" has two parts, "42%" three.

    Each part is of the letters a to z and apostrophes. Empty: the word has nothing that is said in
    English; it is a dash, or of another script.
    """
    text = unicodedata.normalize("NFKD", word.replace("’", "'").replace("ß", "ss"))
    text = "".join(letter for letter in text if not unicodedata.combining(letter)).lower()
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    text = re.sub(r"(?<=\d)\.(?=\d)", " point ", _ORDINAL.sub("", text))
    said: list[str] = []
    for part in _PART.findall(text):
        said += number_words(part) if part.isdigit() else [_SIGNS.get(part, part)]
    return said


def number_words(digits: str) -> list[str]:
    """Return how a number is said; one of many digits digit by digit, 1100 to 1999 as a year."""
    if len(digits) > 12 or (len(digits) > 1 and digits[0] == "0"):
        return [_ONES[int(digit)] for digit in digits]
    number = int(digits)
    if 1100 <= number < 2000 and number % 100 >= 10:
        return [*_cardinal(number // 100), *_cardinal(number % 100)]
    return _cardinal(number)


def _cardinal(number: int) -> list[str]:
    if number < 20:
        return [_ONES[number]]
    if number < 100:
        rest = [_ONES[number % 10]] if number % 10 else []
        return [_TENS[number // 10 - 2], *rest]
    size, name = next(each for each in _POWERS if number >= each[0])
    rest = _cardinal(number % size) if number % size else []
    return [*_cardinal(number // size), name, *rest]


def sounds_of(part: str, known: Callable[[str], str | None]) -> str:
    """Return the sounds of a part that the dictionary lacks, in ARPABET.

    Args:
        known: the dictionary: sounds of a part, or None.
    """
    for ending, sound in (("'s", "Z"), ("s", "Z"), ("'d", "D"), ("ed", "D"), ("ing", "IH NG")):
        if part.endswith(ending) and (stem := known(part.removesuffix(ending))):
            return f"{stem} {sound}"
    vowels = set("aeiouy")
    if not vowels & set(part):
        # An abbreviation is spelled out: the dictionary has the names of the letters.
        return " ".join(known(letter) or _SOUNDS[letter] for letter in part if letter in _SOUNDS)
    found: list[str] = []
    rest = part.replace("'", "")
    while rest:
        size = next(n for n in (4, 3, 2, 1) if rest[:n] in _SOUNDS)
        is_mute = rest == "e" and len(found) > 1
        is_double = len(rest) > 1 and rest[0] == rest[1] and size == 1
        if not (is_mute or is_double):
            found.append(_SOUNDS[rest[:size]])
        rest = rest[size:]
    return " ".join(found)
