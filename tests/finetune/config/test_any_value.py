"""Any value at any key of a shipped file gives a configuration or one message."""

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.cli import COMMANDS
from finetune.config import load_config, read_options, save_config
from finetune.config.fields import all_fields, complete
from finetune.config.values import members
from finetune.errors import UserError
from finetune.sweep.plan import load_sweep

ROOT = Path(__file__).parents[3]
WORDS = "1e9 1e12 1e18 1e39 1e300 1e308 1e-300 0.01 -1 0 nan inf null true auto 1,2 ~no_such_user/x"
LONG = ["18446744073709551616", "9" * 5000, "x" * 5000, "a/" * 2500, "a\0b", "a\ud800", ""]
HOSTILE = st.one_of(
    st.sampled_from([*WORDS.split(), *LONG, [], ["1"], [[]], {"a": "1"}, {}]),
    st.text(max_size=20),
    st.integers(),
    st.floats(),
)


@functools.cache
def parsed(path: Any) -> Any:
    return yaml.safe_load(path.read_text())


def every_key() -> Iterator[Any]:
    """Yield each key of each shipped file, by its way from the top."""

    def walk(path: Any, section: Any, way: Any = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        for key, value in section.items():
            yield path, (*way, key)
            if isinstance(value, dict):
                yield from walk(path, value, (*way, key))

    for path in sorted((ROOT / "example").glob("*.yaml")):
        yield from walk(path, yaml.safe_load(path.read_text()))


any_value_at_any_key = given(place=st.sampled_from([*every_key()]), value=HOSTILE)


@settings(max_examples=100, deadline=None)
@any_value_at_any_key
def test_any_value_at_any_key_is_a_configuration_or_one_message(
    tmp_path_factory: pytest.TempPathFactory, place: Any, value: Any
) -> None:
    read_with(tmp_path_factory, place, value)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@any_value_at_any_key
def test_any_of_many_values_is_a_configuration_or_one_message(
    tmp_path_factory: pytest.TempPathFactory, place: Any, value: Any
) -> None:
    read_with(tmp_path_factory, place, value)


def read_with(tmp_path_factory: pytest.TempPathFactory, place: Any, value: Any) -> None:
    path, (*way, last) = place
    content = copy.deepcopy(parsed(path))
    section = content
    for key in way:
        section = section[key]
    section[last] = value
    changed = tmp_path_factory.getbasetemp() / "changed.yaml"
    changed.write_text(yaml.safe_dump(content))
    try:
        if "sweep_dir" in content or "runs" in content:
            load_sweep(changed, with_inputs=False)
        else:
            save_config(load_config(changed), changed)
    except UserError as error:
        assert len(str(error)) <= 2000


LISTS = [
    (name, field.key)
    for name, command in COMMANDS.items()
    for field in all_fields(complete(vars(command)["options"]))
    if any(get_origin(kind) is tuple for kind in members(field.kind))
]


@pytest.mark.parametrize(("command", "name"), LISTS, ids=str)
def test_an_empty_list_on_a_command_line_is_never_all_there_are(command: str, name: str) -> None:
    options, takes_keys = (vars(COMMANDS[command])[each] for each in ("options", "with_overrides"))
    needed = [f.key for f in all_fields(complete(options)) if f.is_required and f.key != name]
    for text in ("", " ", ",", "[]"):
        given = {**dict.fromkeys(needed, "x"), name: text}
        with pytest.raises(UserError, match=f"^--{name}: expected at least one"):
            read_options(options, [], given, with_overrides=takes_keys)
