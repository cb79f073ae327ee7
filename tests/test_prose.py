"""One spelling throughout, so that a search finds every place: the American."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FROZEN = "tests/fixtures/"
"""What older code wrote stays as that wrote it."""

ISE = """
    apolog author capital categor character critic custom digit discret emphas equal external factor
    final general harmon initial internal item linear local material maxim memor minim modern
    neutral normal optim organ orthogonal orthonormal parallel parameter parametr penal personal
    polar popular priorit quant random raster real recogn regular sanit serial special stabil
    standard summar symbol synchron synthes token util vector visual
"""
OUR = "arm behavi col endeav fav flav harb hon hum lab neighb od rum sav splend vap vig"
LLED = "channel dial equal fuel label level marshal model signal total travel tunnel"
BRITISH = re.compile(
    r"(?<![a-z])(?:de|ir|mis|over|pre|re|sub|un|under)?(?:"
    rf"(?:{'|'.join(ISE.split())})is(?:e[drs]?|ers|ing|ations?|able)"
    rf"|(?:{'|'.join(OUR.split())})our(?:s|ed|ing|able|ably|al|hoods?|ites?|less)?"
    rf"|(?:{'|'.join(LLED.split())})(?:led|ling|lers?)"
    r"|(?:ana|cata|para)lys(?:e[dr]?|ers|ing)"
    r"|(?:burn|dream|lean|leap|learn|smel|spel|spil|spoil)t"
    r"|(?:cent|fib|lit|met|theat|calib|spect|meag)re[ds]?"
    r"|(?:kilo|centi|milli)metres?"
    r"|(?:acknowledge|judge|fulfil)ments?|catalogue[ds]?"
    r"|(?:de|of|pre)fences?|licences?|pretences?|practis(?:e[ds]?|ing)"
    r"|ageing|aluminium|amongst|artefacts?|cheques?|cosy|draughts?|enquir(?:e[ds]?|y|ies)"
    r"|fulfils?|grey(?:s|ed|ish|scale)?|maths|moulds?|per cent|programmes?|sceptic(?:al|s)?"
    r"|sizeable|skilful|tyres?|useable|whilst|wilful"
    r")(?![a-z])"
)


def british(text: str) -> Iterator[tuple[int, str]]:
    """The British spellings of a text, with their lines; also within names of code."""
    for number, line in enumerate(text.splitlines(), 1):
        # A capital within a word begins the next one.
        parted = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", line).lower()
        yield from ((number, match[0]) for match in BRITISH.finditer(parted))


def tracked_texts() -> Iterator[tuple[str, str]]:
    """Name and text of each file under version control that is one."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = ROOT / name
        if name.startswith(FROZEN) or path == Path(__file__) or not path.is_file():
            continue
        raw = path.read_bytes()
        if b"\0" not in raw:
            yield name, raw.decode()


def test_every_text_is_spelled_in_american() -> None:
    found = [
        f"{name}:{line}: {word}" for name, text in tracked_texts() for line, word in british(text)
    ]
    assert not found, "British spelling:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("what it has learnt", ["learnt"]),
        ("def summarise_pairs(x_centred):", ["summarise", "centred"]),
        ("class TokeniserOfColours:", ["tokeniser", "colours"]),
        ("UNQUANTISED, misspelt, per cent", ["unquantised", "misspelt", "per cent"]),
        ("four hours otherwise; raise, promise, precise, analyses, a metric of ours", []),
        ("learned, modeled, analyzed, exercised, programmed; asyncio.CancelledError", []),
    ],
)
def test_british_words_are_told_from_words_alike(text: str, words: list[str]) -> None:
    assert [word for _, word in british(text)] == words


def test_a_british_word_is_named_with_its_line() -> None:
    assert list(british("plain\n# a colour")) == [(2, "colour")]
