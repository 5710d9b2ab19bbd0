"""What times look like that were declared to be something else: a likely unit, a likely format."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from twotower.data.chunks import TimeUnit
from twotower.values import joined

_SECONDS: dict[TimeUnit, float] = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_NAMES: dict[TimeUnit, str] = {
    "s": "seconds",
    "ms": "milliseconds",
    "us": "microseconds",
    "ns": "nanoseconds",
}
_PLAUSIBLE = 31_536_000.0, 4_102_444_800.0
"""Seconds since 1970 of the years 1971 to 2099: no two units have numbers of both in it."""
_DATES = (
    "%m/%d/%Y", "%d/%m/%Y", "%Y/%m/%d", "%d.%m.%Y", "%Y.%m.%d", "%d-%m-%Y", "%m-%d-%Y", "%Y-%m-%d",
    "%m/%d/%y", "%d/%m/%y", "%d.%m.%y", "%d %b %Y", "%d %B %Y", "%d-%b-%Y", "%d/%b/%Y", "%b %d, %Y",
    "%B %d, %Y", "%b %d %Y", "%Y%m%d", "%a %d %b %Y",
)  # fmt: skip
_CLOCKS = (
    "", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f", " %I:%M %p", " %I:%M:%S %p", " %H:%M:%S %z", "T%H:%M:%S",
    ":%H:%M:%S", ":%H:%M:%S %z", ", %H:%M", ", %H:%M:%S", "%H%M%S", " %H.%M.%S",
)  # fmt: skip
_WHOLE_FORMATS = (
    "%a %b %d %H:%M:%S %Y",
    "%a %b %d %H:%M:%S %z %Y",
    "%a, %d %b %Y %H:%M:%S",
    "%a, %d %b %Y %H:%M:%S %z",
    "%Y%m%dT%H%M%S",
)
SAMPLE = 200
"""Texts that are looked at."""


def likely_unit(values: npt.NDArray[np.float64], declared: TimeUnit | None) -> TimeUnit | None:
    """Return the unit in which numbers are times of our days, where in the declared one they are not."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    middle = float(np.median(values))
    low, high = _PLAUSIBLE
    fitting = [unit for unit, size in _SECONDS.items() if low <= middle * size < high]
    return None if declared in fitting or not fitting else fitting[0]


def likely_formats(texts: Sequence[str]) -> list[str]:
    """Return formats of ``strptime`` that read every one of some texts, at most three."""
    sample = list(dict.fromkeys(text.strip() for text in texts))[:SAMPLE]
    if not sample:
        return []
    formats = [date + clock for date, clock in itertools.product(_DATES, _CLOCKS)]
    found = [f for f in (*formats, *_WHOLE_FORMATS) if _reads(sample[0], f)]
    return [f for f in found if all(_reads(text, f) for text in sample)][:3]


def unit(values: npt.NDArray[np.float64], declared: TimeUnit | None) -> str | None:
    """Return what to do about numbers in another unit than the declared one; None where it fits."""
    found = likely_unit(values, declared)
    if found is None:
        return None
    return f"the values look like {_NAMES[found]}: set data.source.columns.time_unit: {found}"


def time_format(texts: Sequence[str]) -> str | None:
    """Return what to do about texts that are no ISO 8601 times; None where nothing is known."""
    found = likely_formats(texts)
    if not found:
        return None
    shown = joined([f"{name!r}" for name in found])
    return f"set data.source.columns.time_format, which looks like {shown}"


def unit_or_format(texts: Sequence[str]) -> str | None:
    """Return what to do about a column of numbers without a unit."""
    return (time_format(texts) if all(len(t) in (8, 14) for t in texts) else None) or unit(
        np.array([_number(t) for t in texts]), None
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _reads(text: str, format: str) -> bool:
    try:
        return 1900 <= datetime.datetime.strptime(text, format).year < 2100
    except ValueError:
        return False
