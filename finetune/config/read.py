"""A YAML file and a command line become a `TrainArgs`; every problem is named at once."""

import dataclasses
import logging
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from finetune.config.args import TrainArgs
from finetune.config.checks import cross_checks
from finetune.config.config_files import require_configuration
from finetune.config.fields import Problem, fill, keys_that, suggestions
from finetune.config.must_exist import what_is_missing
from finetune.config.sources import resolved_sources
from finetune.config.values import NULLS
from finetune.errors import UserError
from finetune.kept import write_whole
from finetune.safety import decode_text, learn_from
from ttt.config import TTTArgs
from ttt.options import START, abbreviated

logger = logging.getLogger(__name__)


def load_config(
    path: str | Path,
    overrides: Mapping[str, object] | None = None,
    *,
    inputs_exist: bool = False,
    unread: Collection[str] = (),
) -> TrainArgs:
    """Read a run's configuration.

    Args:
        path: a YAML file.
        overrides: values by dotted key (`{"optim.lr": "1e-4"}`) that replace the file's.
        inputs_exist: the data and model files that it names must be there already.
        unread: keys of such files that are not read, and may not be there yet.

    Raises:
        UserError: naming every unknown key, wrong type, bad value and contradiction, and everything
            that must be there and is not.
    """
    checked = check_config(path, overrides)
    if inputs_exist:
        checked.problems.extend(missing_inputs(checked, unread))
    return _whole(path, checked, overrides)


def require_inputs(
    path: str | Path, args: TrainArgs, overrides: Mapping[str, object] | None = None
) -> None:
    """
    Raises:
        UserError: as `load_config` does of data and model files that are not there.
    """
    missing = missing_inputs(Checked(args, [], []))
    _whole(path, Checked(args, missing, []), overrides)


def load_run_config(path: str | Path, overrides: Mapping[str, object] | None = None) -> TrainArgs:
    """Load an `args.yaml` that a run has written, also before options were added or their defaults
    changed: it means what it meant then."""
    written = _of_its_time(flatten(_read_of_run(Path(path))))
    return _whole(path, _check(Path(path), written, overrides, is_of_a_run=True), overrides)


class Checked(NamedTuple):
    """Checked is a configuration with what was found in its reading.

    args: with defaults in the place of what is wrong.
    problems: what is wrong.
    left_out: sentences on keys of the file that the command line has made meaningless.
    """

    args: TrainArgs
    problems: list[Problem]
    left_out: list[str]


def _whole(path: str | Path, checked: Checked, overrides: Mapping[str, object] | None) -> TrainArgs:
    args, problems, left_out = checked
    for text in left_out:
        logger.warning(text)
    if problems:
        given = set(flatten(overrides or {}))
        if all(given >= set(keys.split(", ")) for keys, _ in problems):
            path, given = "the command line", set()
        lines = [f"{keys}: {text}{_origin(keys.split(', '), given)}" for keys, text in problems]
        raise UserError(list_problems(path, lines))
    return args


def _origin(keys: list[str], given: Collection[str]) -> str:
    """Return which of a problem's keys the command line had, where a file had the others."""
    there = [key for key in keys if key in given]
    if not there:
        return ""
    return " (on the command line)" if there == keys else f" ({', '.join(there)}: command line)"


def check_config(path: str | Path, overrides: Mapping[str, object] | None = None) -> Checked:
    """Load a configuration as `load_config` does, but hand back what is wrong, and what is to be
    warned of.

    Raises:
        UserError: the file cannot be read at all.
    """
    written = flatten(read_yaml(Path(path)))
    is_of_a_run = _is_of_a_run(written)
    written = _of_its_time(written) if is_of_a_run else written
    return _check(Path(path), written, overrides, is_of_a_run=is_of_a_run)


def missing_inputs(checked: Checked, unread: Collection[str] = ()) -> list[Problem]:
    """Return the keys of data and model files that are not there.

    Args:
        unread: keys of such files that are not read, and may not be there yet.
    """
    # Of a key that has a problem already, there is a default here.
    passed_over = {key for keys, _ in checked.problems for key in keys.split(", ")}.union(unread)
    if not checked.args.do_eval:
        passed_over.add("data.eval_data")
    return [
        (key, text.removeprefix(f"{key}: "))
        for key, text in what_is_missing(checked.args)
        if key not in passed_over
    ]


IGNORED = {"world_size"}
"""Keys that `moshi-finetune` writes into the args.yaml of a run, and that mean nothing here."""

