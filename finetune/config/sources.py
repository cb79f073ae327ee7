"""Paths of data, as a configuration and a command line name them: `path[:weight],…`."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from finetune.errors import UserError
from finetune.safety import kind_of, start_of

_WEIGHT = re.compile(r"(?P<path>.+):(?P<weight>[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)", re.IGNORECASE)


def parse_sources(spec: str, key: str) -> list[tuple[Path, float]]:
    """Split `path[:weight],…`. Only a number after the last colon is a weight.

    Raises:
        UserError: there is no path, or a weight is not positive and finite.
    """
    pairs = []
    for item in filter(None, (item.strip() for item in spec.split(","))):
        match = _WEIGHT.fullmatch(item)
        path, weight = (match["path"], float(match["weight"])) if match else (item, 1.0)
        if not 0 < weight < math.inf:
            raise UserError(
                f"{key}: the weight of {path} is {weight:g}, but weights must be positive "
                "numbers. Remove the source or give it a positive weight."
            )
        pairs.append((Path(path).expanduser(), weight))
    if not pairs:
        raise UserError(
            f"{key} is empty: give a .jsonl file or a folder of them, as path[:weight],…"
        )
    return pairs


def resolved_sources(spec: str, key: str) -> str:
    """Return `path[:weight],…` as it is named from any folder; what is no file or folder of this
    machine stays as it is.

    Raises:
        UserError: see `parse_sources`.
    """
    if not spec:
        return spec
    found = []
    for path, weight in parse_sources(spec, key):
        place = path
        if path.exists():
            # A list that is a link speaks of files beside the link.
            place = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
        found.append(str(place) if weight == 1 else f"{place}:{weight:g}")
    return ",".join(found)


def require_sources(paths: Sequence[Path], key: str) -> None:
    """
    Args:
        key: the configuration's key that names the paths, for messages.

    Raises:
        UserError: naming all where nothing is, or one that is no list.
    """
    missing = [str(path) for path in paths if not path.exists()]
    commas = " (commas separate paths, so that none may be in a name)" if len(paths) > 1 else ""
    start = next(filter(None, (start_of(Path(path), key) for path in missing)), "")
    for name in missing:
        named, _, weight = name.rpartition(":")
        if named and Path(named).exists():
            raise UserError(
                f"{key}: {name} does not exist. If {weight!r} is to be the weight of {named}, it "
                "must be a number, as 2 or 0.5."
            )
    if len(missing) == 1:
        raise UserError(f"{key}: {missing[0]} does not exist. Correct the path{commas}.{start}")
    if missing:
        raise UserError(
            f"{key}: {', '.join(missing)} do not exist. Correct the paths{commas}.{start}"
        )
    for path in paths:
        if (kind := kind_of(path)) in ("recording", "configuration"):
            raise UserError(
                f"{key}: {path} is a {kind}; name a list of recordings, which "
                "`moshi-ttt data index FOLDER` writes."
            )
