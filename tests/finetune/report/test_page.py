"""Pages, figures and tables of all reports: whatever a name holds, it is text on the page."""

import csv
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from finetune.report import (
    Entry,
    Page,
    Section,
    Table,
    html_page,
    line_style,
    plain,
    png_element,
    signed,
    svg_element,
    tidy,
    write_csv,
)

HOSTILE = "<script>alert('&\")</script>"
ESCAPED = "&lt;script&gt;alert(&#39;&amp;&#34;)&lt;/script&gt;"


def test_everything_that_is_told_is_text() -> None:
    section = Section(
        HOSTILE,
        note=HOSTILE,
        figure=png_element(b"picture", alt=HOSTILE),
        tables=[Table([HOSTILE], [[HOSTILE]])],
        entries=[Entry(HOSTILE, HOSTILE, HOSTILE)],
    )
    page = html_page(Page(HOSTILE, [section], HOSTILE, [HOSTILE], [HOSTILE]))
    assert "<script" not in page
    # Title and heading, subtitle, conclusion, note; of the section: title, note, picture, table
    # twice, entry three times.
    assert page.count(ESCAPED) == 13


def test_the_text_in_a_figure_is_escaped() -> None:
    figure = Figure()
    figure.subplots().set_title(HOSTILE.replace("$", ""))
    page = html_page(Page("Figures", [Section("One", figure=svg_element(figure))]))
    assert "<svg" in page and "<script" not in page


def test_what_is_wrong_stands_out_and_what_is_empty_is_left_out() -> None:
    table = Table(("name", "value"), [("a", 1), ("b", 2)], alarming=[1])
    empty = Section("Nothing", tables=[Table(("lonely",), [])])
    page = html_page(
        Page("Report", [Section("", tables=[table]), empty], "", ["Alarm: b.", "Fine."])
    )
    assert '<tr class="alarm"><td>b</td><td>2</td></tr>' in page
    assert '<li class="alarm">Alarm: b.</li>' in page and "<li>Fine.</li>" in page
    assert "<tr><td>a</td><td>1</td></tr>" in page and "lonely" not in page
    assert "<h2>Nothing</h2>" in page and "<h2></h2>" not in page


def test_a_page_is_readable_on_light_and_on_dark() -> None:
    page = html_page(Page("Report", []))
    assert "color-scheme: light dark" in page and "prefers-color-scheme: dark" in page
    # Every color of the page is one that the dark scheme has too, but the paper of the figures.
    rules = page[page.index("body {") : page.index("</style>")]
    assert [line for line in rules.splitlines() if "#" in line] == [
        "figure { margin: .8rem 0; background: #fff; border-radius: 4px; padding: .4rem; }"
    ]


def test_curves_are_told_apart() -> None:
    styles = [tuple(line_style(number).values()) for number in range(24)]
    assert len({*styles}) == 24


def test_axes_have_no_frame_but_what_is_read() -> None:
    axes = Figure().subplots()
    tidy(axes)
    shown = [side for side, spine in axes.spines.items() if spine.get_visible()]
    assert shown == ["left", "bottom"]


def test_estimates_as_text() -> None:
    estimate: dict[str, Any] = {"value": -0.5, "low": -0.75, "high": 0.25}
    assert (
        signed(estimate, 2) == "−0.50 [−0.75, +0.25]" and plain(estimate, 1) == "−0.5 [−0.8, 0.2]"
    )
    assert signed({"value": 1.0, "low": None, "high": None}, 1) == "+1.0"
    assert plain({"value": None, "low": None, "high": None}) == "–"


def test_tables_for_spreadsheets(tmp_path: Path) -> None:
    write_csv(tmp_path / "table.csv", ("name", "value"), [("a,b", 1.5), ("é", None)])
    with (tmp_path / "table.csv").open(encoding="utf-8") as file:
        assert [*csv.reader(file)] == [["name", "value"], ["a,b", "1.5"], ["é", ""]]
