"""A sweep's file as it is written: its sections, and what is wrong with their form.

base: example/demo.yaml       # any run's configuration
sweep_dir: runs/my_sweep      # one run folder for each run, and the table
overrides:                    # of the base, in all runs
  max_steps: 100
runs:
  small_chunks: {ttt.chunk_size: 10}
  large_chunks: {ttt.chunk_size: 50}
  longer:
    after: small_chunks       # starts from the last weights of that run
    duration_sec: 40
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.config import NULLS, Size, flatten, parse, read_yaml, require_configuration
from finetune.errors import UserError
from ttt.options import abbreviated

KEYS = ("base", "sweep_dir", "overrides", "runs", "processes", "slurm")
OWN_KEYS = {
    "run_dir": "each run has its own folder in sweep_dir",
    "resume": "a sweep always continues what was interrupted",
    "overwrite_run_dir": "--overwrite_run_dir on the command line replaces what was changed",
    "wandb.key": "a sweep's file is no place for secrets; use `wandb login` or WANDB_API_KEY",
}
"""What the sweep itself says of each run, and what would stand in a process list."""
TABLE = "table"
"""The sweep's own files of this name lie where each run has a file of its name."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


def read_content(file: Path) -> dict[str, Any]:
    """Return the sections of a sweep's file, as they are written.

    Raises:
        UserError: it cannot be read, or is no sweep's.
    """
    content = _sections(read_yaml(file))
    if "runs" not in content and content.keys() & {"data", "run_dir", "moshi_paths"}:
        raise UserError(
            f"{file} is the configuration of one run. A sweep's file names it as its `base`, and "
            "has `runs`: see docs/sweeps.md."
        )
    return content


def run_entries(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what the file says of each run, by dotted key, in an order in which they can run.

    An entry that is no mapping, and an `after` that is no text, are left out.
    """
    runs = content.get("runs")
    left = {
        name: flatten({k: v for k, v in entry.items() if k != "after" or isinstance(v, str)})
        for name, entry in (runs.items() if isinstance(runs, dict) else ())
        if isinstance(entry, dict)
    }
    ordered = {}
    while left:
        ready = (name for name, own in left.items() if own.get("after") not in left)
        first = next(ready, next(iter(left)))  # in a circle, whichever
        ordered[first] = left.pop(first)
    return ordered


def common_keys(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the file says of all runs, by dotted key."""
    overrides = content.get("overrides", {})
    return flatten(overrides) if isinstance(overrides, dict) else {}


def slurm_options(content: Mapping[str, Any]) -> dict[str, str]:
    """Return what the file says of its job array, by the name of sbatch's option."""
    options = content.get("slurm", {})
    return {k: str(v) for k, v in options.items()} if isinstance(options, dict) else {}


def num_processes(content: Mapping[str, Any]) -> int:
    """Return how many processes each run has; 1 where the file says nothing that can be."""
    try:
        return parse(content.get("processes", "1"), Size)
    except ValueError:
        return 1


def base_problem(content: Mapping[str, Any]) -> str:
    """Return why there is no configuration that the runs start from; nothing if there is one."""
    base = content.get("base")
    if not isinstance(base, str) or not base:
        return "base: missing; name the configuration that all runs start from"
    try:
        require_configuration(Path(base))
    except UserError as error:
        return f"base: {error}"
    return ""


def form_problems(content: Mapping[str, Any], from_command_line: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a file's form, and with what is said of all runs."""
    own = [f"overrides, {key}: {text}" for key, text in own_key_problems(common_keys(content))]
    own += [
        f"--{key}: {text}"
        for key, text in own_key_problems(from_command_line)
        if key != "wandb.key"  # which is handed on in the environment
    ]
    return [*_structure_problems(content), *_after_problems(content), *own]


def own_key_problems(keys: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the keys that cannot be set for a run, each with what is wrong."""
    for key in sorted(keys.keys() & OWN_KEYS):
        yield key, f"remove it: {OWN_KEYS[key]}"


def _sections(content: dict[str, Any]) -> dict[str, Any]:
    """Return a file's sections; nothing, or null, below a key is a section without keys."""
    filled = {
        key: {} if key in ("overrides", "runs", "slurm") and value in NULLS else value
        for key, value in content.items()
    }
    if isinstance(filled.get("runs"), dict):
        filled["runs"] = {k: {} if v in NULLS else v for k, v in filled["runs"].items()}
    return filled


def _structure_problems(content: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(content.keys() - set(KEYS)):
        close = difflib.get_close_matches(key[:100], KEYS, n=1)
        hint = f"did you mean {close[0]}?" if close else "a sweep has " + ", ".join(KEYS)
        yield f"{abbreviated(key)}: unknown key, {hint}"
    if not isinstance(content.get("sweep_dir"), str) or not content["sweep_dir"]:
        yield "sweep_dir: missing; name a folder"
    for key in ("overrides", "slurm"):
        if not isinstance(content.get(key, {}), dict):
            yield f"{key}: expected `key: value` lines below it"
    try:
        parse(content.get("processes", "1"), Size)
    except ValueError as error:
        yield f"processes: {error}"
    runs = content.get("runs")
    if not runs or not isinstance(runs, dict):
        yield "runs: there are none; name at least one, with what it changes below its name"
        return
    for name, entry in runs.items():
        if not _NAME.fullmatch(name):
            yield f"runs, {abbreviated(repr(name))}: a name is made of letters, digits, - and _"
        elif name.lower() == TABLE:
            yield f"runs, {name}: choose another name; {name}.json is the sweep's own table"
        if not isinstance(entry, dict):
            got = abbreviated(repr(entry))
            yield f"runs, {abbreviated(name)}: expected `key: value` lines below it, got {got}"
        elif not isinstance(entry.get("after"), str | None):
            got = abbreviated(repr(entry["after"]))
            yield f"{abbreviated(name)}, after: expected the name of a run, got {got}"


def _after_problems(content: Mapping[str, Any]) -> Iterator[str]:
    entries = run_entries(content)
    for name, own in entries.items():
        after = own.get("after")
        if after is not None and after not in content["runs"]:
            close = difflib.get_close_matches(after[:100], content["runs"], n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            yield f"{abbreviated(name)}, after: there is no run {abbreviated(repr(after))}.{hint}"
        elif after and "moshi_paths.init_from" in own:
            yield (
                f"{abbreviated(name)}, moshi_paths.init_from: `after: {abbreviated(after)}` says "
                "already what it starts from; keep one of the two"
            )
    reported: set[str] = set()
    for name in entries:
        way = [name]
        while (last := entries[way[-1]].get("after")) and last in entries and last not in way:
            way.append(last)
        if last == name and name not in reported:
            reported |= set(way)
            circle = " after ".join(map(abbreviated, [*way, name]))
            yield f"after: {circle}: they would wait for each other for ever"
