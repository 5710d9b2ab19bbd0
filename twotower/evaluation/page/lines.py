"""Charts of lines: values of several series over one axis."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from twotower.evaluation.page import svg
from twotower.evaluation.page.chart import (
    COLOURS,
    Chart,
    Frame,
    Key,
    Table,
    beside,
    cells,
    frame,
    target,
    tip,
)
from twotower.evaluation.page.numbers import NONE, is_number, score, short

_MARKED = 12
"""Points of a line that each have a marker, at most."""
_LISTED = 40
"""Rows of the table below a chart, at most."""


@dataclass(frozen=True)
class Series:
    """Points of one thing."""

    name: str
    points: Sequence[tuple[float, float]]
    """(x, y), x ascending."""
    style: int = 0
    """Which colour, dash and marker."""

    @classmethod
    def of(cls, name: str, xs: Sequence[float], ys: Sequence[object], style: int) -> Series:
        """Return a series of the values that are numbers."""
        return cls(name, [(x, float(y)) for x, y in zip(xs, ys, strict=False) if is_number(y)], style)  # type: ignore[arg-type]


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    x_name: str,
    summary: str,
    x_text: Callable[[float], str] = short,
    y_text: Callable[[float], str] = score,
    log_x: bool = False,
    zero: bool = True,
    whole: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    note: str = "",
) -> Chart | None:
    """Return lines over a common axis; None where there is no point.

    Args:
        title: of the chart.
        series: at least one.
        x_label: below the axis.
        y_label: above the axis.
        x_name: what x is, for the table and the tips.
        summary: for who does not see it.
        x_text: a value of x for people.
        y_text: a value of y for people.
        log_x: a logarithmic axis.
        zero: y begins at 0.
        whole: x has whole numbers only.
        marks: values of x that have a line of their own, with labels.
        note: said below it.
    """
    series = [each for each in series if each.points]
    if not series:
        return None
    xs = sorted({x for each in series for x, _ in each.points})
    ys = [y for each in series for _, y in each.points]
    x = svg.logarithmic(xs, 0, 1) if log_x else svg.Scale(xs[0], xs[-1], 0, 1)
    if x.low == x.high:
        x = svg.Scale(x.low - 1, x.high + 1, 0, 1)
    x_ticks = [v for v in (xs if whole and len(xs) <= 8 else x.ticks(7)) if not whole or v == int(v)]
    y = svg.linear(ys, 0, 1, zero=zero)
    area = frame(
        x,
        y,
        [(v, x_text(v)) for v in x_ticks],
        [(v, short(v)) for v in y.ticks(5)],
        x_label,
        y_label,
    )
    inside = [mark for mark in marks if x.low <= mark[0] <= x.high]
    # The first series is what the page is about: it lies on top.
    drawn = [_line(each, area) for each in reversed(series)]
    table = Table(
        title,
        [x_name, *(each.name for each in series)],
        [
            cells(x_text(v), *(y_text(known[v]) if v in known else NONE for known in map(_values, series)))
            for v in _thinned(xs)
        ],
    )
    return Chart(
        title,
        summary,
        Markup("").join(
            [
                area.axes,
                *(svg.line(area.x(v), area.top, area.x(v), area.bottom, "rule") for v, _ in inside),
                *drawn,
                *(beside(area, v, label, area.bottom - 6) for v, label in inside),
                _bands(series, xs, area, x_name, x_text, y_text),
            ]
        ),
        table,
        [Key(each.style % COLOURS, each.name) for each in series] if len(series) > 1 else [],
        note,
    )


def _values(series: Series) -> dict[float, float]:
    return dict(series.points)


def _thinned(xs: Sequence[float]) -> list[float]:
    step = -(-len(xs) // _LISTED)
    return [*xs[:-1:step], xs[-1]]


def _line(series: Series, area: Frame) -> Markup:
    places = [(area.x(x), area.y(y)) for x, y in series.points]
    step = -(-len(places) // _MARKED)
    markers = [svg.shape(series.style, *at) for at in places[::step]]
    if len(places) > 1:
        markers.insert(0, svg.polyline(places, "line"))
    return svg.group(*markers, class_=f"s{series.style % COLOURS}")


def _bands(
    series: Sequence[Series],
    xs: Sequence[float],
    area: Frame,
    x_name: str,
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
) -> Markup:
    """What the pointer can be at: for each value of x the strip that is nearest to it."""
    known = [_values(each) for each in series]
    places = [area.x(v) for v in xs]
    edges = [area.left, *((a + b) / 2 for a, b in itertools.pairwise(places)), area.right]
    bands = []
    for number, v in enumerate(xs):
        here = [(values[v], each) for each, values in zip(series, known, strict=True) if v in values]
        # The best comes first, as on the picture.
        here.sort(key=lambda pair: -pair[0])
        rows = [(each.style % COLOURS, each.name, y_text(value)) for value, each in here]
        width = edges[number + 1] - edges[number]
        bands.append(
            target(
                tip((None, f"{x_name} {x_text(v)}", ""), *rows),
                svg.rectangle(edges[number], area.top, width, area.bottom - area.top, "band"),
                svg.line(places[number], area.top, places[number], area.bottom, "guide"),
            )
        )
    return svg.group(*bands, class_="hits")


def step_chart(
    title: str,
    edges: Sequence[float],
    counts: Sequence[int],
    marks: Sequence[tuple[float, str, str]],
    *,
    x_label: str,
    y_label: str,
    summary: str,
    note: str = "",
    table: Table | None = None,
    x_text: Callable[[float], str] = short,
) -> Chart | None:
    """Return a histogram; None where there is nothing in it.

    Args:
        title: of the chart.
        edges: [n + 1] ascending.
        counts: [n].
        marks: values of x with a line, their labels and classes; labels lie in rows of their own.
        x_label: below the axis.
        y_label: above the axis.
        summary: for who does not see it.
        note: said below it.
        table: what stands below it.
        x_text: a value of x for people.
    """
    total = sum(counts)
    if not total or len(edges) != len(counts) + 1:
        return None
    x, y = svg.Scale(edges[0], edges[-1], 0, 1), svg.linear(counts, 0, 1, zero=True)
    area = frame(
        x,
        y,
        [(v, x_text(v)) for v in x.ticks(8)],
        [(v, short(v)) for v in y.ticks(4) if v == int(v)],
        x_label,
        y_label,
    )
    inside = [mark for mark in marks if x.low <= mark[0] <= x.high]
    bars, bands = [], []
    for low, high, number in zip(edges, edges[1:], counts, strict=False):
        left, right = area.x(low), area.x(high)
        bars.append(
            svg.rectangle(left + 0.4, area.y(number), right - left - 0.8, area.bottom - area.y(number), "bar")
        )
        label = f"{x_text(low)} to {x_text(high)}"
        bands.append(
            target(
                tip((None, label, ""), (0, y_label, f"{number:,} ({number / total:.1%})")),
                svg.rectangle(left, area.top, right - left, area.bottom - area.top, "band"),
            )
        )
    return Chart(
        title,
        summary,
        Markup("").join(
            [
                area.axes,
                svg.group(*bars, class_="s0"),
                *(svg.line(area.x(v), area.top, area.x(v), area.bottom, c) for v, _, c in inside),
                *(
                    beside(area, v, label, area.top + 10 + 15 * row)
                    for row, (v, label, _) in enumerate(inside)
                ),
                svg.group(*bands, class_="hits"),
            ]
        ),
        table,
        note=note,
    )
