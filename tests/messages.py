"""The messages that the source can show a user, as templates: `…` stands for what varies."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
SHOWING = {
    **dict.fromkeys(["UserError", "FileProblem", "RecordingError", "Finding", "ValueError"], 0),
    **dict.fromkeys(["warn", "warning", "error", "critical", "Malformed"], 0),
    **dict.fromkeys(["OSError", "FileExistsError"], 0),
    **dict.fromkeys(["damaged", "damage_of"], 0),
    "CutOff": 1,
    "_say_once": 2,
    "Alarm": 1,
}
"""Calls that show one of their arguments, and which; answers of aiohttp show `text`."""
EXPLAINING = re.compile("problem|explain|reason|unread|caution|refusal|alarm")
"""In the name of a function whose texts are shown by another."""
KEYED = re.compile(r"Problem|tuple\[str, str\]")
"""In the type of what a function returns: keys of a configuration, each with what is wrong."""


class Message(NamedTuple):
    place: str
    template: str


def messages() -> Iterator[Message]:
    """Yield every message whose words stand in the source."""
    for root in ("finetune", "ttt"):
        for path in sorted((ROOT / root).rglob("*.py")):
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            texts = _assigned(nodes)
            for node in _shown(nodes):
                for each in texts.get(_name(node), [node]):
                    template = _template(each)
                    if re.search(r"[a-z]{3}", template):
                        yield Message(f"{path.relative_to(ROOT)}:{each.lineno}", template)


def _shown(nodes: list[ast.AST]) -> Iterator[ast.expr]:
    node: Any
    for node in nodes:
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else _name(node.func)
            if name in SHOWING and len(node.args) > SHOWING[name]:
                yield node.args[SHOWING[name]]
                yield from (each.value for each in node.keywords if each.arg == "code")
            elif _is_append(node, to="warnings"):
                yield node.args[0]
            elif name.startswith("HTTP"):
                yield from (each.value for each in node.keywords if each.arg == "text")
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            options = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            yield from (default for arg, default in options if arg.arg == "code" and default)
            is_keyed = bool(KEYED.search(ast.unparse(node.returns)))
            if EXPLAINING.search(node.name) or is_keyed:
                yield from _texts_of(node, is_keyed)


def _texts_of(function: ast.FunctionDef, is_keyed: bool) -> Iterator[ast.expr]:
    """Yield what a function returns, yields or collects: texts, or texts behind their keys."""
    node: Any
    for node in ast.walk(function):
        if isinstance(node, ast.Tuple) and len(node.elts) == 2:
            if is_keyed and isinstance(node.ctx, ast.Load) and _is_text(node.elts[1]):
                yield node.elts[1]
        elif isinstance(node, ast.Return | ast.Yield) and node.value is not None:
            if _is_text(node.value) or _name(node.value):
                yield node.value
        elif _is_append(node) and _is_text(node.args[0]):
            yield node.args[0]


def _is_append(node: Any, to: str = "") -> bool:
    function = getattr(node, "func", None)
    is_append = getattr(function, "attr", "") == "append"
    return is_append and (not to or _name(node.func.value) == to)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr | ast.BinOp) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
    )


def _assigned(nodes: list[ast.AST]) -> dict[str, list[ast.expr]]:
    """Return the texts that a file gives names to."""
    found: dict[str, list[ast.expr]] = {}
    for node in nodes:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and _is_text(node.value):
            found.setdefault(_name(node.targets[0]), []).append(node.value)
    found.pop("", None)
    return found


def _name(node: ast.expr) -> str:
    """Return the name that an expression is, or fills in with `format`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return _name(node.func.value) if node.func.attr == "format" else ""
    return node.id if isinstance(node, ast.Name) else ""


def _template(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = re.sub(r"%[\d.]*[sdrf]|\{[^{}]*\}", "…", node.value)
    elif isinstance(node, ast.JoinedStr):
        text = "".join(
            str(each.value) if isinstance(each, ast.Constant) else "…" for each in node.values
        )
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        text = _template(node.left) + _template(node.right)
    else:
        text = "…"
    return re.sub(r"…+", "…", " ".join(text.split()))
