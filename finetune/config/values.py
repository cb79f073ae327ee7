"""Text from YAML or a command line becomes a value of a field's type."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, ValidationError

from finetune.safety import path_problem, redact
from ttt.options import OneOf, abbreviated, adapter, broken_rule

NULLS = ("", "~", "null", "Null", "NULL", "None")
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    NoneType: "null",
}


def valid_path(path: Any) -> Any:
    """Return the path, with a home directory in the place of `~`, which a shell leaves as it is
    behind `=`; or raise `ValueError` for one that no file system has."""
    if problem := path_problem(str(path)):
        raise ValueError(problem)
    return type(path)(os.path.expanduser(path))


def _valid_paths(paths: str) -> str:
    for path in paths.split(","):
        valid_path(path.strip())
    return paths


def _valid_picture(path: Path) -> Path:
    if path.suffix.lower() != ".png":
        raise ValueError(f"the picture is a PNG; give a name with .png, and not {path.name}")
    return path


PathText = Annotated[str, AfterValidator(valid_path)]
PathsText = Annotated[str, AfterValidator(_valid_paths)]
FilePath = Annotated[Path, AfterValidator(valid_path)]
PngPath = Annotated[FilePath, AfterValidator(_valid_picture)]
"""The file of a picture that is written."""


def members(kind: Any) -> tuple[Any, ...]:
    """Return the types that a type is a union of, without what is annotated; words that are listed
    elsewhere are a `Literal` of them."""
    if get_origin(kind) is Annotated:
        for mark in kind.__metadata__:
            if isinstance(mark, OneOf):
                return (Literal.__getitem__(tuple(mark.words())),)
        return members(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return tuple(member for each in get_args(kind) for member in members(each))
    return (kind,)


def without_null(kind: Any) -> Any:
    """Return a type that takes all that `kind` takes, but not null."""
    inner = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if get_origin(inner) not in (Union, UnionType):
        return kind
    return Union.__getitem__(tuple(each for each in get_args(inner) if each is not NoneType))


def parse(raw: Any, kind: Any) -> Any:
    """Return the value of type `kind` that `raw` means.

    Args:
        raw: text, or a list of texts.

    Raises:
        ValueError: it means none, or breaks a bound of the type.
    """
    options = members(kind)
    several = next((each for each in options if get_origin(each) in (list, tuple)), None)
    # `--only=$RUNS` of an empty variable is no wish for what null would mean, which is all.
    is_empty = raw == "" and get_origin(several) is tuple
    if several is not None and (is_empty or raw not in NULLS):
        return _parse_several(raw, several)
    broken = None
    for candidate in _candidates(raw) if isinstance(raw, str) else ():
        try:
            return adapter(kind).validate_python(candidate, strict=True)
        except ValidationError as error:
            broken = broken or broken_rule(error)
    if broken:
        raise ValueError(broken)
    expected = [
        " or ".join(map(str, get_args(each))) if get_origin(each) is Literal else _NAMES[each]
        for each in (several and (str,)) or options
    ]
    got = "nothing" if raw in NULLS else abbreviated(redact(repr(raw)))
    got = got if isinstance(raw, str) else "a list"
    raise ValueError(f"expected {' or '.join(expected)}, got {got}")


def _candidates(text: str) -> Iterator[Any]:
    """Yield what the text may mean; the field's type decides."""
    if text in NULLS:
        yield None
        if text:
            return
    if "\0" in text:
        raise ValueError("holds a NUL character, which no text may")
    try:
        text.encode(errors="surrogateescape")  # a path's bytes may be no text at all
    except UnicodeEncodeError as error:
        raise ValueError("holds characters that are not Unicode (lone surrogates)") from error
    if text.lower() in _BOOLS:
        yield _BOOLS[text.lower()]
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isnan(number):
        yield number
    if number.is_integer():
        yield int(text) if text.strip().lstrip("+-").isdecimal() else int(number)
    yield text
    if text:
        yield Path(text)


def _parse_several(raw: Any, kind: Any) -> Any:
    """Items as `[10, 12]` in YAML, or with commas between them; in a tuple, each once."""
    element = get_args(kind)[0]
    items = raw.strip("[]() ").split(",") if isinstance(raw, str) else raw
    items = [str(item).strip() for item in items]
    if get_origin(kind) is tuple:
        found = dict.fromkeys(parse(item, element) for item in items if item)
        if not found:
            raise ValueError("expected at least one, with a comma between each; got nothing")
        return tuple(found)
    try:
        return [parse(item, element) for item in items]
    except ValueError as error:
        raise ValueError(
            f"expected whole numbers, as [10, 12], got {abbreviated(redact(repr(raw)))}"
        ) from error
