"""Marks of options that name what must be there, one for each kind of thing that an option names.

A mark's function imports nothing heavy: it is called as soon as the command line has been read.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.config.config_files import require_configuration
from finetune.config.fields import fields_of, marks_of
from finetune.config.marks import MustExist
from finetune.config.sources import parse_sources, require_sources
from finetune.errors import UserError
from finetune.kept import is_stock, require_checkpoint, require_writable
from finetune.safety import kind_of, start_of

_ON_DISK = ("", ".jsonl", ".gz", ".npz", ".parquet")
"""Suffixes of data that are files and folders of this machine."""


def what_is_missing(options: Any, dashes: str = "", prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the keys of options that name what is not there, each with its message.

    Args:
        dashes: what stands before a key where a message names it.
        prefix: how the keys of these options begin.
    """
    cls: type = type(options)
    for field in fields_of(cls, prefix):
        value, name = getattr(options, field.name), f"{dashes}{field.key}"
        if field.section:
            yield from what_is_missing(value, dashes, field.prefix)
        for mark in marks_of(field.kind, MustExist):
            try:
                if value is not None:
                    mark.require(value, name)
            except UserError as error:
                yield field.key, str(error)
            except OSError as error:
                # In a folder that may not be read, nobody can say.
                yield field.key, f"{name}: {value} cannot be read: {error.strerror}."


def files_read(options: Any) -> Iterator[Path]:
    """Yield the files that options name, and that must be there."""
    cls: type = type(options)
    for field in fields_of(cls):
        value = getattr(options, field.name)
        marks = marks_of(field.kind, MustExist)
        if field.section:
            yield from files_read(value)
        elif value is not None and marks and not {WRITABLE, WRITABLE_FOLDER}.intersection(marks):
            several = {SOURCES, DATA}.intersection(marks)
            paths = (path for path, _ in parse_sources(str(value), field.key))
            yield from (path for path in (paths if several else [Path(value)]) if path.is_file())


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
        raise UserError(f"{key}: there is no file {path}; correct the path.{start_of(path, key)}")


def _require_audio(path: Path, key: str) -> None:
    _require_path(path, key)
    if (kind := kind_of(path)) not in ("", "recording"):
        raise UserError(f"{key}: {path} is a {kind}; name a recording, or a folder of some.")


def _require_text_file(path: Path, key: str) -> None:
    require_file(path, key)
    if kind_of(path) == "recording":
        raise UserError(f"{key}: {path} is a recording, which it cannot be; correct the path.")


def _require_folder(path: Path, key: str) -> None:
    if path.is_dir():
        return
    if path.exists():
        raise UserError(f"{key}: {path} is a file; name a folder.")
    raise UserError(f"{key}: there is no folder {path}; correct the path.{start_of(path, key)}")


def _require_writable_folder(path: Path, key: str) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"{key}: {path} is a file; name a folder.")
    require_writable(path, key)


def _require_configuration(path: Path, key: str) -> None:
    require_configuration(path)


def _require_checkpoint(path: Path, key: str) -> None:
    if not is_stock(path):
        require_checkpoint(path, key)


def _is_on_disk(path: Path) -> bool:
    # Of any other suffix, or of `hf://…`, the layout alone knows whether something is there.
    is_remote = str(path).partition("/")[0].endswith(":")
    return (path.suffix in _ON_DISK or bool(kind_of(path))) and not is_remote


def _require_source(path: Path, key: str) -> None:
    require_sources([path] if _is_on_disk(path) else [], key)


def _require_sources(spec: str, key: str) -> None:
    require_sources([path for path, _ in parse_sources(spec, key) if _is_on_disk(path)], key)


def _require_data(path: Path, key: str) -> None:
    if is_configuration(path):
        require_configuration(path)
    else:
        _require_sources(str(path), key)


def _require_model_file(path: str, key: str) -> None:
    # `moshi` downloads the one, and takes the other for a file however it looks.
    if not path.startswith(("hf://", "file://")):
        require_file(Path(path), key)


def _require_repository(name: str, key: str) -> None:
    # A name on the hub is OWNER/NAME, or NAME alone.
    if Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1:
        _require_folder(Path(name), key)


def _require_earlier_run(path: str, key: str) -> None:
    _require_checkpoint(Path(path), key)


FILE = MustExist(_require_text_file)
"""A file that is no recording."""
AUDIO = MustExist(_require_audio)
"""A recording, or a folder of such."""
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
MODEL_FILE = MustExist(_require_model_file)
"""A file of a model, on this machine or on the hub."""
REPOSITORY = MustExist(_require_repository)
"""A repository of the hub, or a folder of the same layout."""
EARLIER_RUN = MustExist(_require_earlier_run)
"""The same, as text."""
WRITABLE = MustExist(require_writable)
"""A file or folder to write: something can be made where it is to lie."""
WRITABLE_FOLDER = MustExist(_require_writable_folder)
"""A folder to write to: no file has its name."""
