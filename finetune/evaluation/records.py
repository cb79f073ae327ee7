"""Results as they come, one JSON line each, so that an evaluation can be interrupted and continued.

The first line says what the results depend on: those of another checkpoint or of other options are
never mixed with them.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.safety import parse_json, with_nan, without_nan

_HASHED_BYTES = 2**20


class Records:
    """The results of one task, on disk and in memory.

    Args:
        path: the file, which may hold earlier results.
        fingerprint: what the results depend on.

    Raises:
        UserError: the file's results depend on something else, or it cannot be read.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        header = json.loads(json.dumps({"fingerprint": fingerprint}))
        lines = _complete_lines(path, "--out")
        if lines:
            earlier = _parse(path, lines[0], "--out").get("fingerprint")
            if earlier != header["fingerprint"]:
                if lines[1:] or not isinstance(earlier, dict):
                    raise UserError(
                        f"--out: {path} holds results of another evaluation "
                        f"({_difference(earlier, header['fingerprint'])}). Choose another --out, "
                        f"or delete that file."
                    )
                lines = []  # it was stopped before its first result: there is nothing to mix
            self.records = [_parse(path, line, "--out") for line in lines[1:]]
        try:
            if lines:
                # An interrupted write leaves an incomplete line, which must not join the next one.
                os.truncate(path, sum(len(line.encode()) + 1 for line in lines))
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out: cannot write {path}: {error.strerror or error}.") from error

    def append(self, record: Mapping[str, Any]) -> None:
        record = dict(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(without_nan(record, as_text=True), allow_nan=False) + "\n")
        self.records.append(record)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.records)


def read_records(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The fingerprint and the records of an evaluation, to compare with.

    Raises:
        UserError: there is none, or it is damaged.
    """
    lines = _complete_lines(path, "--baseline")
    if not lines:
        raise UserError(f"--baseline: there is no evaluation of loss by position in {path.parent}.")
    header, *records = [_parse(path, line, "--baseline") for line in lines]
    return header.get("fingerprint") or {}, records


def file_versions(*paths: Path) -> str:
    """Sizes and times of files, which tell whether they are still those that were read."""
    return " ".join(_version(path) for path in paths)


def _version(path: Path) -> str:
    status = path.stat() if path.is_file() else None
    return f"{status.st_size}@{status.st_mtime_ns}" if status else "none"


def checkpoint_fingerprint(checkpoint: Path) -> str:
    """Identifies a checkpoint, wherever it lies: by its configuration, and the names, sizes, first
    and last MiB of its files of weights."""
    inside = checkpoint / "consolidated"
    folder = inside if inside.is_dir() else checkpoint
    files = [*folder.glob("*.safetensors"), *folder.glob("*.json"), *checkpoint.glob("args.yaml")]
    digest = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(_HASHED_BYTES))
            file.seek(max(0, size - _HASHED_BYTES))
            digest.update(file.read(_HASHED_BYTES))
    return digest.hexdigest()[:16]


def _complete_lines(path: Path, option: str) -> list[str]:
    try:
        return path.read_bytes().decode().split("\n")[:-1] if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: cannot read {path}: {error}.") from error


def _parse(path: Path, line: str, option: str) -> dict[str, Any]:
    try:
        record = with_nan(parse_json(line))
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UserError(
            f"{option}: {path} is damaged. Choose another {option}, or delete that file."
        )
    return record


def _difference(earlier: Any, now: Mapping[str, Any]) -> str:
    if not isinstance(earlier, dict):
        return "it does not say which"
    names = [name for name in now.keys() | earlier.keys() if earlier.get(name) != now.get(name)]
    return ", ".join(f"{n} was {earlier.get(n)}, is {now.get(n)}" for n in sorted(names))
