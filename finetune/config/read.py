"""From a YAML file and command line to a `TrainArgs`, with every problem named at once."""

import dataclasses
import difflib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from finetune.config.args import TrainArgs
from finetune.config.checks import Problem, cross_checks
from finetune.errors import UserError
from finetune.safety import learn_from
from ttt.config import TTTArgs

logger = logging.getLogger(__name__)

NULLS = ("", "~", "null", "Null", "NULL", "None")
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    NoneType: "null",
}


def load_config(path: str | Path, overrides: Mapping[str, object] | None = None) -> TrainArgs:
    """Read a run's configuration.

    Args:
        path: a YAML file.
        overrides: values by dotted key (`{"optim.lr": "1e-4"}`) that replace the file's.

    Raises:
        UserError: naming every unknown key, wrong type, bad value and contradiction.
    """
    return _whole(path, check_config(path, overrides), overrides)


def load_run_config(path: str | Path, overrides: Mapping[str, object] | None = None) -> TrainArgs:
    """As `load_config`, for an `args.yaml` that a run has written, also before options were added
    or their defaults changed: it means what it meant then."""
    written = _of_its_time(flatten(read_yaml(Path(path))))
    return _whole(path, _check(Path(path), written, overrides), overrides)


def _whole(
    path: str | Path,
    checked: tuple[TrainArgs, list[Problem]],
    overrides: Mapping[str, object] | None,
) -> TrainArgs:
    args, problems = checked
    if problems:
        origin = dict.fromkeys(flatten(overrides or {}), " (on the command line)")
        lines = (f"{keys}: {text}{origin.get(keys, '')}" for keys, text in problems)
        raise UserError(list_problems(path, lines))
    return args


def check_config(
    path: str | Path, overrides: Mapping[str, object] | None = None
) -> tuple[TrainArgs, list[Problem]]:
    """As `load_config`, but what is wrong is handed back; defaults stand where it is.

    Raises:
        UserError: the file cannot be read at all.
    """
    written = flatten(read_yaml(Path(path)))
    return _check(
        Path(path), _of_its_time(written) if _is_of_a_run(written) else written, overrides
    )


ADDED_SINCE = {"chunk_edge", "qk_conv_kernel_size", "num_heads"}
"""Options of `ttt` that a run's own file may lack: it was written before there were such."""


