"""Drawings: marks stand where their values are, text is escaped, and colours can be told apart."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

import twotower.evaluation.page
from twotower.evaluation.page import svg
from twotower.evaluation.page.lines import Series, line_chart, step_chart
from twotower.evaluation.page.rows import Dot, Row, bar_chart, dot_chart
from twotower.evaluation.page.scatter import effect_chart, map_chart

STYLES = (Path(twotower.evaluation.page.__file__).parent / "page.css").read_text()


def drawn(chart):
    """The elements of a chart, which must be well-formed."""
    # XML would make blanks of the tabs and line ends that tips have in HTML.
    text = str(chart.drawing).replace("\n", "&#10;").replace("\t", "&#9;")
    return ET.fromstring(f"<svg>{text}</svg>")


def labels_of(root, anchor):
    """Numbers on an axis by their place: (pixel, value)."""
    axis = 0 if anchor == "middle" else 1
    found = []
    for text in root.iter("text"):
        value = (text.text or "").replace(",", "").rstrip("%")
        if text.get("text-anchor") == anchor and re.fullmatch(r"-?[\d.]+(e-?\d+)?", value):
            found.append((float(text.get(("x", "y")[axis])), float(value)))
    return found


def read_off(root, anchor, log=False):
    """A function from pixels to values, by the labels of an axis alone."""
    found = labels_of(root, anchor)
    assert len(found) >= 2
    pixels = np.array([pixel for pixel, _ in found])
    values = np.array([value for _, value in found])
    slope, start = np.polyfit(pixels, np.log(values) if log else values, 1)
    return lambda pixel: np.exp(slope * pixel + start) if log else slope * pixel + start


def points_of(line):
    return [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]


def test_lines_go_through_their_values():
    first = [(1, 0.02), (2, 0.05), (5, 0.11), (10, 0.2), (20, 0.31), (50, 0.4)]
    second = [(1, 0.01), (10, 0.1), (50, 0.35)]
    chart = line_chart(
        "t",
        [Series("a", first, 0), Series("b", second, 3)],
        "k",
        "recall",
        x_name="k =",
        summary="s",
        log_x=True,
    )
    root = drawn(chart)
    # The first series is drawn last, on top.
    lines = [e for e in root.iter("polyline")]
    x, y = read_off(root, "middle", log=True), read_off(root, "end")
    for line, values in zip(lines, (second, first), strict=True):
        for (px, py), (vx, vy) in zip(points_of(line), values, strict=True):
            assert x(px) == pytest.approx(vx, rel=0.01)
            # The labels stand 4 pixels below their lines.
            assert y(py + 4) == pytest.approx(vy, abs=0.003)
    assert [key.name for key in chart.keys] == ["a", "b"]
    tips = [g.get("data-tip") for g in root.iter("g") if g.get("data-tip")]
    assert len(tips) == 6
    assert tips[0].split("\n") == ["\tk = 1\t", "0\ta\t0.0200", "3\tb\t0.0100"]
    assert chart.table.rows[1][2].text == "\u2013"


def test_a_line_of_one_point_or_none():
    one = line_chart("t", [Series("a", [(3, 0.5)])], "k", "y", x_name="k", summary="s")
    assert len(list(drawn(one).iter("path"))) == 1
    assert line_chart("t", [Series("a", [])], "k", "y", x_name="k", summary="s") is None
    assert Series.of("a", [1, 2, 3], [0.5, None, math.nan], 0).points == [(1, 0.5)]


def test_bars_of_a_histogram_are_as_high_as_their_counts():
    counts = [5, 40, 0, 20]
    chart = step_chart(
        "t", [0.0, 2.0, 4.0, 6.0, 12.0], counts,
        [(3.0, "p50 3", "rule"), (10.0, "goal", "goal"), (99.0, "p99", "rule")],
        x_label="x", y_label="n", summary="s",
    )  # fmt: skip
    root = drawn(chart)
    bars = [r for r in root.iter("rect") if r.get("class") == "bar"]
    heights = [float(bar.get("height")) for bar in bars]
    assert np.array(heights) / heights[1] == pytest.approx(np.array(counts) / 40, abs=2e-3)
    x = read_off(root, "middle")
    lines = {
        e.get("class"): x(float(e.get("x1"))) for e in root.iter("line") if e.get("class") in ("rule", "goal")
    }
    assert lines == {"rule": pytest.approx(3.0, abs=0.05), "goal": pytest.approx(10.0, abs=0.05)}
    # What is beyond the axis has no line.
    assert "p99" not in [t.text for t in root.iter("text")]
    assert step_chart("t", [0.0, 1.0], [0], [], x_label="x", y_label="n", summary="s") is None


def test_dots_and_whiskers_stand_at_their_values():
    rows = [Row("a", [Dot("s", 0.5, 0, 0.4, 0.65)]), Row("b", [Dot("s", -0.25, 7)])]
    chart = dot_chart("t", rows, summary="s", zero=False, reference=0.0)
    root = drawn(chart)
    x = read_off(root, "middle")
    dots = [re.match(r"translate\((\S+) (\S+)\)", p.get("transform")) for p in root.iter("path")]
    assert [x(float(m[1])) for m in dots] == pytest.approx([0.5, -0.25], abs=0.01)
    ends = [line for line in root.iter("line") if line.get("class") == "whisker"]
    assert [x(float(ends[0].get(key))) for key in ("x1", "x2")] == pytest.approx([0.4, 0.65], abs=0.01)
    (rule,) = [line for line in root.iter("line") if line.get("class") == "rule"]
    assert x(float(rule.get("x1"))) == pytest.approx(0.0, abs=0.01)


def test_columns_side_by_side():
    chart = bar_chart(
        "t", ["a", "b"], ["a", "b"], [("one", [0.2, 0.4], 7), ("two", [0.1, 0.0], 0)],
        x_label="x", y_label="share", summary="s", text=str, axis=lambda v: f"{v:g}",
    )  # fmt: skip
    bars = [r for r in drawn(chart).iter("rect") if r.get("class") == "bar"]
    heights = np.array([float(bar.get("height")) for bar in bars])
    assert heights / heights[1] == pytest.approx([0.5, 1.0, 0.25, 0.0], abs=2e-3)
    assert [(key.series, key.name) for key in chart.keys] == [(7, "one"), (0, "two")]


def test_labels_of_the_map_do_not_cover_each_other(rng):
    places = [tuple(p) for p in rng.integers(0, 1000, (300, 2)).tolist()]
    root = drawn(map_chart(places, ["a"] * 300, [f"A title of some length {i}" for i in range(300)], "g"))
    texts = [t for t in root.iter("text")]
    assert 8 < len(texts) <= 16
    boxes = [(float(t.get("x")), float(t.get("y")), len(t.text) * 5.5) for t in texts]
    for (x, y, width), (other_x, other_y, other) in itertools.combinations(boxes, 2):
        assert abs(y - other_y) >= 13 or x + width < other_x or other_x + other < x


def test_a_map_of_equal_places_and_of_none():
    assert map_chart([(5, 5)] * 12, ["other"] * 12, [None] * 12, "").keys == []
    assert map_chart([], [], [], "g") is None


@pytest.mark.parametrize(
    ("values", "texts", "log"),
    [
        ([0.001, 0.1, 1.0], ["0.001", "0.1", "1.0"], True),
        ([64, 128, 256], ["64", "128", "256"], False),
        (["a", "b", "a"], ["a", "b", "a"], False),
        ([None, 1.0, [8]], ["null", "1.0", "[8]"], False),
        ([True, False, True], ["true", "false", "true"], False),
        ([0, 0, 0], ["0", "0", "0"], False),
    ],
)
def test_trials_stand_at_their_scores(values, texts, log):
    scores = [0.1, 0.3, 0.2]
    chart = effect_chart("k", values, texts, scores, ["1", "2", "3"], [True, False, True], [], "recall@7")
    root = drawn(chart)
    y = read_off(root, "end")
    marks = [re.match(r"translate\((\S+) (\S+)\)", p.get("transform")) for p in root.iter("path")]
    assert [y(float(m[2]) + 4) for m in marks] == pytest.approx(scores, abs=0.005)
    places = dict(zip(texts, [float(m[1]) for m in marks], strict=True))
    if log:
        assert (places["1.0"] - places["0.1"]) == pytest.approx(
            (places["0.1"] - places["0.001"]) / 2, rel=0.02
        )
    hollow = [g.get("class") for g in root.iter("g") if (g.get("class") or "").startswith("s")]
    assert hollow == ["s0", "s1 hollow", "s0"]


@given(st.text(max_size=30), st.text(max_size=30))
def test_what_is_put_into_an_element_comes_out_of_it(inside, attribute):
    keep = "".join(c for c in inside + attribute if c.isprintable())
    root = ET.fromstring(svg.element("text", keep, class_=keep, data_tip=keep))
    assert ((root.text or ""), root.get("class"), root.get("data-tip")) == (keep, keep, keep)
    assert isinstance(svg.element("g", Markup("<b/>")), Markup)


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9), st.integers(2, 9))
def test_ticks_are_inside_few_and_even(low, width, most):
    high = low + width
    if high - low < abs(low) * 1e-9:
        return
    found = svg.ticks(low, high, most)
    room = (high - low) * 1e-6
    assert len(found) <= most
    assert all(low - room <= tick <= high + room for tick in found)
    steps = np.diff(found)
    assert len(steps) == 0 or np.allclose(steps, steps[0], rtol=1e-3)


@given(st.floats(1e-9, 1e6), st.floats(1.01, 1e9), st.integers(2, 9))
def test_ticks_of_a_logarithmic_axis(low, factor, most):
    high = low * factor
    found = svg.log_ticks(low, high, most)
    assert 2 <= len(found) <= most
    assert all(low * 0.99 <= tick <= high * 1.01 for tick in found)
    assert found == sorted(found)


def themes():
    """The colours of the light and the dark theme, by name."""
    blocks = re.findall(r":root \{(.*?)\}", STYLES, re.DOTALL)
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in blocks)
    return {"light": light, "dark": {**light, **dark}}


def linear(colour):
    """Linear RGB of a colour such as #0062a8."""
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """Contrast of two colours, 1 to 21 (WCAG 2.2)."""
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_marks_stand_out(theme):
    colours = themes()[theme]
    grounds = ("ground", "raised")
    for name in ("ink", "quiet", "accent", "good", "bad"):
        for ground in grounds:
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    assert contrast(colours["bad"], colours["bad-tint"]) >= 4.5
    assert contrast(colours["ink"], colours["tint"]) >= 4.5
    assert contrast(colours["quiet"], colours["tint"]) >= 4.5
    for name in [f"c{i}" for i in range(8)] + ["edge"]:
        for ground in grounds:
            assert contrast(colours[name], colours[ground]) >= 3.0, (name, ground)


