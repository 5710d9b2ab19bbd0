"""What a chart of the page is, and the frame that charts are drawn in.

A chart is drawn for a width of 400 pixels, which a phone has, and lies beside another where there is room.
What it shows stands in a table below it as well, and at each mark as ``data-tip``: lines of a series' number
(or nothing), a name and a value, apart by tabs. The script of the page shows them for pointer and keyboard;
without it there is the element's title.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from twotower.evaluation.page import svg
from twotower.evaluation.page.svg import Scale

WIDTH, HEIGHT = 400.0, 260.0
COLOURS = 8
"""Series that have a colour, a dash and a marker of their own; further ones begin again."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    note: str = ""
    """Said below it, small, such as an interval."""
    strong: bool = False
    number: bool = True


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows."""

    caption: str
    columns: list[str]
    """The first column's too."""
    rows: list[list[Cell]]
    marked: int | None = None
    """Row that is told apart from the others."""
    folded: bool = False
    """Shown on request."""


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    series: int
    name: str
    kind: str = "line"
    """``line``, ``area`` or ``mark``."""

    @property
    def marker(self) -> Markup:
        """The series' marker, in a drawing of 22 by 12 pixels."""
        return svg.shape(self.series, 11, 6)


@dataclass(frozen=True)
class Chart:
    """A drawing, what it says in words, and its values."""

    title: str
    summary: str
    """What a reader who does not see it has to know, a sentence or two."""
    drawing: Markup
    """Elements inside the ``svg``."""
    table: Table | None = None
    keys: list[Key] = field(default_factory=list)
    note: str = ""
    """Said below it."""
    width: float = WIDTH
    height: float = HEIGHT
    near: str = "x"
    """How the script finds the mark that is meant: nearest by ``x``, by ``y``, or by both (``xy``)."""
    kind: str = ""
    """Class of the figure, for the style sheet."""


def cells(name: str, *values: str) -> list[Cell]:
    """Return a row: its name, and its values."""
    return [Cell(name, number=False), *(Cell(value) for value in values)]


def tip(*lines: tuple[int | None, str, str]) -> str:
    """Return what ``data-tip`` holds of lines of a series (or None), a name and a value."""
    return "\n".join(f"{'' if series is None else series}\t{name}\t{value}" for series, name, value in lines)


def spoken(value: str) -> str:
    """Return a tip as text for an element's title."""
    found = []
    for row in value.split("\n"):
        _, name, number = row.split("\t")
        found.append(f"{name}: {number}" if name and number else name or number)
    return "\n".join(found)


def target(value: str, *content: Markup, class_: str = "hit") -> Markup:
    """Return what a pointer or the keyboard can be at, with its tip."""
    return svg.group(svg.element("title", spoken(value)), *content, class_=class_, data_tip=value)


@dataclass(frozen=True)
class Frame:
    """The area inside the axes, and the two scales."""

    x: Scale
    y: Scale
    axes: Markup

    @property
    def left(self) -> float:
        """Pixel of the left edge."""
        return self.x.start

    @property
    def right(self) -> float:
        """Pixel of the right edge."""
        return self.x.stop

    @property
    def top(self) -> float:
        """Pixel of the upper edge."""
        return self.y.stop

    @property
    def bottom(self) -> float:
        """Pixel of the lower edge."""
        return self.y.start


TOP, BOTTOM, RIGHT = 22.0, HEIGHT - 40.0, WIDTH - 12.0


def frame(
    x: Scale,
    y: Scale,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    x_label: str,
    y_label: str,
) -> Frame:
    """Return axes with grid lines at the ticks of y and labels at both.

    Args:
        x: its pixels are replaced: from behind the labels of y to the right edge.
        y: its pixels are replaced: from the lower edge to the upper one.
        x_ticks: values and their labels.
        y_ticks: values and their labels.
        x_label: said below the axis.
        y_label: said above the axis.
    """
    left = max(svg.width_of([label for _, label in y_ticks]) + 12, 30.0)
    x = Scale(x.low, x.high, left, RIGHT, x.log)
    y = Scale(y.low, y.high, BOTTOM, TOP, y.log)
    drawn = [svg.text(y_label, 2, 11, class_="axis")]
    for value, label in y_ticks:
        drawn.append(svg.line(left, y(value), RIGHT, y(value), "grid"))
        drawn.append(svg.text(label, left - 6, y(value) + 4, "end"))
    drawn.append(svg.line(left, BOTTOM, RIGHT, BOTTOM, "base"))
    taken = -1e9
    for value, label in x_ticks:
        middle, half = x(value), svg.width_of([label]) / 2
        if middle - half < taken + 8:
            continue
        at_edge = middle + half > WIDTH
        drawn.append(svg.line(middle, BOTTOM, middle, BOTTOM + 4, "base"))
        drawn.append(
            svg.text(label, WIDTH if at_edge else middle, BOTTOM + 17, "end" if at_edge else "middle")
        )
        taken = middle + half
    drawn.append(svg.text(x_label, (left + RIGHT) / 2, HEIGHT - 5, "middle", "axis"))
    return Frame(x, y, svg.group(*drawn, class_="axes"))


def beside(area: Frame, value: float, label: str, height: float) -> Markup:
    """Return the label of a value of x at a height, beside the value where there is room."""
    middle = area.x(value)
    after = middle + svg.width_of([label]) + 8 < WIDTH
    return svg.text(label, middle + (4 if after else -4), height, "start" if after else "end", "halo")
