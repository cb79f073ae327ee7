"""YAML files of runs and sweeps, as files: is there one, and what are those around it called?"""

import difflib
import re
from pathlib import Path

from finetune.config.values import valid_path
from finetune.errors import UserError
from finetune.safety import kind_of


def require_configuration(path: Path) -> None:
    """
    Raises:
        UserError: there is no such file, or it is data; files of similar names are named.
    """
    try:
        valid_path(path)
        exists = path.exists()
    except ValueError as error:
        raise UserError(f"The configuration's path {error}.") from error
    if not exists:
        raise UserError(f"There is no configuration file {path}.{_files_nearby(path)}")
    if path.is_dir():
        raise UserError(f"{path} is a folder, and no YAML file.{_files_nearby(path / 'run.yaml')}")
    if (kind := kind_of(path)) in ("recording", "list of recordings"):
        raise UserError(f"{path} is a {kind}, and no configuration.{_files_nearby(path)}")


def _files_nearby(path: Path) -> str:
    shipped, nearby = (
        [f for f in sorted(folder.glob("*.y*ml")) if f.is_file() and not f.name.startswith(".")]
        for folder in (Path("example"), path.parent)
    )
    for files in (nearby, shipped):
        known = {file.stem: str(file) for file in files}
        if similar := difflib.get_close_matches(path.stem[:100], known):
            return f" Did you mean {' or '.join(known[name] for name in similar)}?"
    if runs := [file.name for file in nearby if _names_a_run(file)]:
        return f" {path.parent} has {', '.join(runs[:8])}."
    return " Give the path of a YAML file; there are some in example/ to start from."


def _names_a_run(file: Path) -> bool:
    """Return whether a file may be a run's or a sweep's: many other programs read YAML too."""
    try:
        with file.open(encoding="utf-8") as opened:
            return re.search(r"^(run_dir|sweep_dir)\b", opened.read(100_000), re.M) is not None
    except (OSError, UnicodeDecodeError):
        return False