ADDED_SINCE = {"chunk_edge", "keep_writes", "qk_conv_kernel_size", "num_heads", "target"}
"""Options of `ttt` that a run's own file may lack: it was written before there were such, or before
their defaults were today's."""


def _of_its_time(written: dict[str, Any]) -> dict[str, Any]:
    """Return what a run's own file says, in today's options, by dotted key.

    Before there was `chunk_edge`, all runs had what is `cut` now. Before there was
    `qk_conv_kernel_size`, no run of `linear` and `mlp` had a convolution, and all files held a
    gate_init, which was 0.1 where nobody had set it. Before there was `lr_scale`, all had what is
    `none` now, and a file held a number as learning_rate and a write rule also where nothing read
    them. The target was `text` where nobody had set it, and was written down also by runs of
    `linear` and `mlp`, which have none.
    """
    if "ttt.method" not in written:
        return written
    is_in_place = written["ttt.method"] == "in_place"
    unread, missing = set(), {}
    if "ttt.qk_conv_kernel_size" not in written:
        if is_in_place:
            unread.add("ttt.gate_init")
            missing["ttt.chunk_edge"] = "cut"
        else:
            missing |= {"ttt.gate_init": "0.1", "ttt.qk_conv_kernel_size": "1"}
    if "ttt.lr_scale" not in written:
        if is_in_place:
            missing["ttt.lr_scale"] = "none"
        if not is_in_place or written.get("ttt.write") == "delta":
            unread.add("ttt.learning_rate")
        if not is_in_place:
            unread.add("ttt.write")
    if is_in_place:
        missing["ttt.target"] = "text"
    else:
        unread.add("ttt.target")
    return missing | {key: text for key, text in written.items() if key not in unread}


def _is_of_a_run(written: dict[str, Any]) -> bool:
    """Return whether a file has all options of `ttt` of its time, as those have that a run
    writes."""
    names = {field.name for field in dataclasses.fields(TTTArgs)} - ADDED_SINCE
    return all(f"ttt.{name}" in written for name in names)


def _check(
    path: Path,
    written: dict[str, Any],
    overrides: Mapping[str, object] | None,
    *,
    is_of_a_run: bool,
) -> Checked:
    if written.keys() >= {"base", "sweep_dir"}:
        command = f"moshi-ttt sweep {shlex.quote(str(path))}"
        raise UserError(f"{path} is a sweep, not one run's configuration: {command}")
    from_command_line = flatten(overrides or {})
    learn_from(written)
    learn_from(from_command_line)
    emptied = tuple(f"{key}." for key, text in from_command_line.items() if text in NULLS)
    written = {
        key: text
        for key, text in written.items()
        if not key.startswith(emptied) and key not in IGNORED
    }
    args, problems = fill(TrainArgs, written | from_command_line)
    # A run writes down all options, also those that its method does not read.
    given = _set_in("ttt.", from_command_line if is_of_a_run else written | from_command_line)
    left_out: list[str] = []
    if from_command_line.keys() & {"ttt.method", "ttt.write"}:
        # The file is for another method: its options for that one do not stand in the way.
        foreign = {
            f"ttt.{name}" for name, _ in args.ttt.misplaced(given)
        } - from_command_line.keys()
        left_out = list(_cautions(sorted(foreign & written.keys()), path))
        written = {key: text for key, text in written.items() if key not in foreign}
        given -= {key.removeprefix("ttt.") for key in foreign}
        args, problems = fill(TrainArgs, written | from_command_line)

    # A default stands where a value was rejected: what follows from it alone is not the user's.
    settled = {each for key, _ in problems for each in (key, *suggestions(TrainArgs, key))}
    for keys, text in cross_checks(args, given):
        sections = {key.split(".")[0] for key in keys.split(", ")}
        if not settled & (sections | set(keys.split(", "))):
            problems.append((keys, text))
    return Checked(args, problems, left_out)


def _set_in(section: str, written: Mapping[str, Any]) -> set[str]:
    """Return the options of a section that are set, without its name: null sets nothing, but says
    that an option is left out."""
    return {
        key.removeprefix(section)
        for key, text in written.items()
        if key.startswith(section) and text not in NULLS
    }


def _cautions(left_out: Iterable[str], path: Path) -> Iterator[str]:
    for key in left_out:
        yield f"{key} of {path} is left out: it is not for this method"


