"""Files that a command writes never replace a file of somebody else, nor one that it reads.

What a command makes anew from the same inputs, such as a picture, has the command's mark in it, and
may be replaced by that command. All else that is there stays, unless `--overwrite` is given.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UserError
from finetune.kept.whole import refuse_to_replace, require_plain, require_writable

MARK = "written_by"
"""The key of the mark in a JSON file, where it is the first."""
_FORMS = {
    b"\x89PNG": b"Software\0%b",
    b"RIFF": b"%b\0",
    b"<!doctype html>": b'<meta name="generator" content="%b">',
    b"{": b'"written_by": "%b"',
}
"""How a mark stands in a file, by how the file begins."""
_HEAD_BYTES = 4096


def mark_of(command: str) -> str:
    """Return what stands in a file that tells that a command has written it."""
    return f"moshi-ttt {command}"


@dataclass(frozen=True)
class Output:
    """A file that a command is to write."""

    path: Path
    option: str = "--out"
    """What names it, or another place for it."""
    command: str = ""
    """Whose mark it gets, so that it may be replaced; empty: it gets none."""
    is_own: Callable[[Path], bool] | None = None
    """Says in the place of a mark whether a file is one of these."""
    is_needed: bool = True
    """If it cannot be written, the command is of no use."""

    def may_replace(self) -> bool:
        """Return whether what is there, if anything is, is only an earlier such file."""
        if not os.path.exists(self.path):  # or cannot be reached, and so not be replaced
            return True
        if self.is_own is not None:
            return self.is_own(self.path)
        return bool(self.command) and _has_mark(self.path, self.command)


def is_png(path: Path) -> bool:
    """Return whether a file is a picture, also of an earlier version, which left no mark."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"\x89PNG"
    except OSError:
        return False


def require_outputs(
    outputs: Sequence[Output], *, inputs: Iterable[Path] = (), overwrite: bool | None = None
) -> None:
    """Check that files can be written, and that nothing is lost by it.

    Args:
        inputs: files that are read, which are never replaced.
        overwrite: other files are replaced; None: there is no such option.

    Raises:
        UserError: one cannot be written, is no plain file, is an input or another output, or
            would replace what is not the command's.
    """
    for each in outputs:
        if each.is_needed:
            require_writable(each.path, each.option)
        elif os.path.realpath(each.path) != os.devnull:  # by which nothing is kept
            require_plain(each.path, each.option)
        if os.path.isdir(each.path):  # unlike that of a path, of what cannot be reached it is False
            raise UserError(f"{each.option}: {each.path} is a folder; name a file.")
    options: dict[str, str] = {}
    for each in outputs:
        place = os.path.realpath(each.path)
        if place in options:
            raise UserError(
                f"{each.option}: {options[place]} writes to {each.path} as well; give two names."
            )
        options[place] = each.option
    require_not_read(outputs, inputs)
    foreign = [each for each in outputs if not each.may_replace()]
    if overwrite is not None and foreign:
        paths = (each.path for each in foreign)
        refuse_to_replace(paths, overwrite=overwrite, alternative=foreign[0].option)
    elif foreign:
        raise UserError(_explain_kept(foreign[0]))


def require_not_read(outputs: Iterable[Output], inputs: Iterable[Path]) -> None:
    """Check that no file is both read and written, also through links.

    Raises:
        UserError: one is.
    """
    read = {_identity(path) for path in inputs} - {None}
    for each in outputs:
        if _identity(each.path) in read:
            raise UserError(
                f"{each.option}: {each.path} is read by this command, and would be lost; choose "
                "another name."
            )


def _explain_kept(output: Output) -> str:
    """Return why a file stays that is there, of a command without `--overwrite`."""
    if not output.command:
        return f"{output.path} is there already; give another {output.option}."
    return (
        f"{output.path} is there already, and was not written by {mark_of(output.command)}: give "
        f"another {output.option}, or move it away."
    )


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what two names of a file have in common; None: there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _has_mark(path: Path, command: str) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return False
    mark = mark_of(command).encode()
    return any(head.startswith(start) and form % mark in head for start, form in _FORMS.items())
