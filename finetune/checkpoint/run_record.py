"""The list of what a run has written into its folder, kept in that folder.

Nothing but what stands on it is ever moved or deleted. A name on it is only compared with what lies
in the folder, never opened: no name can lead out of it, and no symbolic link is followed.

    run_dir/.run.jsonl
        {"moshi-ttt": "run"}            the first line; with "replaces" while an older run waits
        {"files": ["args.yaml"]}
        {"tree": "wandb"}               a folder that the run has made, with all that is in it
        {"aside": ".replaced"}          this run is being moved there, or back from there
        {"aside": null}                 … and that is over
        {"earned": true}                what it replaces may go
"""

import json
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from finetune.kept import name_when_whole

NAME = ".run.jsonl"
_NEW_NAME = f"{NAME}.new"
LOCK_NAME = ".lock"
"""The file whose lock the process holds that has the folder."""

_FIRST = {"moshi-ttt": "run"}


@dataclass
class Content:
    """Content of a record; paths are POSIX and relative to the run folder."""

    files: set[str] = field(default_factory=set)
    trees: set[str] = field(default_factory=set)
    replaces: str | None = None
    """The folder in the run folder with the older run, until that is deleted."""
    aside: str | None = None
    """Where this run is being moved to, or back from."""
    earned: bool = False

    def wrote(self, name: str) -> bool:
        """Return whether the run has written a file, or was killed as it wrote it."""
        path = PurePosixPath(name)
        whole = name_when_whole(path.name) or path.name
        return name in self.files or str(path.with_name(whole)) in self.files

    def owns(self, name: str) -> bool:
        path = PurePosixPath(name)
        return name in self.files or any(str(p) in self.trees for p in (path, *path.parents))

    def made(self, folder: str) -> bool:
        """Return whether the run writes into it, and so has made it."""
        inside = f"{folder}/"
        names = (*self.files, *self.trees)
        return self.owns(folder) or any(name.startswith(inside) for name in names)


@dataclass(frozen=True)
class Found:
    """Content of a folder: `units` are the run's own, each a file or a folder with nothing else
    in it; `foreign` are files, links and empty folders of somebody else."""

    units: list[str]
    foreign: list[str]


class RunRecord:
    """The record in a folder; several threads may add to it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.path = run_dir / NAME
        self._lock = threading.Lock()

    def exists(self) -> bool:
        """Return whether a run of ours has written into the folder."""
        return self._read() is not None

    def read(self) -> Content:
        """
        Returns:
            What it says; nothing at all if there is none.
        """
        return self._read() or Content()

    def create(self, *, replaces: str | None = None) -> None:
        """Begin a new record, in one step, in place of one that is there."""
        first = _FIRST | ({} if replaces is None else {"replaces": replaces})
        new = self.path.with_name(_NEW_NAME)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        _write(os.open(new, flags, 0o666), [first])
        os.replace(new, self.path)
        fsync(self.run_dir)

    def remove_half_made(self) -> None:
        """Remove what is left where the power went while a record was being begun."""
        self.path.with_name(_NEW_NAME).unlink(missing_ok=True)

    def add(self, files: Iterable[str] = (), *, trees: Iterable[str] = ()) -> None:
        """Take down what is about to be written, or has just been."""
        known = self.read()
        new = sorted(set(files) - known.files)
        lines: list[dict[str, Any]] = [{"files": new}] if new else []
        self._append([*lines, *({"tree": tree} for tree in trees if tree not in known.trees)])

    def note(self, **what: Any) -> None:
        """Add a line of the exchange of two runs."""
        self._append([what])

    def found(self, *, without: str | None = None) -> Found:
        """Return what lies in the folder, apart from the record, the lock, and the folder
        `without`."""
        content = self.read()
        skipped = {NAME, _NEW_NAME, LOCK_NAME, without}
        units: list[str] = []
        foreign: list[str] = []
        for entry in _entries(self.run_dir):
            if entry.name not in skipped:
                _sort(Path(entry.path), entry.name, content, units, foreign)
        return Found(units, foreign)

    def found_at(self, name: str) -> Found:
        """Return what `found` returns, for one file or folder."""
        path = PurePosixPath(name)
        units: list[str] = []
        foreign: list[str] = []
        if any((self.run_dir / parent).is_symlink() for parent in path.parents if parent.name):
            foreign.append(name)
        elif os.path.lexists(self.run_dir / name):
            _sort(self.run_dir / name, name, self.read(), units, foreign)
        return Found(units, foreign)

    def delete(self, name: str) -> bool:
        """Delete what is at `name` as far as it is the run's; whether all of it was."""
        found = self.found_at(name)
        delete_units(self.run_dir, found.units)
        return not found.foreign

    def _read(self) -> Content | None:
        try:
            if not stat.S_ISREG(os.lstat(self.path).st_mode):
                return None
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return None
        # A last line without its end was being written when the power went.
        lines = [_parse(line) for line in text.split("\n")[:-1]]
        if not lines or any(lines[0].get(key) != value for key, value in _FIRST.items()):
            return None
        content = Content(replaces=_name(lines[0].get("replaces")))
        for line in lines[1:]:
            names = line.get("files")
            content.files |= set(filter(_name, names)) if isinstance(names, list) else set()
            if (tree := _name(line.get("tree"))) is not None:
                content.trees.add(tree)
            if "aside" in line:
                content.aside = _name(line["aside"])
            if "replaces" in line:
                content.replaces = _name(line["replaces"])
            content.earned |= line.get("earned") is True
        return content

    def _append(self, lines: list[dict[str, Any]]) -> None:
        if not lines:
            return
        with self._lock:
            torn = not self.path.read_bytes().endswith(b"\n")
            flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW
            _write(os.open(self.path, flags), lines, before="\n" if torn else "")


