"""Values of command-line options, which come as they were typed.

Everything here raises `UserError`, which names the option and what it may be.
"""

import difflib
import math
import re
from collections.abc import Iterable
from typing import Any

from finetune.errors import UserError
from finetune.safety import redact


def refuse(unexpected: tuple[str, ...], unknown: dict[str, Any] | None = None) -> None:
    """fire complains of arguments that nobody takes only when the command has run."""
    for word in unexpected:
        hint = f" Did you mean --{word}?" if "=" in word else ""
        raise UserError(redact(f"unexpected argument: {word}.{hint}"))
    for name in unknown or {}:
        raise UserError(f"unknown option: --{name}. Ask for --help to see those there are.")


def require(others: Iterable[str] = (), /, **given: str) -> None:
    """Of options without a default: as parameters without one, fire would show its usage and not
    say that an option is misspelt.

    Args:
        others: options that were given where any name is taken; one of them may be meant.
    """
    for name, value in given.items():
        if not value:
            similar = difflib.get_close_matches(name, others, n=1)
            similar += [other for other in others if name.startswith(other)]
            if similar:
                raise UserError(f"unknown option: --{similar[0]}. Did you mean --{name}?")
            raise UserError(f"--{name} is missing. Ask for --help to see what it is.")


def flag(name: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise UserError(f"--{name}: is on or off; give --{name} alone, got {value!r}.")
    return value.lower() == "true"


def number(name: str, value: str, *, low: float) -> float:
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not low <= found < math.inf:
        raise UserError(f"--{name}: expected a number of at least {low:g}, got {value!r}.")
    return found


def whole_number(name: str, value: str, *, low: int) -> int:
    if not re.fullmatch("-?[0-9]+", value) or int(value) < low:
        raise UserError(f"--{name}: expected a whole number of at least {low}, got {value!r}.")
    return int(value)


def items(name: str, values: str) -> list[str]:
    """What stands between the commas, each once."""
    found = [value.strip() for value in values.split(",") if value.strip()]
    if not found:
        raise UserError(f"--{name}: expected at least one, with a comma between each; got nothing.")
    return list(dict.fromkeys(found))


def whole_numbers(name: str, values: str, *, low: int) -> list[int]:
    numbers = [whole_number(name, value, low=low) for value in items(name, values)]
    return list(dict.fromkeys(numbers))


def choices(name: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The words of `a,b,c`, each of which must be known.

    Raises:
        UserError: naming the word and what there is.
    """
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    for word in words:
        if word not in known:
            raise UserError(f"--{name}: there is no {word!r}; choose from {', '.join(known)}.")
    if not words:
        raise UserError(f"--{name}: name at least one of {', '.join(known)}.")
    return tuple(word for word in known if word in words)


def one_of(name: str, word: str, known: tuple[str, ...]) -> Any:
    """`word`, which must be known; for options that are literals.

    Raises:
        UserError: naming the word and what there is.
    """
    if word not in known:
        raise UserError(f"--{name}: there is no {word!r}; choose from {', '.join(known)}.")
    return word
