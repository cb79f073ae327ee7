"""Texts of a data set's files, and of what is wrong with them."""

import json
from collections.abc import Iterable
from typing import Any


def json_lines(values: Iterable[Any]) -> str:
    """Return the text of a JSONL file."""
    return "".join(f"{json.dumps(value, ensure_ascii=False)}\n" for value in values)


def listed(problems: Iterable[str], most: int = 20) -> str:
    """Return how many problems there are, and the first of them, a line each."""
    lines = list(problems)
    more = [f"… and {len(lines) - most} more"] if len(lines) > most else []
    return "\n  - ".join([f"{len(lines)}:", *lines[:most], *more])
