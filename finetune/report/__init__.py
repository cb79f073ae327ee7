"""This package makes what people are shown: tables, figures in one palette, pages of one template.

It imports nothing heavy: matplotlib and Jinja2 come with the first figure and the first page.
"""

from finetune.report.figures import (
    ALARM,
    COLORS,
    DARK,
    GRID,
    MUTED,
    PICTURE,
    line_style,
    png_element,
    save_png,
    svg_element,
    tidy,
    time_axis,
)
from finetune.report.page import Entry, Page, Section, html_page
from finetune.report.tables import (
    Table,
    duration_text,
    markdown_lines,
    plain,
    signed,
    write_csv,
)

__all__ = [
    "ALARM",
    "COLORS",
    "DARK",
    "GRID",
    "MUTED",
    "PICTURE",
    "Entry",
    "Page",
    "Section",
    "Table",
    "duration_text",
    "html_page",
    "line_style",
    "markdown_lines",
    "plain",
    "png_element",
    "save_png",
    "signed",
    "svg_element",
    "tidy",
    "time_axis",
    "write_csv",
]
