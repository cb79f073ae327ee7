"""Results as they come, one JSON line each, so that work can be interrupted and continued.

The first line says what the results depend on: those of another checkpoint or of other options are
never mixed with them.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.kept.folders import make_folder
from finetune.kept.whole import decoded, encoded


class Records:
    """The results of one task, on disk and in memory.

    Args:
        path: the file, which may hold earlier results.
        fingerprint: what the results depend on.
        overwrite: results that depend on something else are replaced.

    Raises:
        UserError: the file's results depend on something else, or it cannot be read.
    """

    def __init__(
        self, path: Path, fingerprint: Mapping[str, Any], *, overwrite: bool = False
    ) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        header = json.loads(json.dumps({"fingerprint": fingerprint}))
        lines = _complete_lines(path, "--out") or _line_of_another(path)
        if lines:
            earlier = _parse(path, lines[0], "--out").get("fingerprint")
            if earlier != header["fingerprint"]:
                if not overwrite and (lines[1:] or not isinstance(earlier, dict)):
                    raise UserError(
                        f"--out: {path} holds results of another evaluation "
                        f"({_difference(earlier, header['fingerprint'])}). Give another --out, "
                        f"or --overwrite to replace them."
                    )
                lines = []  # it is to be replaced, or was stopped before its first result
            self.records = [_parse(path, line, "--out") for line in lines[1:]]
        try:
            if lines:
                # An interrupted write leaves an incomplete line, which must not join the next one.
                os.truncate(path, sum(len(line.encode()) + 1 for line in lines))
            else:
                make_folder(path.parent)
                path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        except OSError as error:
            raise self._refusal(error) from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Keep one more result.

        Raises:
            UserError: the file cannot be written; the results before are untouched.
        """
        record = dict(record)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(encoded(record) + "\n")
        except OSError as error:
            raise self._refusal(error) from error
        self.records.append(record)

    def _refusal(self, error: OSError) -> UserError:
        return UserError(f"--out: cannot write {self.path}: {error.strerror or error}.")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.records)


def read_records(path: Path, option: str) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Return the fingerprint and the records of a file, to compare with; None if there is none.

    Args:
        option: the option that has led here, for messages.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    lines = _complete_lines(path, option)
    if not lines:
        return None
    header, *records = [_parse(path, line, option) for line in lines]
    return header.get("fingerprint") or {}, records


def fingerprint_of(path: Path) -> dict[str, Any] | None:
    """Return what the results in a file depend on; None: there are none, or it holds something
    else, which is nobody's to judge here."""
    try:
        with path.open("rb") as file:
            header = decoded(file.readline().decode())
    except (OSError, ValueError):
        return None
    found = header.get("fingerprint")
    return found if isinstance(found, dict) else None


def _complete_lines(path: Path, option: str) -> list[str]:
    try:
        return path.read_bytes().decode().split("\n")[:-1] if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: cannot read {path}: {error}.") from error


def _line_of_another(path: Path) -> list[str]:
    """Return the only line of a file where it is not the beginning of a header, which was cut off:
    somebody else's."""
    start = b'{"fingerprint": '
    content = path.read_bytes() if path.exists() else b""
    is_cut_off = content[: len(start)] == start[: len(content)]
    return [] if is_cut_off else [content.decode()]


def _parse(path: Path, line: str, option: str) -> dict[str, Any]:
    try:
        return decoded(line)
    except ValueError:
        raise UserError(
            f"{option}: {path} is damaged. Choose another {option}, or delete that file."
        ) from None


def _difference(earlier: Any, now: Mapping[str, Any]) -> str:
    if not isinstance(earlier, dict):
        return "it does not say which"
    names = [name for name in now.keys() | earlier.keys() if earlier.get(name) != now.get(name)]
    return ", ".join(f"{n} was {earlier.get(n)}, is {now.get(n)}" for n in sorted(names))
