"""The result of one piece of work, in a file that is there as a whole or not at all."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.kept.folders import make_folder
from finetune.safety import parse_json, with_nan, without_nan

_BLOCK_BYTES = 4096
"""What a disk that is not full has room for."""
_PARTIAL = ".partial"
_PARTIAL_FILE = re.compile(rf"\.(.+)\.\d+{re.escape(_PARTIAL)}")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is there as a whole, or not at all; one that was there stays until then.

    Its folder is made if there is none.

    Raises:
        UserError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")
    with writing(path):
        make_folder(path.parent)
        try:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def name_when_whole(name: str) -> str | None:
    """Return the name that a file of `write_whole` was to get, which killed it leaves under
    another; None for all other files."""
    found = _PARTIAL_FILE.fullmatch(name)
    return found and found[1]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's errors into a message that names what was to be written, and the reason.

    Raises:
        UserError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill, whose files are in `path` when all are made; else nothing is left.

    `path` is new, or free: see `is_free_folder`.

    Raises:
        UserError: it cannot be written.
    """
    # An empty one stays what it is: it may be a mount, or its parent may be read-only.
    is_there = path.is_dir()
    partial = path / _PARTIAL if is_there else path.with_name(f".{path.name}{_PARTIAL}")
    with writing(path):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            make_folder(partial)
            yield partial
            if is_there:
                for each in sorted(partial.iterdir()):
                    each.replace(path / each.name)
            else:
                partial.replace(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def is_free_folder(path: Path) -> bool:
    """Return whether a folder is empty, but for what `whole_folder` left when it was killed."""
    return path.is_dir() and all(each.name == _PARTIAL for each in path.iterdir())


def require_writable(path: Path, option: str) -> None:
    """Check that a file or a folder can be written, before hours are spent on what goes there.

    Args:
        option: what has named it, for messages.

    Raises:
        UserError: nothing can be made where it lies, or in the first folder above that is there; or
            the disk is full; or it is a pipe, a device, or a link to nothing.
    """
    require_plain(path, option)
    if os.path.islink(path) and not os.path.exists(path):
        raise UserError(
            f"{option}: {path} is a link to {os.readlink(path)}, which is not there, and would be "
            "replaced; remove the link, or choose another name."
        )
    try:
        # Asked for its rights, the system does not tell of a disk that is read-only; and on a full
        # one there may be room for a file, but not for what is in it.
        with tempfile.TemporaryFile(dir=_first_folder(path), buffering=0) as file:
            file.write(bytes(_BLOCK_BYTES))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{option}: cannot write to {path}: {reason}.") from error


def require_plain(path: Path, option: str) -> None:
    """Check that a path is no pipe and no device, nor a name of one that is a file at the moment.

    Args:
        option: what has named it, for messages.

    Raises:
        UserError: it is.
    """
    # Of what cannot be reached these are all False, where a path's own raise.
    if not os.path.exists(path) or os.path.isdir(path):
        return
    place = os.path.realpath(path.parent)  # of /dev/fd/1 in /proc
    if not os.path.isfile(path) or place == "/dev" or place.startswith("/proc/"):
        raise UserError(
            f"{option}: {path} is a pipe or a device, but a plain file is needed; choose another "
            "name."
        )


def require_room(path: Path, num_bytes: float) -> None:
    """Check that a file or a folder of that size finds room on its disk, before the work is done.

    Raises:
        UserError: it does not.
    """
    free_bytes = shutil.disk_usage(_first_folder(path)).free
    if num_bytes > free_bytes:
        raise UserError(
            f"{path} takes {_size(num_bytes)}, and {_size(free_bytes)} are free on its disk: free "
            "some space, or name another place."
        )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"


def _first_folder(path: Path) -> Path:
    """Return a folder, or the first one above that is there."""
    above = (folder for folder in path.absolute().parents if folder.exists())
    return path if path.is_dir() else next(above)


def require_new_file(path: Path, option: str = "--out") -> None:
    """Check that a file can be written that never replaces another.

    Args:
        option: what has named the file, for messages.

    Raises:
        UserError: something is there.
    """
    if path.exists():
        raise UserError(f"{path} is there already; give another {option}.")


def require_free_folder(path: Path, option: str = "--out") -> None:
    """Check that `whole_folder` can be used.

    Args:
        option: what has named the folder, for messages.

    Raises:
        UserError: something is there.
    """
    if path.exists() and not is_free_folder(path):
        raise UserError(f"{option}: {path} is there already; name a folder that is new or empty.")


class Kept:
    """A JSON object on the disk, beside which a crash leaves nothing half done.

    Args:
        path: the file; its folder is made when it is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any] | None:
        """Return what is kept; None if nothing is.

        Raises:
            UserError: the file cannot be read, or holds something else.
        """
        try:
            return decoded(self.path.read_bytes()) if self.path.exists() else None
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}.") from error
        except ValueError as error:
            raise UserError(
                f"{self.path} is damaged ({error}): delete it, or move it away, to do this again."
            ) from error

    def write(self, value: Mapping[str, Any]) -> None:
        """Keep a value in the place of what was kept before.

        Raises:
            UserError: the file cannot be written.
        """
        write_whole(self.path, encoded(value, indent=1) + "\n")

    def remove(self) -> None:
        """Keep nothing: what it tells of is about to change. Without a file this does nothing.

        Raises:
            UserError: the file cannot be removed.
        """
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{self.path} cannot be removed: {error.strerror or error}.") from error


def encoded(value: Mapping[str, Any], *, indent: int | None = None) -> str:
    """Return a value as JSON, in which NaN and infinities are text."""
    return json.dumps(without_nan(dict(value), as_text=True), indent=indent, allow_nan=False)


def decoded(text: str | bytes) -> dict[str, Any]:
    """Return the value of `encoded`.

    Raises:
        ValueError: it is no JSON, or no object.
    """
    value = with_nan(parse_json(text))
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def refuse_to_replace(
    paths: Iterable[Path], *, overwrite: bool, alternative: str = "--out"
) -> None:
    """Check that files may be written.

    Args:
        alternative: what can be given instead, first the option that writes them elsewhere.

    Raises:
        UserError: one is there, and must not be replaced.
    """
    there = [] if overwrite else [str(path) for path in paths if path.exists()]
    if there:
        more = f" (and {len(there) - 1} more)" if len(there) > 1 else ""
        raise UserError(
            f"{there[0]}{more} is there already. Give another {alternative}, or --overwrite to "
            "replace it."
        )
