"""A sweep's file becomes the runs that it describes; every problem is named before the first.

What models and data are checked with is slow to import, and imported where they are.
"""

import functools
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from finetune.config import (
    Checked,
    TrainArgs,
    check_config,
    flatten,
    list_problems,
    missing_inputs,
)
from finetune.errors import UserError
from finetune.sweep.content import (
    OWN_KEYS,
    base_problem,
    common_keys,
    form_problems,
    num_processes,
    own_key_problems,
    read_content,
    run_entries,
    slurm_options,
)
from ttt.options import abbreviated

if TYPE_CHECKING:
    from finetune.data import Reading

logger = logging.getLogger(__name__)

# A line about each run that it is true of: name of the run, and what is so.
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

    def chains(self, only: Collection[str]) -> list[list[str]]:
        """The names of `only` in groups that do not wait for each other, each in the order to run
        in."""
        chain_of: dict[str, list[str]] = {}
        for name, run in self.runs.items():
            chain_of[name] = chain_of[run.after] if run.after else []
            chain_of[name].append(name)
        chains = {id(chain): chain for chain in chain_of.values()}.values()
        chosen = [[name for name in chain if name in only] for chain in chains]
        return [chain for chain in chosen if chain]


class Read(NamedTuple):
    """A sweep with all that is wrong with its file.

    problems: a line each, of the file or of runs.
    """

    sweep: Sweep
    problems: list[str]


def load_sweep(
    file: Path,
    overrides: Mapping[str, object] | None = None,
    folder: Path | None = None,
    *,
    with_inputs: bool = True,
) -> Sweep:
    """Read a sweep's file and check all its runs; see `read_sweep`.

    Raises:
        UserError: naming every problem of every run, as far as it can be known beforehand.
    """
    sweep, problems = read_sweep(file, overrides, folder, with_inputs=with_inputs)
    if problems:
        raise UserError(list_problems(file, problems))
    return sweep


def read_sweep(
    file: Path,
    overrides: Mapping[str, object] | None = None,
    folder: Path | None = None,
    *,
    with_inputs: bool = True,
    only_at_once: bool = False,
) -> Read:
    """Read a sweep's file and look for all that is wrong with its runs.

    Args:
        overrides: values by dotted key, for all runs, that replace the file's.
        folder: instead of the file's `sweep_dir`.
        with_inputs: models and data are looked for and checked as well, as is needed to run.
        only_at_once: they are looked for alone, and nothing is warned of.

    Raises:
        UserError: there is nothing that runs could be read from.
    """
    content = read_content(file)
    from_command_line = flatten(overrides or {})
    entries = run_entries(content)
    problems = form_problems(content, from_command_line)
    found = [
        (name, f"{key}: {text}")
        for name, own in entries.items()
        for key, text in own_key_problems(own)
    ]
    if no_base := base_problem(content):
        listed = [no_base, *problems, *grouped(found, len(entries))]
        raise UserError(list_problems(file, listed))
    base, target = Path(content["base"]), folder or Path(str(content.get("sweep_dir")))
    common = common_keys(content)
    runs: dict[str, PlannedRun] = {}
    left_out: list[_Found] = []
    # Whose configuration is not known, as something is wrong with it or with that of a run before.
    unsound: set[str] = set()
    missing: dict[str, set[str]] = {}
    for name, own in entries.items():
        after = own.pop("after", "")
        given = {key: text for key, text in (common | own).items() if key not in OWN_KEYS}
        given |= from_command_line | {"run_dir": str(target / name)}
        runs[name], checked = _configure(name, own, runs.get(after), given, base)
        if checked.problems or after in unsound:
            unsound.add(name)
        lacks = missing_inputs(checked, {"moshi_paths.init_from"} if after else ())
        missing[name] = {key for key, _ in lacks}
        shown = [*checked.problems, *(lacks if with_inputs else ())]
        found += [(name, f"{keys}: {text}") for keys, text in shown]
        left_out += [(name, text) for text in checked.left_out]
    if with_inputs and not only_at_once:
        found += _check_inputs(runs, unsound, missing)
    problems = [*problems, *grouped(found, len(runs))]
    for line in () if problems or only_at_once else grouped(left_out, len(runs)):
        logger.warning(line)
    sweep = Sweep(file, base, target, runs, num_processes(content), slurm_options(content))
    return Read(sweep, problems)


