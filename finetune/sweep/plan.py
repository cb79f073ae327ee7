"""A sweep's file becomes the runs that it describes; every problem is named before the first.

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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.config import (
    NULLS,
    Size,
    TrainArgs,
    check_config,
    flatten,
    list_problems,
    parse,
    read_yaml,
)
from finetune.data import Reading, count_frames, load_sources
from finetune.errors import UserError
from finetune.model import changed_shape, find_checkpoint, misfits, model_shape, plan_model
from ttt.options import abbreviated

KEYS = ("base", "sweep_dir", "overrides", "runs", "processes", "slurm")
# What the sweep itself says of each run, and what would stand in a process list.
_OWN_KEYS = {
    "run_dir": "each run has its own folder in sweep_dir",
    "resume": "a sweep always continues what was interrupted",
    "overwrite_run_dir": "--overwrite_run_dir on the command line replaces what was changed",
    "wandb.key": "a sweep's file is no place for secrets; use `wandb login` or WANDB_API_KEY",
}
TABLE = "table"
"""The sweep's own files of this name lie where each run has a file of its name."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")

# A line about each run that has the problem: name of the run, and what is wrong.
_Found = tuple[str, str]


def option(key: str, value: Any) -> str:
    """Return a key with its value as they stand on a command line, where a list has commas."""
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"{key}={text}"


@dataclass(frozen=True)
class PlannedRun:
    """A planned run is one run of a sweep.

    own: what its entry in the file says, by dotted key, without `after`; texts, or lists.
    after: the run whose last weights it starts from.
    overrides: all that is not as in the base, for the command line.
    args: the configuration that follows.
    first_step: steps that the runs before it in the chain of `after` have taken.
    """

    name: str
    own: dict[str, Any]
    after: str | None
    overrides: dict[str, Any]
    args: TrainArgs
    first_step: int

    @property
    def run_dir(self) -> Path:
        return Path(self.args.run_dir)


@dataclass(frozen=True)
class Sweep:
    """Content of a sweep's file; `runs` by name, each after the one that it starts from."""

    file: Path
    base: Path
    folder: Path
    runs: dict[str, PlannedRun]
    processes: int
    slurm: dict[str, str]

    def chains(self) -> list[list[str]]:
        """The names in groups that do not wait for each other, each in the order to run in."""
        chain_of: dict[str, list[str]] = {}
        for name, run in self.runs.items():
            chain_of[name] = chain_of[run.after] if run.after else []
            chain_of[name].append(name)
        return list({id(chain): chain for chain in chain_of.values()}.values())


def load_sweep(
    file: Path, overrides: Mapping[str, object] | None = None, folder: Path | None = None
) -> Sweep:
    """Read a sweep's file and check all its runs.

    Args:
        overrides: values by dotted key, for all runs, that replace the file's.
        folder: instead of the file's `sweep_dir`.

    Raises:
        UserError: naming every problem of every run, as far as it can be known beforehand.
    """
    content = _sections(read_yaml(file))
    entries = _read(file, content)
    base, target = Path(content["base"]), folder or Path(content["sweep_dir"])
    common, from_command_line = flatten(content.get("overrides", {})), flatten(overrides or {})
    runs: dict[str, PlannedRun] = {}
    found: list[_Found] = []
    for name, own in entries.items():
        run_dir = {"run_dir": str(target / name)}
        after = own.pop("after", None)
        earlier = runs[after] if after else None
        given = common | own | from_command_line | run_dir
        runs[name], problems = _configure(name, own, earlier, given, base)
        found += [(name, problem) for problem in problems]
    if not found:
        found = [problem for run in runs.values() for problem in _check_model(run, runs)]
        found += _check_data(runs.values())
    if found:
        raise UserError(list_problems(file, _grouped(found, len(runs))))
    slurm = {key: str(value) for key, value in content.get("slurm", {}).items()}
    return Sweep(file, base, target, runs, parse(content.get("processes", "1"), Size), slurm)


# --- the file -------------------------------------------------------------------------------------


