"""Tables, for pages and for spreadsheets, and estimates as text."""

import csv
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.kept import write_whole


@dataclass(frozen=True)
class Table:
    """Rows of cells under their headings."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    wraps: bool = False
    """Whether lines may break inside a cell."""
    alarming: Collection[int] = ()
    """Numbers of the rows that are to be seen first."""


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table for spreadsheets.

    Raises:
        UserError: it cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def markdown_lines(table: Table) -> list[str]:
    """Return a table as lines of Markdown."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return [f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines]


def duration_text(duration_sec: float) -> str:
    """Return a duration as `30 s`, `8 min` or `1 h`."""
    for size, unit in ((3600, "h"), (60, "min")):
        if duration_sec >= size:
            return f"{duration_sec / size:.3g} {unit}"
    return f"{duration_sec:.3g} s"


def signed(estimate: Mapping[str, float | None], digits: int = 4) -> str:
    """Return an estimate as `−0.0123 [−0.0150, −0.0100]`; without an interval where there is none,
    and a dash where there is no value."""
    if estimate["value"] is None:
        return "–"
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    text = f"{value:+.{digits}f}"
    if low is not None and high is not None:
        text += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return text.replace("-", "−")


def plain(estimate: Mapping[str, float | None], digits: int = 3) -> str:
    """Return the same without plus signs."""
    return signed(estimate, digits).replace("+", "")