def run_wrote(run_dir: Path, name: str) -> bool:
    """Return whether the run in a folder has written a file of this name.

    Where an older run still waits to be replaced, and may come back, both must have.
    """
    content = RunRecord(run_dir).read()
    if name not in content.files:
        return False
    return content.replaces is None or run_wrote(run_dir / content.replaces, name)


def replaced_run(run_dir: Path) -> Path | None:
    """Return the folder in which an older run lies whole, while the one that replaces it has not
    come to its first checkpoint."""
    content = RunRecord(run_dir).read()
    return None if content.replaces is None or content.earned else run_dir / content.replaces


def delete_units(run_dir: Path, units: Iterable[str]) -> None:
    """Delete what `RunRecord.found` has found, and the folders that are empty then."""
    for unit in units:
        _delete(run_dir / unit)
        remove_empty(run_dir, PurePosixPath(unit).parent)


def remove_empty(run_dir: Path, folder: PurePosixPath) -> None:
    """Remove a folder, and those that it is in up to `run_dir`, as far as they are empty."""
    while folder.name and not any(_entries(run_dir / folder)):
        os.rmdir(run_dir / folder)
        folder = folder.parent


def fsync(path: Path) -> None:
    """Have the disk take what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    # Not shutil.rmtree, which leaves open what it does where a name has become a link meanwhile.
    if path.is_dir() and not path.is_symlink():
        for entry in list(_entries(path)):
            _delete(path / entry.name)
        os.rmdir(path)
    elif path.exists() or path.is_symlink():
        os.unlink(path)


def _sort(path: Path, name: str, content: Content, units: list[str], foreign: list[str]) -> bool:
    """Put what is at `name` into the one list or the other; whether all of it is the run's."""
    kind = os.lstat(path).st_mode
    if not stat.S_ISDIR(kind):
        # A link counts only in a folder that is the run's as a whole: wandb makes some.
        in_tree = any(str(parent) in content.trees for parent in PurePosixPath(name).parents)
        own = in_tree or (stat.S_ISREG(kind) and content.wrote(name))
        (units if own else foreign).append(name)
        return own
    inner: list[str] = []
    others: list[str] = []
    for child in _entries(path):
        _sort(Path(child.path), f"{name}/{child.name}", content, inner, others)
    if not inner and not others and not content.made(name):
        others = [name]
    own = not others
    units += [name] if own else inner
    foreign += others
    return own


def _entries(folder: "str | Path") -> Iterator["os.DirEntry[str]"]:
    with os.scandir(folder) as entries:
        yield from sorted(entries, key=lambda entry: entry.name)


def _parse(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _name(value: object) -> str | None:
    """A name that can stand in a record: inside the folder, and not the folder itself."""
    if not isinstance(value, str) or not value or "\0" in value:
        return None
    path = PurePosixPath(value)
    return value if path.name and not path.is_absolute() and ".." not in path.parts else None


def _write(descriptor: int, lines: list[dict[str, Any]], before: str = "") -> None:
    text = before + "".join(json.dumps(line) + "\n" for line in lines)
    with os.fdopen(descriptor, "wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
