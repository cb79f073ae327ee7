"""What docstrings and comments of `ttt` name as `module.name` or `Class.name` is there."""

import ast
import functools
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "ttt").rglob("*.py"))
DOTTED = re.compile(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(?!\.?\w)")
ELSEWHERE = {"moshi", "optim", "torch", "transformer"}
"""Other packages, options, and what a Moshi's weights are called."""


def defined(body: list[ast.stmt]) -> set[str]:
    """The names that statements of a module or class define."""
    names: set[str] = set()
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            names.add(statement.name)
        targets: list[Any] = getattr(statement, "targets", [getattr(statement, "target", None)])
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@functools.cache
def known() -> dict[str, set[str]]:
    """What each package, module and class of `ttt` has, by its own name; modules of one name
    together."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in FILES:
        *_, package, module = path.relative_to(ROOT).with_suffix("").parts
        tree = ast.parse(path.read_text())
        name = package if module == "__init__" else module
        found[name] |= defined(tree.body)
        if module == "__init__":
            imported = [x for x in tree.body if isinstance(x, ast.ImportFrom)]
            found[name] |= {alias.name for each in imported for alias in each.names}
            found[path.parent.parent.name].add(package)
        else:
            found[package].add(module)
        for each in ast.walk(tree):
            if isinstance(each, ast.ClassDef):
                found[each.name] |= defined(each.body)
    return found


def missing(text: str) -> list[str]:
    """The dotted names of a text that begin in `ttt`, or nowhere, and lead to nothing."""
    code = {x.id for x in ast.walk(ast.parse(text)) if isinstance(x, ast.Name)}
    code |= {x.arg for x in ast.walk(ast.parse(text)) if isinstance(x, ast.arg)}
    found = []
    for name in DOTTED.findall(text):
        head, *rest = name.split(".")
        is_option = head == "ttt" and len(rest) == 1
        is_file = rest[-1] in ("py", "safetensors")
        if head in known().keys() - code - ELSEWHERE:
            steps = zip([head, *rest], rest, strict=False)
            is_there = all(b in known()[a] for a, b in steps if a in known())
        else:
            # A variable, which the code has beside the text.
            is_there = head in code or head in ELSEWHERE
        is_there |= is_option or is_file
        if not is_there:
            found.append(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_texts_name_is_there(path: Path) -> None:
    assert missing(path.read_text()) == []


def test_names_that_lead_nowhere_are_noticed() -> None:
    text = '"""See `scan_kernels._line`, `kernels._lines`, `TTTLayer.backward`, `kernels._dot`."""'
    assert missing(text) == ["scan_kernels._line", "kernels._lines", "TTTLayer.backward"]
