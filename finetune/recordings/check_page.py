"""An HTML page shows what `moshi-ttt data check` found."""

from collections import Counter

from finetune.kept import mark_of
from finetune.recordings.check_report import Report, sentences
from finetune.recordings.options import CHECK
from finetune.report import Page, Section, Table, html_page

_MAX_PER_KIND = 200


def page_of(report: Report) -> str:
    """Return the page: kinds with counts, then all findings, errors first."""
    found = list(report.all_findings())
    kinds = Counter((finding.severity, finding.code) for _, finding in found)
    remedies = {finding.code: finding.remedy for _, finding in found}
    *_, summary = (line for line in sentences(report) if not line.startswith("note: "))
    good = [] if found else ["Nothing wrong was found."]
    by_kind = Table(
        ("", "kind", "how many", "what to do"),
        [(*kind, count, remedies[kind[1]]) for kind, count in kinds.items()],
        wraps=True,
        alarming=[row for row, kind in enumerate(kinds) if kind[0] == "error"],
    )
    rows, shown = [], Counter[str]()
    for where, finding in found:
        shown[finding.code] += 1
        if shown[finding.code] <= _MAX_PER_KIND:
            rows.append((finding.severity, finding.code, where, finding.message))
    left_out = len(found) - len(rows)
    note = f"{left_out} more are not shown here; --json has all." if left_out else ""
    all_found = Table(
        ("", "kind", "where", "what"),
        rows,
        wraps=True,
        alarming=[row for row, each in enumerate(rows) if each[0] == "error"],
    )
    return html_page(
        Page(
            f"Check of {report.data}",
            [
                Section("Kinds", tables=[by_kind]),
                Section("All of them", note=note, tables=[all_found]),
            ]
            if found
            else [],
            conclusions=[summary, *good],
            notes=report.notes,
            generator=mark_of(CHECK),
        )
    )
