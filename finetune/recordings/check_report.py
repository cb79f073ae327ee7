"""What `moshi-ttt data check` found, as lines, as a table, and as JSON."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from finetune.data import Finding
from finetune.errors import counted
from finetune.kept import MARK, mark_of
from finetune.recordings.files import listed
from finetune.recordings.options import CHECK


@dataclass(frozen=True)
class Checked:
    """A recording, or a line that names none, and what was found."""

    origin: str
    path: str
    duration_sec: float
    sample_rate_hz: int
    num_channels: int
    findings: list[Finding]

    @property
    def has_errors(self) -> bool:
        return any(finding.severity == "error" for finding in self.findings)


@dataclass(frozen=True)
class Report:
    """A report says what was found in each recording, and in all of them together."""

    data: Path
    checked: list[Checked]
    together: list[Finding]
    notes: list[str]
    said_before: Sequence[str] = ()
    """Notes that a terminal has shown when these recordings were inspected."""

    @property
    def num_errors(self) -> int:
        """Recordings on which training would be wrong."""
        return sum(each.has_errors for each in self.checked)

    @property
    def duration_sec(self) -> float:
        return sum(each.duration_sec for each in self.checked)

    def all_findings(self) -> Iterator[tuple[str, Finding]]:
        """Yield where each finding is, and the finding; errors first."""
        found = [(str(self.data), finding) for finding in self.together]
        found += [(each.origin, finding) for each in self.checked for finding in each.findings]
        yield from sorted(found, key=lambda item: item[1].severity != "error")


def summary_table(report: Report) -> Table | None:
    """Return a table of the kinds of findings, for a terminal; None: nothing was found."""
    kinds = Counter((finding.severity, finding.code) for _, finding in report.all_findings())
    if not kinds:
        return None
    table = Table(show_edge=False, pad_edge=False)
    for column in ("", "kind", "how many", "what to do"):
        table.add_column(column, justify="right" if column == "how many" else "left")
    remedies = {finding.code: finding.remedy for _, finding in report.all_findings()}
    for (severity, code), count in kinds.items():
        color = "red" if severity == "error" else "yellow"
        table.add_row(f"[{color}]{severity}[/]", code, str(count), escape(remedies[code]))
    return table


def sentences(report: Report) -> Iterator[str]:
    """Yield what is to be said below the table: all errors, and a warning of each kind."""
    errors: list[str] = []
    warnings: dict[str, str] = {}
    for where, finding in report.all_findings():
        line = f"{where}: {finding.message} [{finding.code}]"
        if finding.severity == "error":
            errors.append(line)
        else:
            warnings.setdefault(finding.code, line)
    if errors:
        yield f"errors, {listed(errors)}"
    if warnings:
        yield f"a warning of each kind, {listed(warnings.values())}"
    num_warned = sum(bool(each.findings) and not each.has_errors for each in report.checked)
    yield (
        f"{counted(len(report.checked), 'recording')}, {report.duration_sec / 3600:.2f} h: "
        f"{report.num_errors} with errors, {num_warned} with warnings alone"
    )
    yield from (f"note: {note}" for note in report.notes if note not in report.said_before)


def as_json(report: Report) -> dict[str, Any]:
    """Return a report as JSON has it."""
    return {
        MARK: mark_of(CHECK),
        "data": str(report.data),
        "num_recordings": len(report.checked),
        "num_with_errors": report.num_errors,
        "duration_sec": report.duration_sec,
        "together": [finding._asdict() for finding in report.together],
        "recordings": [
            {**vars(each), "findings": [finding._asdict() for finding in each.findings]}
            for each in report.checked
        ],
        "notes": report.notes,
    }
