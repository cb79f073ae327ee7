"""Pages: one HTML file each, which needs no other file and is readable on light and on dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.report.tables import Table

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup


@dataclass(frozen=True)
class Entry:
    """Something that is named and described, with a message that is shown as it is."""

    name: str
    text: str
    message: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page, in the order of its fields."""

    title: str
    """Empty: it follows the page's own title."""
    note: str = ""
    figure: Markup | None = None
    tables: Sequence[Table] = ()
    entries: Sequence[Entry] = ()


@dataclass(frozen=True)
class Page:
    """Content of a page; everything is text, and is escaped, but the figures."""

    title: str
    sections: Sequence[Section]
    subtitle: str = ""
    conclusions: Sequence[str] = ()
    """Those that begin with Alarm or Warning stand out."""
    notes: Sequence[str] = ()
    generator: str = ""
    """The mark of the command that wrote it, see `finetune.kept.Output`."""


def html_page(page: Page) -> str:
    """Return the page as HTML."""
    return _template().render(page=page)


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html")
