"""Charts of points: the map of items, and what a setting did to a metric."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from markupsafe import Markup

from twotower.evaluation.page import svg
from twotower.evaluation.page.chart import COLOURS, Chart, Key, Table, cells, frame, target, tip
from twotower.evaluation.page.numbers import clean, count, score, share, short
from twotower.evaluation.page.svg import Scale
from twotower.evaluation.plots import OTHER

_SIDE_X, _SIDE_Y, _EDGE = 640.0, 480.0, 8.0
_LABELS = 16
"""Titles written on the map, at most."""
REST = "rest"
"""Class of what has no colour of its own."""


def map_chart(
    points: Sequence[tuple[float, float]], groups: Sequence[str], titles: Sequence[str | None], name: str
) -> Chart | None:
    """Return items on a map, coloured by group; None where there are none.

    Args:
        points: [M] places, the most popular item first.
        groups: [M] such as the main genre; the eight largest have a colour and a marker each.
        titles: [M].
        name: what a group is, such as ``genres``; empty where there are none.
    """
    if not len(points):
        return None
    xs, ys = [float(p[0]) for p in points], [float(p[1]) for p in points]
    x = _fitting(xs, _EDGE, _SIDE_X - _EDGE)
    y = _fitting(ys, _SIDE_Y - _EDGE, _EDGE)
    sizes = Counter(group for group in groups if group != OTHER)
    largest = [group for group, _ in sizes.most_common(COLOURS)]
    style = {group: number for number, group in enumerate(largest)}
    marks: dict[str, list[Markup]] = {group: [] for group in [OTHER, *largest]}
    for place, (group, title) in enumerate(zip(groups, titles, strict=True)):
        lines = [(style.get(group), clean(title or "no title"), ""), (None, clean(group, 40), "")]
        marks[group if group in style else OTHER].append(
            svg.element(
                "use",
                href=f"#m{style[group]}" if group in style else "#mr",
                x=x(xs[place]),
                y=y(ys[place]),
                data_tip=tip(*lines if name else lines[:1]),
                # Popular items come first where the keyboard goes from one to the next.
                data_place=str(place),
            )
        )
    shapes = [svg.element("g", svg.shape(s, 0, 0, 0.95), id=f"m{s}") for s in range(len(largest))]
    shapes.append(svg.element("g", svg.shape(0, 0, 0, 0.6), id="mr"))
    rest = len(points) - sum(sizes[group] for group in largest)
    keys = [Key(style[group], f"{clean(group, 30)} ({count(sizes[group])})", "mark") for group in largest]
    rows = [
        cells(clean(group, 40), count(sizes[group]), share(sizes[group] / len(points))) for group in largest
    ]
    if rest:
        rows.append(cells("others and none", count(rest), share(rest / len(points))))
    named = f" by {clean(name, 40)}" if name else ""
    return Chart(
        f"Item vectors{named}",
        f"A t-SNE map of the vectors of the {count(len(points))} most popular items: items with similar "
        "vectors lie close together. Where one colour keeps together, the model has learned that attribute.",
        Markup("").join(
            [
                svg.element("defs", *shapes),
                *(
                    svg.group(*marks[group], class_=f"s{style[group]} group" if group in style else REST)
                    for group in marks
                    if marks[group]
                ),
                _labels([(x(a), y(b)) for a, b in zip(xs, ys, strict=True)], titles),
            ]
        ),
        Table(f"Items on the map{named}", [clean(name, 40), "items", "share"], rows) if name else None,
        keys if name else [],
        "t-SNE keeps neighbours together; distances between groups and the axes mean nothing."
        + (
            f" Colour is the first value of {clean(name, 40)}; small grey dots are other values."
            if name
            else ""
        ),
        width=_SIDE_X,
        height=_SIDE_Y,
        near="xy",
        kind="map",
    )


def _labels(places: Sequence[tuple[float, float]], titles: Sequence[str | None]) -> Markup:
    """Titles of the most popular items that find room beside their points without covering another."""
    taken: list[tuple[float, float, float, float]] = []
    written = []
    for (x, y), title in zip(places, titles, strict=True):
        if len(taken) == _LABELS:
            break
        label = clean(title or "", 30)
        left, right = x + 6, x + 6 + svg.width_of([label]) * 0.9
        box = (left - 10, y - 14, right + 6, y + 14)
        fits = label and right < _SIDE_X - 4 and 12 < y < _SIDE_Y - 6
        if fits and not any(
            box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken
        ):
            taken.append(box)
            written.append(svg.text(label, left, y + 4, class_="halo"))
    return svg.group(*written, class_="labels")


def _fitting(values: Sequence[float], start: float, stop: float) -> Scale:
    low, high = min(values), max(values)
    return Scale(low - 1, high + 1, start, stop) if low == high else Scale(low, high, start, stop)


def effect_chart(
    key: str,
    values: Sequence[object],
    texts: Sequence[str],
    scores: Sequence[float],
    names: Sequence[str],
    finished: Sequence[bool],
    means: Sequence[tuple[str, float]],
    metric: str,
) -> Chart | None:
    """Return the trials of a sweep by the value of one parameter; None where none was measured.

    Args:
        key: dotted key of the parameter.
        values: [T], of each trial.
        texts: [T], the values for people.
        scores: [T], the validation metric.
        names: [T], of the trials.
        finished: [T], whether the trial was trained to its end.
        means: listed values (as texts) and the mean score of their finished trials; empty for a range.
        metric: name of the metric, such as ``recall@100``.
    """
    if not scores:
        return None
    numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    order = list(dict.fromkeys(texts))
    places = [float(v) for v in values] if numeric else [float(order.index(t)) for t in texts]  # type: ignore[arg-type]
    at = dict(zip(texts, places, strict=True))
    wide = numeric and min(places) > 0 and max(places) / min(places) >= 10
    inside = svg.logarithmic(places, 0, 1) if wide else svg.linear(places, 0, 1)
    if wide:
        inside = Scale(min(places) / 1.3, max(places) * 1.3, 0, 1, log=True)
    if len(order) <= 8:
        x_ticks = [(place, clean(text, 14)) for text, place in sorted(at.items(), key=lambda pair: pair[1])]
    else:
        x_ticks = [(v, short(v)) for v in inside.ticks(6)]
    y = svg.linear(scores, 0, 1)
    area = frame(
        inside, y, x_ticks, [(v, short(v)) for v in y.ticks(5)], clean(key, 50), f"validation {metric}"
    )
    drawn = [area.axes]
    known = sorted((at[text], mean) for text, mean in means if text in at)
    if len(known) > 1:
        drawn.append(svg.polyline([(area.x(v), area.y(mean)) for v, mean in known], "line mean"))
    best = max(range(len(scores)), key=lambda i: scores[i])
    marks = []
    for i in range(len(scores)):
        style = 1 if i == best else 0
        marker = svg.shape(
            6 if i == best else 0, area.x(places[i]), area.y(scores[i]), 1.9 if i == best else 1.2
        )
        state = "" if finished[i] else " (stopped early)"
        label = tip((style, clean(texts[i]), score(scores[i])), (None, clean(names[i]) + state, ""))
        marks.append(
            target(
                label,
                svg.group(marker, class_=f"s{style}" + ("" if finished[i] else " hollow")),
                class_="hit point",
            )
        )
    drawn.append(svg.group(*marks, class_="hits"))
    by_text: dict[str, list[float]] = {}
    for text, value in zip(texts, scores, strict=True):
        by_text.setdefault(text, []).append(value)
    rows = [
        cells(clean(text, 40), score(max(by_text[text])), score(dict(means).get(text)))
        for text in sorted(order, key=lambda text: at[text])
    ]
    return Chart(
        key,
        f"Validation {metric} of {count(len(scores))} trials by {key}; the best has {clean(texts[best])} "
        f"with {score(scores[best])}.",
        Markup("").join(drawn),
        Table(f"Validation {metric} by {key}", ["value", "best", "mean of finished trials"], rows[:40]),
        near="xy",
    )
