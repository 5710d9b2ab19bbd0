"""How the times of a column are written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from jobs.init import names
from jobs.init.look import Column
from twotower.data import time_hints, times
from twotower.data.chunks import TimeUnit
from twotower.data.times import Clock
from twotower.errors import TwotowerError

_BROKEN = 0.2
"""Share of a column's values that may be no times before it is taken for something else."""
_RECENT_S = 946_684_800.0
"""The year 2000: smaller numbers are seldom times of interactions, and often ids."""
_UNITS: dict[TimeUnit, float] = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_LOOKED_AT = 20_000
_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}


@dataclass(frozen=True)
class Written:
    """The times of a column."""

    score: float
    """How sure it is that they are times of interactions."""
    why: str
    unit: TimeUnit | None = None
    format: str | None = None
    others: tuple[str, ...] = ()
    """Formats that read every value as well."""
    days_only: bool = False
    """Whether all are whole days."""


def written(column: Column) -> Written | None:
    """Return how a column's times are written; None where it holds none."""
    named = names.hint(column.name, names.TIME)
    if names.has(column.name, names.NOT_THE_EVENT):
        named -= 2.0
    if column.present == 0 or column.boolean:
        return None
    if column.is_time:
        return _dated(column, Written(named + 3, "timestamps"), Clock())
    sample = column.values.drop_null().slice(0, _LOOKED_AT)
    if column.whole:
        return _epoch(column, named) or _formatted(column, sample.cast(pa.string()), named)
    if not column.is_text or column.numeric_share > 1 - _BROKEN:
        return _epoch(column, named) if column.numeric_share == 1 else None
    texts = list(dict.fromkeys(sample.to_pylist()))[: time_hints.SAMPLE]
    if times.are_iso(texts[:20]) and _broken(sample, Clock()) <= _BROKEN:
        return _dated(column, Written(named + 2.5, "ISO 8601 times"), Clock())
    return _formatted(column, sample, named)


def _epoch(column: Column, named: float) -> Written | None:
    assert column.numbers is not None
    values = column.numbers.values[~np.isnan(column.numbers.values)]
    unit = time_hints.likely_unit(values, None)
    if unit is None:
        return None
    seconds = values * _UNITS[unit]
    low, high = float(np.quantile(seconds, 0.02)), float(np.quantile(seconds, 0.98))
    # Without a name numbers have to look like nothing else: recent, and near each other.
    if named <= 0 and (low < _RECENT_S or high - low > 0.5 * high):
        return None
    if named <= 0 and column.unique and column.name and names.has(column.name, names.ID):
        return None
    return Written(named + 1.5, f"numbers that are {_NAMES[unit]} since 1970, of {_years(low, high)}", unit)


def _years(low: float, high: float) -> str:
    first, last = (np.datetime64(int(second), "s").astype("datetime64[Y]") for second in (low, high))
    return f"the year {first}" if first == last else f"the years {first} to {last}"


def _formatted(column: Column, sample: pa.Array, named: float) -> Written | None:
    texts = list(dict.fromkeys(text.strip() for text in sample.to_pylist()))
    if column.whole and not all(len(text) in (8, 14) for text in texts[: time_hints.SAMPLE]):
        return None
    # The shortest and the longest, and the smallest and largest, tell days from months.
    ordered = sorted(texts)
    step = max(len(ordered) // (time_hints.SAMPLE - 20), 1)
    chosen = [*ordered[:10], *ordered[-10:], *ordered[::step]]
    found = time_hints.likely_formats(chosen)
    if not found:
        return None
    broken = {f: _broken(sample, Clock(format=f)) for f in found}
    best = min(found, key=lambda f: broken[f])
    if broken[best] > _BROKEN:
        return None
    others = tuple(f for f in found if f != best and broken[f] <= broken[best])
    made = Written(named + 2, f"text such as {texts[0]!r}", format=best, others=others)
    return _dated(column, made, Clock(format=best))


def _broken(sample: pa.Array, clock: Clock) -> float:
    try:
        found = times.read_times(sample, clock)
    except TwotowerError:
        return 1.0
    return float(found.bad.mean()) if len(sample) else 1.0


def _dated(column: Column, made: Written, clock: Clock) -> Written:
    sample = column.values.drop_null().slice(0, _LOOKED_AT)
    try:
        found = times.read_times(sample, clock)
    except TwotowerError:
        return made
    micros = found.micros[~found.bad]
    days = bool(len(micros)) and bool((micros % 86_400_000_000 == 0).all())
    return Written(made.score, made.why, made.unit, made.format, made.others, days)
