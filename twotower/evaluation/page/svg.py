"""SVG by hand: elements, scales and ticks. Text is escaped, and colours are classes of the style sheet.

Coordinates are pixels of the drawing, x to the right and y down.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

CHARACTER = 6.9
"""Width of a character of a label, about: 13 pixels high, in whatever font the reader has."""


def element(name: str, *content: str | Markup, **attributes: str | float | None) -> Markup:
    """Return an element; content that is no ``Markup`` is escaped, as are the values of attributes.

    Args:
        name: of the element.
        content: what is inside.
        attributes: ``class_`` is class and ``text_anchor`` is text-anchor; None is left out.
    """
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is not None:
            text = place(value) if isinstance(value, float) else str(escape(value))
            parts.append(f' {key.rstrip("_").replace("_", "-")}="{text}"')
    inside = Markup("").join(content)
    parts.append(f">{inside}</{name}>" if inside else "/>")
    return Markup("".join(parts))


def text(value: str, x: float, y: float, anchor: str | None = None, class_: str | None = None) -> Markup:
    """Return a text whose baseline starts (or ends, or has its middle) at a place."""
    return element("text", value, x=float(x), y=float(y), text_anchor=anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """Return a straight line."""
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def rectangle(x: float, y: float, width: float, height: float, class_: str) -> Markup:
    """Return a rectangle; a negative size is none."""
    return element(
        "rect",
        x=float(x),
        y=float(y),
        width=float(max(width, 0.0)),
        height=float(max(height, 0.0)),
        class_=class_,
    )


def polyline(points: Iterable[tuple[float, float]], class_: str) -> Markup:
    """Return a line through points."""
    return element("polyline", points=" ".join(f"{place(x)},{place(y)}" for x, y in points), class_=class_)


def group(*content: Markup, **attributes: str | float | None) -> Markup:
    """Return a group of elements."""
    return element("g", *content, **attributes)


def place(value: float) -> str:
    """Return a coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


_OUTLINES = (
    "M-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0-6.8 0z",
    "M-3-3h6v6h-6z",
    "M0-4.2L3.9 2.9h-7.8z",
    "M0-4.4L4.4 0 0 4.4-4.4 0z",
    "M0 4.2L3.9-2.9h-7.8z",
    "M-1.3-4h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z",
    "M0-4.4l1.3 2.9 3.1.3-2.3 2.1.7 3.1L0 2.4l-2.8 1.6.7-3.1-2.3-2.1 3.1-.3z",
    "M-2.2-3.8h4.4L4.4 0 2.2 3.8h-4.4L-4.4 0z",
)


def shape(series: int, x: float, y: float, scale: float = 1.0) -> Markup:
    """Return the outline of a series' marker at a place: those of neighbouring series differ."""
    move = f"translate({place(x)} {place(y)})" + ("" if scale == 1.0 else f" scale({scale:g})")
    return element("path", d=_OUTLINES[series % len(_OUTLINES)], transform=move)


@dataclass(frozen=True)
class Scale:
    """From values to pixels."""

    low: float
    high: float
    start: float
    """Pixel of ``low``."""
    stop: float
    """Pixel of ``high``."""
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self, most: int) -> list[float]:
        """Return round values inside, at most ``most`` (two or more), ascending."""
        return log_ticks(self.low, self.high, most) if self.log else ticks(self.low, self.high, most)


def linear(values: Iterable[float | None], start: float, stop: float, zero: bool = False) -> Scale:
    """Return a scale with room around the finite values; from 0 on where ``zero`` says so."""
    known = [float(v) for v in values if v is not None and math.isfinite(v)] or [0.0, 1.0]
    low, high = min(known), max(known)
    if zero and low >= 0:
        low, high = 0.0, high or 1.0
        return Scale(low, high + 0.06 * (high - low), start, stop)
    room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return Scale(low - room, high + room, start, stop)


def logarithmic(values: Iterable[float | None], start: float, stop: float) -> Scale:
    """Return a logarithmic scale of the positive values; linear where there are too few of them."""
    known = [float(v) for v in values if v is not None and 0 < v < math.inf]
    if not known or min(known) == max(known):
        return linear(known, start, stop)
    return Scale(min(known), max(known), start, stop, log=True)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten between two values, at most ``most``."""
    power = 10.0 ** math.floor(math.log10((high - low) / max(most, 1)))
    for factor in (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0):
        step = power * factor
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            break
    return [round(n * step, 12) for n in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Return 1, 2 and 5 times powers of ten between two positive values, thinned to at most ``most``."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,)):
        found = [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]
        if len(found) <= most:
            break
    else:
        found = found[:: -(-len(found) // most)]
    return found if len(found) > 1 else [low, high]


def width_of(labels: Sequence[str]) -> float:
    """Return about how wide the widest of some labels is."""
    return max((len(label) for label in labels), default=0) * CHARACTER
