"""A configuration's keys are explained on a terminal: `moshi-ttt config KEY`."""

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

from finetune.config.args import TrainArgs
from finetune.config.checks import may_change
from finetune.config.docs_page import default_text, type_name
from finetune.config.fields import Field, all_fields, suggestions
from finetune.errors import UserError
from finetune.safety import redact
from ttt.options import LARGEST, Change, Methods, abbreviated

_WIDTH = 96
_BOUNDS = {Ge: "{:g} or more", Gt: "more than {:g}", Le: "at most {:g}", Lt: "less than {:g}"}


def explain(key: str | None) -> str:
    """Return what a key means, or which keys a section has; null: which there are at all.

    Raises:
        UserError: there is no such key; it says which may be meant.
    """
    fields = {field.key: field for field in all_fields(TrainArgs)}
    key = (key or "").rstrip(".:")
    if not key:
        return _listing([field for field in fields.values() if "." not in field.key])
    if key not in fields:
        raise UserError(f"unknown key: {abbreviated(redact(key))}. {_hint(key, fields)}")
    field = fields[key]
    if not field.section:
        return "\n".join(_lines(field))
    inside = [each for each in fields.values() if each.key.startswith(f"{key}.")]
    return f"{field.doc}\n\n{_listing(inside)}"


def _hint(key: str, fields: dict[str, Field]) -> str:
    similar = " or ".join(suggestions(TrainArgs, key))
    # A part of a name, or of what it means: `config rate` finds learning rates.
    holds = [k for k, field in fields.items() if key.lower() in k] or [
        k for k, field in fields.items() if key.lower() in field.doc.lower()
    ]
    if similar:
        return f"Did you mean {similar}?"
    if holds:
        return f"These have to do with it: {', '.join(holds[:12])}."
    return "moshi-ttt config lists all keys."


def _listing(fields: list[Field]) -> str:
    width = 1 + max(len(field.key) for field in fields)
    lines = []
    for field in fields:
        first_sentence = field.doc.split(". ")[0].rstrip(".")
        name = f"{field.key}:" if field.section else field.key
        text = textwrap.shorten(first_sentence, _WIDTH - width - 4, placeholder=" …")
        lines.append(f"  {name:<{width}}  {text}")
    return "\n".join(lines)


def _lines(field: Field) -> Iterator[str]:
    yield f"{field.key}: {type_name(field.kind)}"
    if bounds := " and ".join(_bounds(field.kind)):
        yield f"  bounds:    {bounds}"
    yield f"  default:   {default_text(field).strip('`')}"
    for methods in _marks(field.kind, Methods):
        yield f"  for:       ttt.method {methods}; with another it is an error"
    yield f"  on resume: {_on_resume(field)}"
    yield ""
    yield from textwrap.wrap(field.doc, _WIDTH, initial_indent="  ", subsequent_indent="  ")


def _bounds(kind: Any) -> Iterator[str]:
    """Yield the bounds of a number, except those of float32."""
    for mark in _marks(kind, (Ge, Gt, Le, Lt)):
        (bound,) = dataclasses.astuple(mark)
        if abs(bound) < LARGEST:
            yield _BOUNDS[type(mark)].format(bound)


def _marks(kind: Any, wanted: Any) -> Iterator[Any]:
    """Yield the marks of a kind in a type, at any depth: of `Annotated[int, Ge(1)] | None` too."""
    yield from (each for each in getattr(kind, "__metadata__", ()) if isinstance(each, wanted))
    inner = (get_args(kind)[:1] if hasattr(kind, "__metadata__") else get_args(kind)) or ()
    for each in inner:
        if get_origin(each) is not None or hasattr(each, "__metadata__"):
            yield from _marks(each, wanted)


def _on_resume(field: Field) -> str:
    if field.change is Change.START:
        return "may be another: it says how the run is started"
    if field.change is Change.HARMLESS:
        return "may be another: no result changes"
    if field.change is Change.MEASURED:
        return "may be another: no weight changes, but what is measured or saved"
    if field.key.startswith("ttt.") and not may_change(field.name):
        return "must be the same: what was learned depends on it"
    return "another value is named in the log; one of another shape of the model is refused"