def _of_its_time(written: dict[str, Any]) -> dict[str, Any]:
    """Return what a run's own file says, in today's options, by dotted key.

    Before there was `chunk_edge`, all runs had what is `cut` now. Before there was
    `qk_conv_kernel_size`, no run of `linear` and `mlp` had a convolution, and all files held a
    gate_init, which was 0.1 where nobody had set it. Before there was `lr_scale`, all had what is
    `none` now, and a file held a number as learning_rate and a write rule also where nothing read
    them.
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
    return missing | {key: text for key, text in written.items() if key not in unread}


def _is_of_a_run(written: dict[str, Any]) -> bool:
    """Whether a file has all options of `ttt` of its time, as those have that a run writes."""
    names = {field.name for field in dataclasses.fields(TTTArgs)} - ADDED_SINCE
    return all(f"ttt.{name}" in written for name in names)


def _check(
    path: Path, written: dict[str, Any], overrides: Mapping[str, object] | None
) -> tuple[TrainArgs, list[Problem]]:
    if written.keys() >= {"base", "sweep_dir"}:
        raise UserError(f"{path} is a sweep, not one run's configuration: moshi-ttt sweep {path}")
    from_command_line = flatten(overrides or {})
    learn_from(written)
    learn_from(from_command_line)
    emptied = tuple(f"{key}." for key, text in from_command_line.items() if text in NULLS)
    written = {key: text for key, text in written.items() if not key.startswith(emptied)}
    args, problems = _parse_all(TrainArgs, written | from_command_line)
    if from_command_line.keys() & {"ttt.method", "ttt.write"}:
        # The file is for another method: its options for that one do not stand in the way.
        foreign = {f"ttt.{name}" for name, _ in args.ttt.misplaced()} - from_command_line.keys()
        for key in sorted(foreign & written.keys()):
            logger.warning("%s of %s is left out: it is not for this method", key, path)
        written = {key: text for key, text in written.items() if key not in foreign}
        args, problems = _parse_all(TrainArgs, written | from_command_line)

    # A default stands where a value was rejected: what follows from it alone is not the user's.
    settled = {key for key, _ in problems} | {_suggestion(TrainArgs, key) for key, _ in problems}
    for keys, text in cross_checks(args):
        sections = {key.split(".")[0] for key in keys.split(", ")}
        if not settled & (sections | set(keys.split(", "))):
            problems.append((keys, text))
    return args, problems


def list_problems(path: str | Path, problems: Iterable[str]) -> str:
    """What a user is told of a file with problems, a line each."""
    lines = [f"  - {problem}" for problem in problems]
    count = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
    return "\n".join([f"{path} has {count}:", *lines])


def public_dict(args: TrainArgs) -> dict[str, Any]:
    """`args` as nested dictionaries without secrets, for files and loggers."""
    public = dataclasses.asdict(args)
    del public["wandb"]["key"]
    return public


def changed_keys(path: Path, args: TrainArgs) -> dict[str, tuple[str, str]]:
    """What differs in `args` from the configuration in `path`: old and new value by dotted key.

    Keys that say how a run is started, not what it is, are left out.
    """
    old, new = (flatten(public_dict(each)) for each in (load_run_config(path), args))
    return {
        key: (str(old.get(key)), str(new.get(key)))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in ("resume", "overwrite_run_dir", "run_dir")
    }


def save_config(args: TrainArgs, path: str | Path) -> None:
    """Write `args` as YAML, without secrets; `load_config` reads it back."""
    Path(path).write_text(
        yaml.safe_dump(public_dict(args), sort_keys=False, allow_unicode=True), encoding="utf-8"
    )


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
                    problem=f"the key {key!r} appears twice; keep one of them",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The file's mapping, its values as they are written.

    Raises:
        UserError: no such file, not YAML, a key twice, or no mapping.
    """
    if not path.exists():
        raise UserError(f"There is no configuration file {path}.{_files_nearby(path)}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"Cannot read the configuration {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8. Is it a YAML file?") from error
    except yaml.MarkedYAMLError as error:
        # The offending line itself is not shown: it may hold a secret.
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        context = f" ({error.context})" if error.context else ""
        raise UserError(f"{path}{place}: not valid YAML: {error.problem}{context}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        found = "is empty" if content is None else "holds no `key: value` lines"
        raise UserError(
            f"{path} {found}. A configuration names at least `run_dir` and `data.train_data`; "
            "start from a file in example/."
        )
    return content


def _files_nearby(path: Path) -> str:
    nearby = sorted(file.name for file in path.parent.glob("*.y*ml"))
    if similar := difflib.get_close_matches(path.name, nearby, cutoff=0.5):
        return f" Did you mean {' or '.join(str(path.parent / name) for name in similar)}?"
    if nearby:
        return f" {path.parent} has {', '.join(nearby[:8])}."
    return " Give the path of a YAML file; there are some in example/ to start from."


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


# --- types ----------------------------------------------------------------------------------------


def _fields(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """The dotted name and type of every field and section, and whether it must be given."""
    types = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = types[field.name]
        if dataclasses.is_dataclass(kind):
            yield prefix + field.name, kind, False
            yield from _fields(kind, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            required = field.default is field.default_factory is dataclasses.MISSING
            yield prefix + field.name, kind, required


def _parse_all(cls: type[TrainArgs], flat: Mapping[str, Any]) -> tuple[TrainArgs, list[Problem]]:
    """Typed values of `flat`, defaults for what is absent or wrong, and what is wrong."""
    fields = {key: (kind, required) for key, kind, required in _fields(cls)}
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for key, raw in flat.items():
        if key not in fields:
            similar = _suggestion(cls, key)
            hint = f", did you mean {similar}?" if similar else "; remove it"
            problems.append((key, f"unknown key{hint}"))
        elif dataclasses.is_dataclass(fields[key][0]):
            if raw not in NULLS:
                problems.append((key, "is a section: expected keys of its own below it"))
        else:
            try:
                values[key] = _parse(raw, fields[key][0])
            except ValueError as error:
                problems.append((key, str(error)))
    for key, (_, required) in fields.items():
        if required and key not in flat:
            problems.append((key, "missing, and it has no default; add it"))
        if required and key not in values:
            values[key] = ""  # what must be given is text: a stand-in, to go on checking
    return _build(cls, values), problems


def _suggestion(cls: type, unknown: str) -> str | None:
    """The existing key that was probably meant."""
    known = [key for key, _, _ in _fields(cls)]
    last_part = unknown.split(".")[-1]
    by_last_part = {key.split(".")[-1]: key for key in reversed(known)}
    if unknown in known:
        return None
    if last_part in by_last_part:
        return by_last_part[last_part]
    if close := difflib.get_close_matches(unknown, known, n=1, cutoff=0.75):
        return close[0]
    close = difflib.get_close_matches(last_part, by_last_part, n=1, cutoff=0.75)
    return by_last_part[close[0]] if close else None


def _build(cls: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    chosen = {}
    for name, kind in get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            chosen[name] = _build(kind, values, f"{prefix}{name}.")
        elif prefix + name in values:
            chosen[name] = values[prefix + name]
    return cls(**chosen)


def _parse(raw: Any, kind: Any) -> Any:
    """The value of type `kind` that the text `raw` means, or `ValueError`."""
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if list[int] in options and raw not in NULLS:
        return _parse_list(raw)
    if isinstance(raw, str):
        # null first: as text it would be the word "null"
        for option in sorted(options, key=lambda option: option is not NoneType):
            try:
                return _parse_one(raw, option)
            except (ValueError, KeyError, OverflowError):
                continue
    expected = [
        " or ".join(map(str, get_args(option))) if get_origin(option) is Literal else _NAMES[option]
        for option in options
    ]
    got = "a list" if not isinstance(raw, str) else "nothing" if raw in NULLS else repr(raw)
    raise ValueError(f"expected {' or '.join(expected)}, got {got}")


def _parse_list(raw: Any) -> list[int]:
    """Whole numbers, as `[10, 12]` in YAML or on the command line."""
    items = raw.strip("[]() ").split(",") if isinstance(raw, str) else raw
    try:
        return [_parse_one(str(item).strip(), int) for item in items]
    except (ValueError, OverflowError):
        raise ValueError(f"expected whole numbers, as [10, 12], got {raw!r}") from None


def _parse_one(raw: str, kind: Any) -> Any:
    if kind is NoneType:
        return {null: None for null in NULLS}[raw]
    if kind is bool:
        return _BOOLS[raw.lower()]
    if kind is int:
        number = float(raw)
        if not number.is_integer():
            raise ValueError(raw)
        return int(raw) if raw.lstrip("+-").isdecimal() else int(number)
    if kind is float:
        if not math.isfinite(float(raw)):
            raise ValueError(raw)
        return float(raw)
    if kind is str:
        if raw in NULLS[1:]:
            raise ValueError(raw)
        return raw
    assert get_origin(kind) is Literal, f"a field of type {kind} cannot be read from YAML"
    return {str(choice): choice for choice in get_args(kind)}[raw]
