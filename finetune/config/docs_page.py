"""Pages made from the dataclasses: the configuration's, its JSON schema, and help of commands."""

import json
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import TypeAdapter

from finetune.config.args import TrainArgs
from finetune.config.fields import Field, all_fields, complete, fields_of
from finetune.config.options import is_positional
from finetune.config.values import members

COMMAND = "make docs"

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
    """Return the text of docs/configuration.md."""
    return "\n".join([_INTRO, "## Top level", "", *_section(TrainArgs)])


def _section(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield the table of one section, then the sections inside it."""
    yield "| key | type | default | meaning |"
    yield "| --- | --- | --- | --- |"
    fields = fields_of(cls, prefix)
    for field in fields:
        text = field.doc.replace("|", "\\|")
        if field.section:
            yield f"| `{field.name}` | section | see [below](#{field.name}) | {text} |"
        else:
            kind = type_name(field.kind).replace("|", "\\|")
            yield f"| `{field.name}` | {kind} | {default_text(field)} | {text} |"
    yield ""
    for field in fields:
        if field.section:
            yield from [f"## `{field.name}`", "", field.doc, ""]
            yield from _section(field.section, field.prefix)


def type_name(kind: Any) -> str:
    """Return what a value may be, for a table."""
    names = {bool: "true, false", int: "whole number", float: "number", str: "text", Path: "path"}
    found = []
    for each in members(kind):
        if get_origin(each) is list:
            found.append("list of whole numbers")
        elif get_origin(each) is tuple:
            found.append(f"some of {type_name(get_args(each)[0])}, with commas between them")
        elif get_args(each):
            found += [f"`{word}`" for word in get_args(each)]
        else:
            found.append(names.get(each, "null"))
    return ", ".join(found)


def default_text(field: Field) -> str:
    """Return a field's default, for a table."""
    if field.default is MISSING:
        return "required"
    if isinstance(field.default, tuple):
        return f"`{','.join(map(str, field.default))}`"
    if isinstance(field.default, str | Path):
        return f"`{field.default}`" if str(field.default) else "empty"
    if field.is_asked:
        return "asked for"
    return "null" if field.default is None else str(field.default).lower()


def configuration_schema() -> str:
    """Return the text of docs/config.schema.json, from which editors complete and check keys."""
    schema = TypeAdapter(TrainArgs).json_schema()
    sections = {
        each.section.__name__: each.section for each in all_fields(TrainArgs) if each.section
    }
    for name, part in [("TrainArgs", schema), *schema["$defs"].items()]:
        docs = {field.name: field.doc for field in fields_of(sections.get(name, TrainArgs))}
        part["additionalProperties"] = False
        part["patternProperties"] = {r"\.": {}}  # dotted names, in which any key may be given
        for key, value in part["properties"].items():
            value["description"] = docs[key]
            if "$ref" in value:
                value["anyOf"] = [{"$ref": value.pop("$ref")}, {"type": "null"}]
    return json.dumps(schema, indent=1) + "\n"


# --- commands -------------------------------------------------------------------------------------

_COMMANDS_INTRO = f"""\
<!-- Generated from the dataclasses of the commands' options. Do not edit: change the text there,
then run `{COMMAND}` -->

# Commands

`moshi-ttt COMMAND --OPTION=VALUE ...`; `train.py` is `moshi-ttt train`. Options are read as a
configuration's keys are, and every mistake in them is named before anything is loaded. A word in
capitals behind the command stands for a value that needs no name, and in brackets it may be left
out: `moshi-ttt train run.yaml` is `moshi-ttt train --config=run.yaml`. Where "--KEY=VALUE" is
written, all keys of [configuration.md](configuration.md) are options too, by their dotted
names. `moshi-ttt help COMMAND` is `moshi-ttt COMMAND --help`, and `moshi-ttt --version` says which
version this is.
"""


def commands_page(commands: Mapping[str, Callable[..., Any]]) -> str:
    """Return the text of docs/commands.md."""
    lines = [_COMMANDS_INTRO]
    for name, command in commands.items():
        lines += [f"## {name}", "", _text(command), "", *_usage(name, command), ""]
        lines += ["| option | type | default | meaning |", "| --- | --- | --- | --- |"]
        for field in _options(command):
            kind, default = type_name(field.given_kind), default_text(field)
            lines.append(f"| {_names(field)} | {kind} | {default} | {field.doc} |")
        lines.append("")
    return "\n".join(lines)


def help_page(name: str, command: Callable[..., Any]) -> str:
    """Return what `moshi-ttt NAME --help` shows."""
    lines = [*_usage(name, command), "", _text(command), ""]
    for field in _options(command):
        lines.append(f"  {_names(field).replace('`', '')}   ({default_text(field).strip('`')})")
        lines += textwrap.wrap(
            f"{field.doc} [{type_name(field.given_kind)}]",
            96,
            initial_indent=" " * 6,
            subsequent_indent=" " * 6,
        )
    return "\n".join(lines)


def _text(command: Callable[..., Any]) -> str:
    return textwrap.dedent(f"    {command.__doc__}").strip()


def _options(command: Any) -> list[Field]:
    return [field for field in all_fields(complete(command.options)) if not field.section]


def _names(field: Field) -> str:
    """Return how an option is given: by its name, or also by its place."""
    place = f"`{field.key.upper()}`, " if is_positional(field) else ""
    return f"{place}`--{field.key}`"


def _usage(name: str, command: Any) -> list[str]:
    needed = ""
    for field in _options(command):
        if is_positional(field):
            place = field.key.upper()
            needed += f" {place}" if field.is_required else f" [{place}]"
        elif field.is_required:
            needed += f" --{field.key}=..."
    keys = " [--KEY=VALUE ...]" if command.with_overrides else ""
    program = name if name.endswith(".py") else f"moshi-ttt {name}"
    return [f"    {program}{needed} [--OPTION=VALUE ...]{keys}"]


def pages(commands: Mapping[str, Callable[..., Any]]) -> dict[str, str]:
    """Return the generated files of `docs/` by name."""
    return {
        "configuration.md": configuration_page(),
        "commands.md": commands_page(commands),
        "config.schema.json": configuration_schema(),
    }