# Machado, Oliveira and Fernandes (2009), "A physiologically-based model for simulation of color vision
# deficiency", severity 1.0.
VISIONS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def lab(rgb):
    """CIELAB of linear RGB, D65."""
    matrix = [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.072175],
        [0.0193339, 0.119192, 0.9503041],
    ]
    xyz = np.array(matrix) @ np.clip(rgb, 0, 1) / [0.95047, 1.0, 1.08883]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_series_can_be_told_apart(theme, vision):
    colours = themes()[theme]
    seen = [lab(VISIONS[vision] @ linear(colours[f"c{i}"])) for i in range(8)]
    for (i, one), (j, other) in itertools.combinations(enumerate(seen), 2):
        # A distance of 2.3 can just be noticed.
        assert np.linalg.norm(one - other) >= 16, (i, j)


def test_every_series_has_a_colour_a_marker_and_but_the_first_a_dash():
    dashes = re.findall(r"\.s(\d) \{ --c: var\(--c(\d)\);( --d: [\d ]+;)? \}", STYLES)
    assert [(a, b) for a, b, _ in dashes] == [(str(i), str(i)) for i in range(8)]
    assert [bool(d) for _, _, d in dashes] == [False] + [True] * 7
    assert len({d for _, _, d in dashes}) == 8
    assert len({svg.shape(i, 0, 0) for i in range(8)}) == 8
