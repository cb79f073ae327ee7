"""Lines of JSON that users write: what one holds, or what exactly is wrong with it."""

import difflib
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

from finetune.safety import parse_json
from ttt.options import abbreviated

Kind = Literal["text", "a number"]


def parse_line(
    text: str, required: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None
) -> dict[str, Any]:
    """Return what a line holds, also keys that are not asked for.

    Args:
        required: what each key must be.
        optional: the same of keys that may be absent or null.

    Raises:
        ValueError: it is no JSON object, or keys are missing or of another kind; all are named.
    """
    try:
        fields = parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON, column {error.colno}: {error.msg}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{_short(fields)} is no object in braces")
    problems = [_missing(key, fields, required) for key in required if key not in fields]
    kinds = {**required, **(optional or {})}
    for key, kind in kinds.items():
        if key in fields and not (key not in required and fields[key] is None):
            problems += _kind_problem(key, fields[key], kind)
    if problems:
        raise ValueError(", ".join(problems))
    return fields


def _missing(key: str, fields: Mapping[str, Any], required: Mapping[str, Kind]) -> str:
    foreign = {name.lower(): name for name in fields if name not in required}
    if close := difflib.get_close_matches(key, foreign, n=1):
        return f"unknown key `{abbreviated(foreign[close[0]])}`, did you mean `{key}`?"
    return f"`{key}` is missing"


def _kind_problem(key: str, value: Any, kind: Kind) -> list[str]:
    is_right = isinstance(value, str) if kind == "text" else type(value) in (int, float)
    if is_right and kind == "a number" and not _is_finite(value):
        return [f"`{key}` is {_short(value)}, and must be a finite number"]
    return [] if is_right else [f"`{key}` is {_short(value)}, and must be {kind}"]


def _is_finite(number: float) -> bool:
    """Python's JSON has NaN and Infinity, and whole numbers beyond all floats."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def _short(value: Any) -> str:
    return abbreviated(json.dumps(value, ensure_ascii=False))
