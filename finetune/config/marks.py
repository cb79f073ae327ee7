"""Marks that stand beside an option, in its type: what it means to a run and on the command
line."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prefix:
    """Mark that says how the names of a section's options begin on a command line, not
    `SECTION.`."""

    text: str


@dataclass(frozen=True)
class Positional:
    """An option that may stand on a command line without its name."""


POSITIONAL = Positional()


@dataclass(frozen=True)
class Asked:
    """An option that is null until the command has asked for it on the terminal: nobody can give
    null."""


ASKED = Asked()


@dataclass(frozen=True)
class MustExist:
    """Mark of an option that names what must be there already: a file, or room to write one.

    require: takes the option's value and its name, and raises `UserError` if it is not there.
    """

    require: Callable[[Any, str], None]
