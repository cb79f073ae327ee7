"""Facts that stand beside an option, in its type: its bounds, the methods that read it, and what
follows from another value."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from functools import cache
from typing import Annotated, Any, get_type_hints

from annotated_types import Ge, Gt, Le
from pydantic import ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

LARGEST = 1e38
"""Upper bound of numbers that end up in float32."""

NonNegative = Annotated[float, Ge(0), Le(LARGEST)]
Positive = Annotated[float, Gt(0), Le(LARGEST)]
Count = Annotated[int, Ge(1), Le(10**9)]
Frames = Annotated[int, Ge(1), Le(10**7)]
"""The upper bound is nine days of audio."""


@dataclasses.dataclass(frozen=True)
class Methods:
    """Mark of an option that these TTT methods alone read."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return " and ".join(self.names)


IN_PLACE = Methods(("in_place",))
IN_PLACE_AND_MLP = Methods(("in_place", "mlp"))
INNER_LOOP = Methods(("linear", "mlp"))


class Change(Enum):
    """Mark that says what follows if an option is not as it was when a run began.

    The first two change no weight, but for rounding.
    """

    HARMLESS = "no result changes: it may be another one on resume"
    MEASURED = "what is measured or saved changes, and no weight"
    START = "how the run is started, not what it is"


HARMLESS, MEASURED, START = Change.HARMLESS, Change.MEASURED, Change.START


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Mark of text that must be one of the words that there are when it is read.

    texts: returns what each word means, where it is said where the words are listed.
    """

    words: Callable[[], Iterable[str]]
    texts: Callable[[], Mapping[str, str]] = dict

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._known, handler(source))

    def __get_pydantic_json_schema__(self, *_: Any) -> dict[str, Any]:
        return {"enum": list(self.words()), "type": "string"}

    def _known(self, word: str) -> str:
        if word not in self.words():
            raise PydanticCustomError("unknown_word", "is not one of the words")
        return word


_BOUNDS = {
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
}


def marks(cls: type, kind: type) -> dict[str, Any]:
    """Return the mark of type `kind` of each field of a dataclass that has one, by name."""
    hints = get_type_hints(cls, include_extras=True)
    found = {
        name: [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, kind)]
        for name, hint in hints.items()
    }
    return {name: each[0] for name, each in found.items() if each}


@cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    """Return pydantic's validator of a field's type; it takes no infinite number."""
    return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))


def broken_rule(error: ValidationError) -> str | None:
    """Say which bound or other rule of its type a value breaks; nothing for a wrong type."""
    for found in error.errors(include_url=False):
        if found["type"] in _BOUNDS:
            bound = _BOUNDS[found["type"]].format(**found["ctx"])
            return f"must be {bound}, got {abbreviated(str(found['input']))}"
        if found["type"] == "value_error":
            return str(found["ctx"]["error"])
    return None


def abbreviated(text: str) -> str:
    """Return `text`, or its beginning if it is longer than a message can hold."""
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


def out_of_bounds(options: Any) -> Iterator[tuple[str, str]]:
    """Yield name and problem of each field of a dataclass whose value its type does not allow."""
    for name, kind in get_type_hints(type(options), include_extras=True).items():
        value = getattr(options, name)
        try:
            adapter(kind).validate_python(value, strict=True)
        except ValidationError as error:
            yield name, broken_rule(error) or f"cannot be {abbreviated(repr(value))}"
