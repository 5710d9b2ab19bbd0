"""Charts with a row or a column for each of some names: dots with intervals, and bars side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from twotower.evaluation.page import svg
from twotower.evaluation.page.chart import (
    BOTTOM,
    COLOURS,
    RIGHT,
    WIDTH,
    Chart,
    Key,
    Table,
    frame,
    target,
    tip,
)
from twotower.evaluation.page.numbers import clean, score, short
from twotower.evaluation.page.svg import Scale

_ROW = 27.0
_HEAD, _FOOT = 4.0, 20.0
_NAME = 24
"""Characters of a row's name, at most."""


@dataclass(frozen=True)
class Dot:
    """A value in a row."""

    series: str
    value: float
    style: int = 0
    low: float | None = None
    """Lower end of its interval."""
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """A name and its values."""

    name: str
    dots: Sequence[Dot]
    note: str = ""
    """Said in the tip."""


def dot_chart(
    title: str,
    rows: Sequence[Row],
    *,
    summary: str,
    x_label: str = "",
    text: Callable[[float], str] = score,
    zero: bool = True,
    keys: Sequence[Key] = (),
    table: Table | None = None,
    note: str = "",
    reference: float | None = None,
) -> Chart | None:
    """Return dots on a common axis, one row a name; None where there is no dot.

    Args:
        title: of the chart.
        rows: from above to below.
        summary: for who does not see it.
        x_label: what the axis is.
        text: a value for people.
        zero: the axis begins at 0.
        keys: of the legend.
        table: what stands below it.
        note: said below it.
        reference: value that has a line of its own, such as no difference.
    """
    rows = [row for row in rows if row.dots]
    if not rows:
        return None
    ends = [v for row in rows for dot in row.dots for v in (dot.value, dot.low, dot.high)]
    names = [clean(row.name, _NAME) for row in rows]
    single = all(len(row.dots) == 1 for row in rows)
    room = svg.width_of([text(row.dots[0].value) for row in rows]) + 8 if single else 8
    left = svg.width_of(names) + 10
    bottom = _HEAD + _ROW * len(rows)
    height = bottom + _FOOT + (16 if x_label else 0)
    scale = svg.linear([*ends, reference], left, WIDTH - room, zero=zero)
    drawn: list[Markup] = []
    taken = -1e9
    for value in scale.ticks(4):
        label, middle = short(value), scale(value)
        drawn.append(svg.line(middle, _HEAD, middle, bottom, "grid"))
        if middle - svg.width_of([label]) / 2 > taken + 6:
            drawn.append(svg.text(label, middle, bottom + 15, "middle"))
            taken = middle + svg.width_of([label]) / 2
    if x_label:
        drawn.append(svg.text(x_label, (left + WIDTH - room) / 2, height - 4, "middle", "axis"))
    if reference is not None:
        drawn.append(svg.line(scale(reference), _HEAD, scale(reference), bottom, "rule"))
    bands = []
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        middle = _HEAD + _ROW * (number + 0.5)
        drawn.append(svg.text(name, left - 8, middle + 4, "end", "name"))
        places = [scale(dot.value) for dot in row.dots]
        if len(places) > 1:
            drawn.append(svg.line(min(places), middle, max(places), middle, "between"))
        drawn += [_dot(dot, scale, middle) for dot in reversed(row.dots)]
        if single:
            drawn.append(svg.text(text(row.dots[0].value), WIDTH, middle + 4, "end", "value"))
        lines: list[tuple[int | None, str, str]] = [(None, clean(row.name), row.note)]
        for dot in row.dots:
            lines.append((dot.style % COLOURS, dot.series, text(dot.value)))
            if dot.low is not None and dot.high is not None:
                lines.append((None, "95% interval", f"{text(dot.low)} to {text(dot.high)}"))
        bands.append(
            target(tip(*lines), svg.rectangle(0, middle - _ROW / 2, WIDTH, _ROW, "band"), class_="hit row")
        )
    return Chart(
        title,
        summary,
        Markup("").join([svg.group(*bands, class_="hits"), svg.group(*drawn, class_="axes over")]),
        table,
        list(keys),
        note,
        height=height,
        near="y",
    )


def _dot(dot: Dot, scale: Scale, middle: float) -> Markup:
    parts = []
    if dot.low is not None and dot.high is not None:
        low, high = scale(dot.low), scale(dot.high)
        parts = [
            svg.line(low, middle, high, middle, "whisker"),
            svg.line(low, middle - 4, low, middle + 4, "whisker"),
            svg.line(high, middle - 4, high, middle + 4, "whisker"),
        ]
    parts.append(svg.shape(dot.style, scale(dot.value), middle, 1.25))
    return svg.group(*parts, class_=f"s{dot.style % COLOURS}")


def bar_chart(
    title: str,
    names: Sequence[str],
    labels: Sequence[str],
    series: Sequence[tuple[str, Sequence[float], int]],
    *,
    x_label: str,
    y_label: str,
    summary: str,
    text: Callable[[float], str],
    axis: Callable[[float], str],
    table: Table | None = None,
    note: str = "",
) -> Chart | None:
    """Return columns side by side for each name; None where there is no name.

    Args:
        title: of the chart.
        names: [n], of the columns.
        labels: [n], below the columns.
        series: names, values [n] each, and which colour they have.
        x_label: below the axis.
        y_label: above the axis.
        summary: for who does not see it.
        text: a value for people.
        axis: a value beside the axis.
        table: what stands below it.
        note: said below it.
    """
    if not names:
        return None
    x = Scale(-0.5, len(names) - 0.5, 0, 1)
    y = svg.linear([v for _, values, _ in series for v in values], 0, 1, zero=True)
    y_ticks = [(v, axis(v)) for v in y.ticks(5)]
    area = frame(x, y, list(enumerate(labels)), y_ticks, x_label, y_label)
    slot = (RIGHT - area.left) / len(names)
    wide = min(slot * 0.8 / max(len(series), 1), 26.0)
    drawn, bands = [area.axes], []
    for number, (_, values, style) in enumerate(series):
        bars = []
        for place, value in enumerate(values):
            start = area.x(place) + wide * (number - len(series) / 2)
            bars.append(svg.rectangle(start + 0.5, area.y(value), wide - 1, BOTTOM - area.y(value), "bar"))
        drawn.append(svg.group(*bars, class_=f"s{style % COLOURS}"))
    for place, name in enumerate(names):
        rows = [(style % COLOURS, each, text(values[place])) for each, values, style in series]
        band = svg.rectangle(area.x(place) - slot / 2, area.top, slot, area.bottom - area.top, "band")
        bands.append(target(tip((None, f"{x_label}: {name}", ""), *rows), band))
    drawn.append(svg.group(*bands, class_="hits"))
    keys = [Key(style % COLOURS, name, "area") for name, _, style in series]
    return Chart(title, summary, Markup("").join(drawn), table, keys, note)
