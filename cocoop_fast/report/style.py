"""How plots look: one palette for paper, screen and dark screen, told apart by people of any colour vision."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cocoop_fast.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Light and dark. In files the light ones are used; in the page a plot follows the reader's choice.
INK, MUTED, GRID, ON_FILL = "#1b1f24", "#57606b", "#d7dde3", "#fefefe"
DARK = {INK: "#e8ecf0", MUTED: "#a5afba", GRID: "#3a424c", ON_FILL: "#0d1116"}

# Okabe and Ito's palette, lightened for dark screens where a colour needs it.
ORANGE, BLUE, GREY, GREEN, PINK = "#d55e00", "#0072b2", "#8c8c8c", "#009e73", "#cc79a7"
DARK |= {ORANGE: "#f0883e", BLUE: "#56b4e9", GREY: "#9e9e9e", GREEN: "#3fc99b", PINK: "#e3a1c5"}

PALETTE = {"orange": ORANGE, "blue": BLUE, "grey": GREY, "green": GREEN, "pink": PINK}
# Beside the colours, so that plots can be read without them.
HATCHES = ("", "//", "--", "xx", "\\\\", "||")
LINES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1.5)), (0, (4, 1, 1, 1, 1, 1)), (0, (1, 3)))
# As many as classes are named in a plot: each has a form of its own. Of 12 and 5 no pair of form and colour repeats.
MARKERS: tuple[Any, ...] = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", (4, 1, 0))
CLASS_COLOURS = (BLUE, ORANGE, GREEN, PINK, GREY)

WIDTH = 4.3  # inches: as wide as a phone's screen, so that text keeps its size there
DPI = 200

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_SETTINGS: Any = {
    "font.size": 9,
    "axes.labelsize": 9,
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 8.5),
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), INK),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), MUTED),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.5,
    "hatch.color": ON_FILL,
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in a class name is a dollar sign
    "svg.fonttype": "none",  # words stay words: they can be searched, and need no font of ours
    "svg.hashsalt": "cocoop_fast",  # the same plot is the same file
}


@dataclass(frozen=True)
class Picture:
    """A plot.

    Args:
        name: of its files, without a suffix.
        svg, png: the files.
        alt: what it shows, for those who do not see it.
        caption: how to read it.
        width, height: inches.
    """

    name: str
    svg: str
    png: bytes
    alt: str
    caption: str
    width: float
    height: float

    @property
    def uri(self) -> str:
        """For the page: the SVG with colours that follow the reader's light or dark screen."""
        return "data:image/svg+xml;base64," + base64.b64encode(themed(self.svg).encode()).decode()


@contextmanager
def drawing(height: float, **panels: Any) -> Iterator[tuple[Any, Any]]:
    """A figure in the report's style and its axes. Within it, :func:`picture` renders the figure.

    Args:
        height: inches.
        panels: of ``Figure.subplots``, if there are several.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "A report needs matplotlib, which is not installed; run `pip install matplotlib`.", exit_status=1
        ) from error
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, figure.subplots(**panels)


def picture(figure: Figure, name: str, *, alt: str, caption: str) -> Picture:
    """Render a figure, on a transparent ground as SVG and on white as PNG."""
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Title": name})
    figure.savefig(png, format="png", dpi=DPI, facecolor="white")
    width, height = figure.get_size_inches()
    return Picture(name, svg.getvalue().decode(), png.getvalue(), alt, caption, float(width), float(height))


def themed(svg: str) -> str:
    """The same plot with a variable in place of each colour of the palette, and the reader's own font."""
    names = {light: f"--c{light[1:]}" for light in DARK}
    svg = re.sub(
        "#[0-9a-f]{6}", lambda found: f"var({names[found[0]]})" if found[0] in names else found[0], svg
    )
    svg = re.sub(r"(font(?:-family)?: [^;\"]*?)'DejaVu Sans'[^;\"]*", rf"\g<1>{_FONT}", svg)
    light = ";".join(f"{names[colour]}:{colour}" for colour in DARK)
    dark = ";".join(f"{names[colour]}:{other}" for colour, other in DARK.items())
    style = f"<style>svg{{{light}}}@media screen and (prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    return re.sub(r"(<svg\b[^>]*>)", lambda found: found[1] + style, svg, count=1)
