"""Makes docs/configuration.md from the dataclasses: `python -m finetune.config.docs_page`."""

import ast
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, get_type_hints

from finetune.config.args import TrainArgs

COMMAND = "python -m finetune.config.docs_page > docs/configuration.md"

_INTRO = f"""\
<!-- Generated from the dataclasses in finetune/config/args.py, finetune/config/data_args.py and
ttt/config.py. Do not edit: change the text there, then run `{COMMAND}` -->

# Configuration

A run is described by one YAML file; start from one in [`example/`](../example). Every key can be
replaced on the command line by its dotted name:

    torchrun --nproc-per-node 8 train.py --config my.yaml --optim.lr=1e-5 --ttt.chunk_size=128

All keys of `moshi-finetune` are here and mean the same. Before anything is loaded, the whole
configuration is checked: unknown keys, wrong types, values out of range and contradictions are
reported together, each by its dotted name and with a remedy.

- The type of a key decides how its value is read: `1e-3` and `.5` are numbers, with or without
  quotes; `yes`, `on` and `true` are the same.
- `null`, or nothing after the colon, means "not set" where the type allows null. A section that is
  null or absent has its defaults.
- Relative paths start from the folder in which the command runs.
- The configuration is saved to `args.yaml` in the run folder, complete with defaults and without
  `wandb.key`.
"""


def configuration_page() -> str:
    """The text of docs/configuration.md."""
    return "\n".join([_INTRO, "## Top level", "", *_section(TrainArgs)])


def field_docs(cls: type) -> dict[str, str]:
    """The string literal below each field of a dataclass, as one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(ast.Constant(str(text))):
                docs[name] = " ".join(text.split())
    return docs


def _section(cls: Any) -> Iterator[str]:
    """The table of one section, then the sections inside it."""
    types, docs = get_type_hints(cls), field_docs(cls)
    yield "| key | type | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for field in dataclasses.fields(cls):
        text = docs[field.name].replace("|", "\\|")
        if dataclasses.is_dataclass(types[field.name]):
            yield f"| `{field.name}` | section | see [below](#{field.name}) | {text} |"
        else:
            kind = _type_name(types[field.name]).replace("|", "\\|")
            yield f"| `{field.name}` | {kind} | {_default(field)} | {text} |"
    yield ""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(types[field.name]):
            yield from [f"## `{field.name}`", "", docs[field.name], ""]
            yield from _section(types[field.name])


def _type_name(kind: Any) -> str:
    if kind == list[int]:
        return "list of whole numbers"
    if isinstance(kind, type):
        names = {bool: "true, false", int: "whole number", float: "number", str: "text"}
        return names.get(kind, "null")
    options = kind.__args__
    return ", ".join(
        f"`{option}`" if isinstance(option, str) else _type_name(option) for option in options
    )


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    if isinstance(field.default, str):
        return f"`{field.default}`" if field.default else "empty"
    if field.default is None:
        return "null"
    return str(field.default).lower()


if __name__ == "__main__":
    sys.stdout.write(configuration_page())