# --- the runs -------------------------------------------------------------------------------------


def _configure(
    name: str,
    own: dict[str, Any],
    earlier: PlannedRun | None,
    overrides: dict[str, Any],
    base: Path,
) -> tuple[PlannedRun, Checked]:
    """Return a run with its configuration, and what was found while that was checked."""
    first_step, problems = 0, []
    if earlier:
        before = earlier.args
        if not before.do_ckpt:
            problems.append(("after", f"{earlier.name} has do_ckpt: false, so it saves nothing"))
        first_step = earlier.first_step + before.max_steps
        last = earlier.run_dir / "checkpoints" / f"checkpoint_{before.max_steps:06d}"
        overrides["moshi_paths.init_from"] = str(last)
    checked = check_config(base, overrides)
    checked.problems[:0] = problems
    after = earlier.name if earlier else None
    return PlannedRun(name, own, after, overrides, checked.args, first_step), checked


def _check_inputs(
    runs: Mapping[str, PlannedRun], unsound: Collection[str], missing: Mapping[str, Collection[str]]
) -> list[_Found]:
    """Return what only shows in models and data, of the runs whose configuration is known.

    Args:
        missing: keys of each run whose files are not there, as is known already.
    """
    sound = [run for name, run in runs.items() if name not in unsound]
    without_files = {name for name, keys in missing.items() if any(map(_is_of_model, keys))}
    found = []
    for run in sound:
        if without_files.isdisjoint({run.name, run.after}):
            found += _check_model(run, runs)
    return found + _check_data(sound, missing)


def _is_of_model(key: str) -> bool:
    return key.startswith("moshi_paths.")


def _check_model(run: PlannedRun, runs: Mapping[str, PlannedRun]) -> list[_Found]:
    """Return what only shows when the model is built, or its files are looked for."""
    from finetune.model import changed_shape, find_checkpoint, misfits, model_shape, plan_model

    found = []
    try:
        info = find_checkpoint(run.args.moshi_paths, is_new_run=True)
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


class _Place(NamedTuple):
    """A place is what `load_sources` is told of one of a run's lists of data."""

    key: str
    spec: str
    num_frames: int
    on_error: Literal["raise", "skip"]
    reading: "Reading"
    beside: "_Place | None"


def _check_data(runs: Iterable[PlannedRun], missing: Mapping[str, Collection[str]]) -> list[_Found]:
    """Broken recordings and the like; data that are the same for several runs are read once."""
    from finetune.data import Reading, Recording, count_frames, load_sources

    said: set[str] = set()

    @functools.cache
    def read(place: _Place) -> tuple[Sequence[Recording], str]:
        """Return what it has, and what is wrong with it."""
        options = place._asdict()
        options["beside"] = () if place.beside is None else read(place.beside)[0]
        try:
            return load_sources(said=said, **options).recordings, ""
        except UserError as error:
            return (), str(error)

    found = []
    for run in runs:
        data, place = run.args.data, None
        used = {"data.train_data": data.train_data}
        if run.args.do_eval:
            used["data.eval_data"] = data.eval_data
        for key, spec in used.items():
            if key not in missing[run.name]:
                reading = Reading.of(data, training=key == "data.train_data")
                num_frames = count_frames(run.args.duration_sec)
                place = _Place(key, spec, num_frames, data.on_error, reading, place)
                found.append((run.name, read(place)[1]))
    return [(name, text) for name, text in found if text]


def by_text(found: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return what is so of runs, each with their names, which stand before it in `found`."""
    names: dict[str, list[str]] = {}
    for name, text in found:
        names.setdefault(text, []).append(name)
    return names


def grouped(found: Iterable[_Found], num_runs: int) -> Iterator[str]:
    """Return one line for what is so of several runs."""
    for text, having in by_text(found).items():
        names_shown = ", ".join(map(abbreviated, having))
        yield f"{'all runs' if len(having) == num_runs > 1 else names_shown}: {text}"
