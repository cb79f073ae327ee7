"""Dataclasses of options, section by section: their fields, and how values get into them."""

import ast
import dataclasses
import difflib
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from typing import Annotated, Any, TypeVar, get_origin, get_type_hints

from finetune.config.marks import Asked, Prefix
from finetune.config.similar import similar_keys
from finetune.config.values import NULLS, members, parse, without_null
from ttt.options import Change, OneOf, abbreviated

# What is wrong, by dotted key ("optim.lr", or "full_finetuning, lora.enable"), with its remedy.
Problem = tuple[str, str]
Mark = TypeVar("Mark")


@dataclass(frozen=True)
class Field:
    """A field is one option, or a section of options.

    key: its whole name, with those of the sections that it is in.
    kind: its type, with bounds and marks.
    section: the dataclass of a section.
    """

    key: str
    name: str
    kind: Any
    section: type | None
    default: Any
    text: str
    change: Change | None

    @property
    def doc(self) -> str:
        """Return what it means; of words that are listed elsewhere, what each of them means."""
        words = [word for mark in marks_of(self.kind, OneOf) for word in mark.texts().items()]
        return " ".join([self.text, *(f"`{name}`: {text}" for name, text in words)])

    @property
    def is_required(self) -> bool:
        return self.section is None and self.default is MISSING

    @property
    def is_asked(self) -> bool:
        return bool(marks_of(self.kind, Asked))

    @property
    def given_kind(self) -> Any:
        """Return the type of what may be given: null is not, where a command asks."""
        return without_null(self.kind) if self.is_asked else self.kind

    @property
    def prefix(self) -> str:
        """Return how the keys in this section begin."""
        own = marks_of(self.kind, Prefix)
        return own[0].text if own else f"{self.key}."


def marks_of(kind: Any, mark: type[Mark]) -> list[Mark]:
    """Return the marks of one class that stand beside an option, in its type."""
    marks = kind.__metadata__ if get_origin(kind) is Annotated else ()
    return [each for each in marks if isinstance(each, mark)]


@cache
def fields_of(cls: type, prefix: str = "", change: Change | None = None) -> tuple[Field, ...]:
    """Return the fields of a dataclass; sections as such, without what is in them."""
    kinds, docs = get_type_hints(cls, include_extras=True), field_docs(cls)
    found = []
    for field in dataclasses.fields(cls):
        kind = kinds[field.name]
        own = members(kind)[0]
        marks = marks_of(kind, Change)
        found.append(
            Field(
                prefix + field.name,
                field.name,
                kind,
                own if isinstance(own, type) and dataclasses.is_dataclass(own) else None,
                field.default,
                docs.get(field.name, ""),
                marks[0] if marks else change,
            )
        )
    return tuple(found)


def all_fields(cls: type) -> Iterator[Field]:
    """Yield the fields of a dataclass, and behind each section those that are in it."""

    def walk(fields: tuple[Field, ...]) -> Iterator[Field]:
        for field in fields:
            yield field
            if field.section:
                yield from walk(fields_of(field.section, field.prefix, field.change))

    return walk(fields_of(cls))


@cache
def field_docs(cls: type) -> dict[str, str]:
    """Return the string literal below each field of a dataclass, as one line."""
    docs: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        # A dataclass that a function has put together has no source, and no fields of its own.
        if "__dataclass_fields__" in vars(each) and vars(each).get("__annotations__"):
            docs |= _own_field_docs(each)
    return docs


def _own_field_docs(cls: type) -> dict[str, str]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(ast.Constant(str(text))):
                docs[name] = " ".join(text.split())
    return docs


def complete(cls: Any) -> type:
    """Return a dataclass of options with those that are registered for it elsewhere, if it is one
    that others add to."""
    whole: type = cls.complete() if hasattr(cls, "complete") else cls
    return whole


def fill(cls: type, flat: Mapping[str, Any]) -> tuple[Any, list[Problem]]:
    """Return `cls` with the values of `flat`, and what is wrong.

    Args:
        flat: texts or lists of texts, by dotted key.

    Returns:
        An instance that has defaults for what is absent or wrong; problems by key.
    """
    # A section without a name of its own (an empty prefix) cannot be given as a whole.
    fields = {
        field.key: field
        for field in all_fields(cls)
        if not (field.section and "." not in field.prefix)
    }
    values: dict[str, Any] = {}
    foreign = {key: section for key in flat if (section := _foreign_section(cls, key))}
    problems: list[Problem] = [
        (abbreviated(section), "there is no such section; remove it with all that is in it")
        for section in dict.fromkeys(foreign.values())
    ]
    for key, raw in flat.items():
        if key in foreign:
            continue
        if key not in fields:
            similar = " or ".join(suggestions(cls, key))
            hint = f", did you mean {similar}?" if similar else "; remove it"
            problems.append((abbreviated(key), f"unknown key{hint}"))
        elif fields[key].section:
            if raw not in NULLS:
                problems.append((key, "is a section: expected keys of its own below it"))
        else:
            try:
                values[key] = parse(raw, fields[key].given_kind)
            except ValueError as error:
                problems.append((key, str(error)))
    for key, field in fields.items():
        if field.is_required and key not in flat:
            problems.append((key, "missing, and it has no default; add it"))
        if field.is_required and key not in values:
            values[key] = ""  # what must be given is text: a stand-in, to go on checking
    return _build(cls, values), problems


def _build(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    chosen = {}
    for field in fields_of(cls, prefix):
        if field.section:
            chosen[field.name] = _build(field.section, values, field.prefix)
        elif field.key in values:
            chosen[field.name] = values[field.key]
    return cls(**chosen)


def _foreign_section(cls: type, key: str) -> str | None:
    """Return the section that a key is in, if there is none of that name nor of a similar one:
    what is in it has nothing to do with keys of the same name elsewhere."""
    section, dot, _ = key.partition(".")
    known = _first_words(cls)
    if not dot or section in known:
        return None
    return None if difflib.get_close_matches(section[:100], known, n=1, cutoff=0.6) else section


@cache
def _first_words(cls: type) -> frozenset[str]:
    """Return how the keys of a dataclass begin, up to their first dot."""
    return frozenset(field.key.split(".")[0] for field in all_fields(cls))


def suggestions(cls: type, unknown: str) -> list[str]:
    """Return the existing keys that were probably meant, as `similar_keys` does."""
    return similar_keys(unknown, [field.key for field in all_fields(cls)])


def keys_that(cls: type, *changes: Change) -> set[str]:
    """Return the keys of a dataclass with one of these marks."""
    return {field.key for field in all_fields(cls) if field.change in changes}