def list_problems(path: str | Path, problems: Iterable[str]) -> str:
    """Return what a user is told of a file (or whatever else) with problems, a line each."""
    lines = [f"  - {problem}" for problem in problems]
    count = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
    return "\n".join([f"{path} has {count}:", *lines])


def public_dict(args: TrainArgs) -> dict[str, Any]:
    """`args` as nested dictionaries without secrets, for files and loggers.

    The paths of the base are absolute there: a checkpoint is used from any folder.
    """
    public = dataclasses.asdict(args)
    del public["wandb"]["key"]
    for key, path in args.moshi_paths.on_this_machine():
        public["moshi_paths"][key] = str(Path(path).absolute())
    return public


def changed_keys(path: Path, args: TrainArgs) -> dict[str, tuple[str, str]]:
    """Return what differs in `args` from the configuration in `path`: old and new value by dotted
    key.

    Keys that say how a run is started, not what it is, are left out, and data that are named by
    another path to the same place.
    """
    old, new = (flatten(public_dict(each)) for each in (load_run_config(path), args))
    return {
        key: (str(old.get(key)), str(new.get(key)))
        for key in sorted(old.keys() | new.keys())
        if _meant(key, old.get(key)) != _meant(key, new.get(key))
        and key not in keys_that(TrainArgs, START)
    }


def _meant(key: str, value: Any) -> Any:
    is_data = value is not None and key in ("data.train_data", "data.eval_data")
    return resolved_sources(value, key) if is_data else value


def save_config(args: TrainArgs, path: str | Path) -> None:
    """Write `args` as YAML, without secrets; `load_config` reads it back.

    Raises:
        UserError: the file cannot be written.
    """
    text = yaml.safe_dump(public_dict(args), sort_keys=False, allow_unicode=True)
    write_whole(Path(path), text)


# --- reading --------------------------------------------------------------------------------------


class _Loader(yaml.BaseLoader):
    """Leaves scalars as text: the field's type decides what they mean, so `1e-3` is a number where
    a number is wanted. A key that appears twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {abbreviated(repr(key))} appears twice; keep one of them",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The file's mapping, its values as they are written.

    Raises:
        UserError: no such file, not YAML, a key twice, or no mapping.
    """
    content = _parsed(path, _bytes_of(path))
    if not isinstance(content, dict):
        found = "is empty" if content is None else "holds no `key: value` lines"
        raise UserError(
            f"{path} {found}. A configuration names at least `run_dir` and `data.train_data`; "
            "start from a file in example/."
        )
    return content


def _read_of_run(path: Path) -> dict[str, Any]:
    """Read what a run has written, whose reader cannot mend it.

    Raises:
        UserError: no such file, or it is damaged.
    """
    content = _bytes_of(path)
    try:
        found, problem = _parsed(path, content), f"{path} holds no configuration."
    except UserError as error:
        found, problem = None, str(error)
    if not isinstance(found, dict):
        raise UserError(
            f"{problem} A run has written this file as a whole, so it is damaged: copy its folder "
            "again, or use another checkpoint."
        )
    return found


def _bytes_of(path: Path) -> bytes:
    require_configuration(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read the configuration {path}: {error.strerror}.") from error


def _parsed(path: Path, content: bytes) -> Any:
    try:
        text = decode_text(content)
    except ValueError as error:
        raise UserError(f"{path} is no text: {error}. Is it a YAML file?") from error
    try:
        found = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        # The offending line itself is not shown: it may hold a secret.
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        context = f" ({error.context})" if error.context else ""
        raise UserError(f"{path}{place}: not valid YAML: {error.problem}{context}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise UserError(f"{path}: its keys and lists are nested too deeply.") from error
    _require_few_values(path, found)
    return found


def _require_few_values(path: Path, content: Any, most: int = 10_000) -> None:
    """Refuse a file that aliases make endless."""
    count, left = 0, [content]
    while left:
        value, count = left.pop(), count + 1
        if count > most:
            raise UserError(f"{path} holds more than {most} values; it is no configuration.")
        if isinstance(value, dict | list):
            left += value.values() if isinstance(value, dict) else value


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim": {"lr": 1}}` becomes `{"optim.lr": "1"}`; values as they are written in YAML."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple | set):
            flat[f"{prefix}{name}"] = value
        else:
            text = "null" if value is None else str(value)
            flat[f"{prefix}{name}"] = text.lower() if isinstance(value, bool) else text
    return flat