def _read(file: Path, content: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return what the file says of each run, by dotted key, in an order in which they can run."""
    if "runs" not in content and content.keys() & {"data", "run_dir", "moshi_paths"}:
        raise UserError(
            f"{file} is the configuration of one run. A sweep's file names it as its `base`, and "
            "has `runs`: see docs/sweeps.md."
        )
    problems = list(_structure_problems(content))
    entries: dict[str, dict[str, str]] = {}
    if not problems:
        entries = {name: flatten(entry) for name, entry in content["runs"].items()}
        problems = list(_after_problems(entries))
    if problems:
        raise UserError(list_problems(file, problems))
    ordered: dict[str, dict[str, str]] = {}
    while len(ordered) < len(entries):
        ready = (n for n in entries if n not in ordered and _after(entries, n) in (None, *ordered))
        first = next(ready)
        ordered[first] = entries[first]
    return ordered


def _after(entries: Mapping[str, Mapping[str, str]], name: str) -> str | None:
    return entries[name].get("after")


def _sections(content: dict[str, Any]) -> dict[str, Any]:
    """Return a run's sections; nothing, or null, below a key is a section without keys."""
    filled = {
        key: {} if key in ("overrides", "runs", "slurm") and value in NULLS else value
        for key, value in content.items()
    }
    if isinstance(filled.get("runs"), dict):
        filled["runs"] = {k: {} if v in NULLS else v for k, v in filled["runs"].items()}
    return filled


def _structure_problems(content: dict[str, Any]) -> Iterator[str]:
    for key in sorted(content.keys() - set(KEYS)):
        close = difflib.get_close_matches(key[:100], KEYS, n=1)
        hint = f"did you mean {close[0]}?" if close else "a sweep has " + ", ".join(KEYS)
        yield f"{abbreviated(key)}: unknown key, {hint}"
    for key in ("base", "sweep_dir"):
        if not isinstance(content.get(key), str) or not content[key]:
            what = "the configuration that all runs start from" if key == "base" else "a folder"
            yield f"{key}: missing; name {what}"
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
    for where, section in (("overrides", content.get("overrides")), *runs.items()):
        for key in flatten(section).keys() & _OWN_KEYS if isinstance(section, dict) else ():
            yield f"{abbreviated(where)}, {key}: remove it: {_OWN_KEYS[key]}"


def _after_problems(entries: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    for name, own in entries.items():
        after = own.get("after")
        if after is not None and after not in entries:
            close = difflib.get_close_matches(after[:100], entries, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            yield f"{name}, after: there is no run {abbreviated(repr(after))}.{hint}"
        elif after and "moshi_paths.init_from" in own:
            yield (
                f"{name}, moshi_paths.init_from: `after: {after}` says already what it starts "
                "from; keep one of the two"
            )
    reported: set[str] = set()
    for name in entries:
        way = [name]
        while (last := _after(entries, way[-1])) and last in entries and last not in way:
            way.append(last)
        if last == name and name not in reported:
            reported |= set(way)
            yield f"after: {' after '.join([*way, name])}: they would wait for each other for ever"


# --- the runs -------------------------------------------------------------------------------------


def _configure(
    name: str,
    own: dict[str, str],
    earlier: PlannedRun | None,
    overrides: dict[str, str],
    base: Path,
) -> tuple[PlannedRun, list[str]]:
    """A run with its configuration, and what is wrong with that."""
    found, first_step = [], 0
    if earlier:
        before = earlier.args
        if not before.do_ckpt:
            found.append(f"after: {earlier.name} has do_ckpt: false, so it saves nothing")
        first_step = earlier.first_step + before.max_steps
        last = earlier.run_dir / "checkpoints" / f"checkpoint_{before.max_steps:06d}"
        overrides["moshi_paths.init_from"] = str(last)
    args, problems = check_config(base, overrides)
    run = PlannedRun(name, own, earlier.name if earlier else None, overrides, args, first_step)
    return run, found + [f"{keys}: {text}" for keys, text in problems]


def _check_model(run: PlannedRun, runs: Mapping[str, PlannedRun]) -> list[_Found]:
    """Return what only shows when the model is built, or its files are looked for."""
    found = []
    try:
        info = find_checkpoint(run.args.moshi_paths)
        plan_model(run.args, info)
        if run.after:
            earlier = runs[run.after].args
            before = find_checkpoint(earlier.moshi_paths)
            shapes = [
                changed_shape(model_shape(each), args.model)
                for each, args in ((info, run.args), (before, earlier))
            ]
            found += [
                f"after {run.after}: {keys}: {text}"
                for keys, text in misfits(run.args, shapes[0], earlier, shapes[1])
            ]
    except UserError as error:
        found.append(str(error))
    return [(run.name, text) for text in found]


def _check_data(runs: Iterable[PlannedRun]) -> list[_Found]:
    """Broken recordings and the like; data that several runs share are read once."""
    users: dict[tuple[str, str, int, Literal["raise", "skip"], Reading], list[str]] = {}
    for run in runs:
        data, num_frames = run.args.data, count_frames(run.args.duration_sec)
        used = {"data.train_data": data.train_data}
        if run.args.do_eval:
            used["data.eval_data"] = data.eval_data
        for key, spec in used.items():
            reading = Reading.of(data, training=key == "data.train_data")
            place = (key, spec, num_frames, data.on_error, reading)
            users.setdefault(place, []).append(run.name)
    found = []
    for (key, spec, num_frames, on_error, reading), names in users.items():
        try:
            load_sources(spec, key=key, num_frames=num_frames, on_error=on_error, reading=reading)
        except UserError as error:
            found += [(name, str(error)) for name in names]
    return found


def _grouped(found: Iterable[_Found], num_runs: int) -> Iterator[str]:
    """Return one line for what is wrong in the same way with several runs."""
    names: dict[str, list[str]] = {}
    for name, text in found:
        names.setdefault(text, []).append(name)
    for text, having in names.items():
        where = "all runs" if len(having) == num_runs > 1 else ", ".join(having)
        yield f"{where}: {text}"
