"""Marks of options that name what must be there, one for each kind of thing that an option names.

A mark's function imports nothing heavy: it is called as soon as the command line has been read.
"""

from pathlib import Path

from finetune.config.marks import MustExist
from finetune.config.read import require_configuration
from finetune.config.sources import parse_sources, require_source
from finetune.errors import UserError
from finetune.kept import is_stock, require_checkpoint

_ON_DISK = ("", ".jsonl", ".gz", ".npz", ".parquet")
"""Suffixes of data that are files and folders of this machine."""


def is_configuration(path: Path) -> bool:
    """Return whether a path is that of a run's YAML file, by its name."""
    return path.suffix.lower() in (".yaml", ".yml")


def require_file(path: Path, key: str) -> None:
    """
    Args:
        key: what has named it, for messages.

    Raises:
        UserError: there is no file.
    """
    if path.is_dir():
        raise UserError(f"{key}: {path} is a folder; name a file.")
    _require_path(path, key)


def _require_path(path: Path, key: str) -> None:
    if not path.exists():
        raise UserError(f"{key}: there is no file {path}; correct the path.")


def _require_folder(path: Path, key: str) -> None:
    if path.is_dir():
        return
    if path.exists():
        raise UserError(f"{key}: {path} is a file; name a folder.")
    raise UserError(f"{key}: there is no folder {path}; correct the path.")


def _require_configuration(path: Path, key: str) -> None:
    require_configuration(path)


def _require_checkpoint(path: Path, key: str) -> None:
    if not is_stock(path):
        require_checkpoint(path, key)


def _require_source(path: Path, key: str) -> None:
    # Of any other suffix, or of `hf://…`, the layout alone knows whether something is there.
    is_remote = str(path).partition("/")[0].endswith(":")
    if path.suffix in _ON_DISK and not is_remote:
        require_source(path, key)


def _require_sources(spec: str, key: str) -> None:
    for path, _ in parse_sources(spec, key):
        _require_source(path, key)


def _require_data(path: Path, key: str) -> None:
    if is_configuration(path):
        require_configuration(path)
    else:
        _require_sources(str(path), key)


FILE = MustExist(require_file)
FILE_OR_FOLDER = MustExist(_require_path)
FOLDER = MustExist(_require_folder)
CONFIGURATION = MustExist(_require_configuration)
"""A run's YAML file, or a sweep's."""
CHECKPOINT = MustExist(_require_checkpoint)
"""A checkpoint of a run, or a folder of a stock Moshi."""
SOURCE = MustExist(_require_source)
"""Data in one of the layouts there are."""
SOURCES = MustExist(_require_sources)
"""`path[:weight],…`."""
DATA = MustExist(_require_data)
"""`path[:weight],…`, or a run's YAML file."""
