"""The palette and the style of axes of all figures, and figures as elements of a page."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.kept import mark_of, write_whole
from finetune.report.tables import duration_text

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colors of what is compared, in their order: of Okabe and Ito, safe for the color-blind."""
DARK, MUTED = "#444444", "#777777"
"""For what others are compared with, and for what is only mentioned."""
ALARM = "#c62828"
PICTURE: dict[str, Any] = {"dpi": 130, "layout": "constrained"}
"""How every figure that is saved as PNG is made."""
GRID = "#e6e6e6"
_TICKS_SEC = (1, 3, 10, 30, 60, 180, 600, 1800, 3600, 10800, 36000)
_FEWER_TICKS_SEC = (1, 10, 60, 600, 3600, 36000)
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))


def line_style(number: int) -> dict[str, Any]:
    """Return color and dashes of the curve with this number; no two of the first 24 are alike."""
    return {
        "color": COLORS[number % len(COLORS)],
        "linestyle": _DASHES[number // len(COLORS) % len(_DASHES)],
    }


def tidy(axes: Axes, *, grid: Literal["x", "y", "both"] = "both") -> None:
    """Give axes the common style: a faint grid, and no frame but the two axes.

    Args:
        grid: `x` is for rows that are named at the left, which need no axis there.
    """
    axes.grid(axis=grid, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    hidden = ["top", "right"]
    if grid == "x":
        axes.tick_params(left=False)
        hidden.append("left")
    axes.spines[hidden].set_visible(False)


def time_axis(axes: Axes, longest_sec: float) -> None:
    """Give axes a logarithmic axis of time whose ticks people know: 30 s, 1 min, 1 h.

    Args:
        longest_sec: the tick where none of the others is in sight.
    """
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    known = _TICKS_SEC if high / low < 300 else _FEWER_TICKS_SEC
    ticks = [float(tick) for tick in known if low <= tick <= high] or [longest_sec]
    axes.set_xticks(ticks, [duration_text(tick) for tick in ticks])
    axes.minorticks_off()


def save_png(figure: Figure, path: Path, command: str = "") -> None:
    """Write a figure that is there as a whole, or not at all; its folder is made.

    Args:
        command: whose mark it gets, see `finetune.kept.Output`.

    Raises:
        UserError: it cannot be written.
    """
    target = io.BytesIO()
    metadata = {"Software": mark_of(command)} if command else None
    figure.savefig(target, format="png", metadata=metadata)
    write_whole(path, target.getvalue())


def svg_element(figure: Figure) -> Markup:
    """Return the figure as an element of a page; matplotlib escapes the text in it."""
    import matplotlib
    from markupsafe import Markup

    target = io.StringIO()
    # The salt makes ids, and so the page, the same for the same results.
    with matplotlib.rc_context({"svg.hashsalt": "moshi-ttt"}):
        figure.savefig(target, format="svg", metadata={"Date": None})
    svg = target.getvalue()
    return Markup(svg[svg.index("<svg") :])


def png_element(png: bytes, *, alt: str) -> Markup:
    """Return a picture, which is in the page itself, as an element of it."""
    from markupsafe import Markup

    data = base64.b64encode(png).decode()
    return Markup('<img alt="{}" src="data:image/png;base64,{}">').format(alt, data)
