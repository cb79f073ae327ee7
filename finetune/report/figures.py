"""The palette and the style of axes of all figures, and figures as elements of a page."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any, Literal

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
