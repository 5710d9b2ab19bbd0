"""Times of any form to int64 microseconds since 1970 UTC.

A time is one of the years 1 to 9999. pandas' word for a missing time, the smallest int64 of nanoseconds, is
missing in whatever unit it was divided into. Naive times are clock times of ``data.timezone``: of a clock
time that was twice the first is taken, and one that was skipped is counted by the clock before the change
(02:30 of a night that goes from 02:00 to 03:00 is 03:30), as Python's ``datetime`` does.
"""

from __future__ import annotations

import datetime
import zoneinfo
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data import time_hints
from twotower.data.chunks import BoolArray, IntArray, TimeUnit
from twotower.errors import ConfigError, DataError
from twotower.values import is_text, plain

MICROS: dict[TimeUnit, float] = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}
_NANOS: dict[str, int] = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
_END = 253_402_300_800_000_000  # the year 10000
_BEGIN = -62_135_596_800_000_000  # the year 1
_ZONES_BEGIN = -2_208_988_800_000_000  # the year 1900
_ZONES_END = 2_145_916_800_000_000  # the year 2038
_NAT = -(2**63)
_NUMBER = r"^[+-]?\d+(\.\d*)?$"
# Integers of up to 19 digits that int64 certainly has.
_INTEGER = r"^-?0*(\d{1,18}|[1-8]\d{18}|9[01]\d{17})$"
# Forms that Arrow and Python read alike; Arrow is a hundred times as fast.
_NAIVE = r"^\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d(\.\d{1,6})?)?)?$"
_ZONED = r"^\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d(\.\d{1,6})?)?(Z|[+-]\d\d(:?\d\d)?)$"
_EPOCH = datetime.datetime(1970, 1, 1)


@dataclass(frozen=True)
class Clock:
    """How the times of a column are written."""

    column: str = ""
    """Its name, for messages."""
    unit: TimeUnit | None = None
    """Unit of numbers; None where the column has none."""
    format: str | None = None
    """Format of text and of integers such as 20260131, as in Python's ``strptime``; None is ISO 8601."""
    timezone: str = "UTC"
    """Zone of times that name none."""


@dataclass(frozen=True)
class Times:
    """A column of times."""

    micros: IntArray
    """[n] int64 microseconds UTC, 0 where there is none."""
    missing: BoolArray
    """[n] nothing is there."""
    unreadable: BoolArray
    """[n] what is there is no time."""
    outside: BoolArray
    """[n] it is not of the years 1 to 9999."""

    @property
    def bad(self) -> BoolArray:
        """[n] where there is no time."""
        bad: BoolArray = self.missing | self.unreadable | self.outside
        return bad


def zone(name: str) -> zoneinfo.ZoneInfo:
    """Return a time zone by its IANA name.

    Raises:
        ConfigError: there is no such zone.
    """
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ConfigError(
            f"data.timezone {name!r} is no time zone; use an IANA name such as UTC or Europe/Berlin"
        ) from None


def parse_time(text: str, timezone: str) -> int:
    """Return an ISO 8601 time as int64 microseconds UTC; one without a zone is in ``timezone``.

    Raises:
        ValueError: it is no ISO 8601 time.
    """
    moment = datetime.datetime.fromisoformat(text.strip())
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=zone(timezone))
    delta = moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def to_micros(
    array: pa.Array, unit: TimeUnit | None, timezone: str, column: str
) -> tuple[IntArray, BoolArray]:
    """Return ``read_times`` as [n] int64 microseconds UTC, and [n] bool true where none is readable."""
    found = read_times(array, Clock(column, unit, None, timezone))
    return found.micros, found.bad


def read_times(array: pa.Array, clock: Clock) -> Times:
    """Return the times of a column; none depends on another row of it.

    Args:
        array: timestamps, dates, numbers in a unit, or text of ISO 8601 times, of times in a format, or of
            such numbers.
        clock: how they are written.

    Raises:
        ConfigError: the column is numeric and has no unit, or the zone is none.
        DataError: the column has a type that holds no times.
    """
    array = plain(array)
    kind = array.type
    zone(clock.timezone)
    if pa.types.is_null(kind):
        return _times(np.zeros(len(array), np.int64), missing=np.ones(len(array), np.bool_))
    if pa.types.is_timestamp(kind):
        found = _integers(array.cast(pa.int64()), kind.unit)
        return found if kind.tz is not None else _in_zone(found, clock.timezone)
    if pa.types.is_date(kind):
        days = pa.types.is_date32(kind)
        values = array.cast(pa.int32() if days else pa.int64()).cast(pa.int64())
        scaled = pc.multiply(values, 86_400) if days else values
        return _in_zone(_integers(scaled, "s" if days else "ms"), clock.timezone)
    if pa.types.is_integer(kind) and clock.format is not None:
        array, kind = array.cast(pa.string()), pa.string()
    if is_text(kind):
        return _text(pc.utf8_trim_whitespace(array), clock)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        if clock.unit is None:
            raise _no_unit(clock, array)
        if pa.types.is_integer(kind):
            return _integers(array, clock.unit)
        return _floats(array.cast(pa.float64(), safe=False), clock.unit)
    raise DataError(
        f"time column {clock.column!r} has type {kind}; it must hold timestamps, ISO 8601 text, text with "
        "data.source.columns.time_format, or numbers with data.source.columns.time_unit"
    )


def are_iso(texts: Sequence[str]) -> bool:
    """Return whether texts are ISO 8601 times."""
    try:
        return not read_times(pa.array(texts, pa.string()), Clock()).bad.any()
    except ConfigError:  # numbers
        return False


def _no_unit(clock: Clock, array: pa.Array) -> ConfigError:
    values = array.drop_null()
    text = values.slice(0, 1_000).cast(pa.string()).to_pylist()
    found = time_hints.unit_or_format(text)
    remedy = found or "set data.source.columns.time_unit to s, ms, us or ns"
    example = values[0].as_py() if len(values) else None
    return ConfigError(
        f"time column {clock.column!r} holds numbers (such as {example!r}) and no unit is declared; {remedy}"
    )


def _times(
    micros: IntArray,
    missing: BoolArray,
    unreadable: BoolArray | None = None,
    outside: BoolArray | None = None,
) -> Times:
    none = np.zeros(len(micros), np.bool_)
    unreadable = none if unreadable is None else unreadable & ~missing
    outside = (none if outside is None else outside) | (micros >= _END) | (micros < _BEGIN)
    outside &= ~missing & ~unreadable
    return Times(np.where(missing | unreadable | outside, 0, micros), missing, unreadable, outside)


def _integers(array: pa.Array, unit: str) -> Times:
    """Read integers of any type as times in a unit."""
    missing = np.asarray(array.is_null())
    whole = np.asarray(array.fill_null(0))
    tick = _NANOS[unit]
    # Python's integers do not overflow. Of nanoseconds int64 ends before the years do.
    begin, end = max(_BEGIN * 1_000 // tick, _NAT), min(_END * 1_000 // tick, 2**63 - 1)
    if whole.dtype == np.uint64:
        outside = whole > np.uint64(end)
        whole = np.where(outside, 0, whole)
    else:
        outside = (whole < begin) | (whole > end)
    whole = whole.astype(np.int64)
    absent = np.isin(whole, _no_times(tick))
    whole = np.where(outside | absent, 0, whole)
    micros = whole // 1_000 if unit == "ns" else whole * (tick // 1_000)
    return _times(micros, missing | absent, outside=outside)


def _no_times(tick: int) -> list[int]:
    """Return what pandas' missing time is in units of so many nanoseconds, divided either way."""
    return sorted({_NAT, _NAT // tick, -(2**63 // tick)})


def _floats(array: pa.Array, unit: TimeUnit) -> Times:
    """Read float64 numbers as times in a unit."""
    value = np.asarray(array.fill_null(np.nan))
    absent = np.isnan(value)
    tick = _NANOS[unit]
    whole = np.floor(np.where(absent, 0.0, value))
    absent |= np.isin(whole, np.array(_no_times(tick), np.float64))
    with np.errstate(over="ignore"):  # which is outside
        micros = np.where(absent, 0.0, value) * MICROS[unit]
    outside = ~((micros >= _BEGIN) & (micros < _END))
    return _times(np.round(np.where(outside, 0, micros)).astype(np.int64), absent, outside=outside)


def _in_zone(times: Times, timezone: str) -> Times:
    """Return clock times, given as if they were UTC, as those of a zone."""
    if timezone == "UTC" or not len(times.micros):
        return times
    # Arrow knows the changes of clocks in these years only.
    known = (times.micros >= _ZONES_BEGIN) & (times.micros < _ZONES_END)
    clock = pa.array(np.where(known, times.micros, 0)).cast(pa.timestamp("us"))
    found = pc.assume_timezone(clock, timezone, ambiguous="earliest", nonexistent="earliest")
    micros = np.asarray(found.cast(pa.int64()))
    shown = np.asarray(pc.local_timestamp(found).cast(pa.int64()))
    # Arrow ends a skipped hour before it begins: the clock of that moment goes on.
    micros = np.where(shown != times.micros, times.micros - (shown - micros), micros)
    if not known.all():
        others, place = np.unique(times.micros[~known], return_inverse=True)
        micros[~known] = np.array([_clock_time(micro, timezone) for micro in others.tolist()])[place]
    return _times(micros, times.missing, times.unreadable, times.outside)


def _clock_time(micros: int, timezone: str) -> int:
    """Return the microseconds UTC of a clock time of a zone."""
    clock = _EPOCH + datetime.timedelta(microseconds=micros)
    offset = clock.replace(tzinfo=zone(timezone)).utcoffset()
    assert offset is not None
    return micros - offset // datetime.timedelta(microseconds=1)


def _text(array: pa.StringArray, clock: Clock) -> Times:
    blank = np.asarray(pc.equal(array, "").fill_null(True))
    if clock.format is not None:
        clock_format = clock.format
        return _parsed(array, blank, clock, lambda text: datetime.datetime.strptime(text, clock_format))
    if clock.unit is not None:
        return _text_numbers(array, blank, clock.unit)
    numeric = np.asarray(pc.match_substring_regex(array, _NUMBER).fill_null(False))
    first = np.flatnonzero(~blank)[:1]
    if numeric[first].any():
        raise _no_unit(clock, array.filter(pa.array(numeric)))
    naive = pc.match_substring_regex(array, _NAIVE).fill_null(False)
    zoned = pc.match_substring_regex(array, _ZONED).fill_null(False)
    other = np.asarray(pc.or_(pc.or_(naive, zoned), pa.array(blank)))
    if other.all():
        try:
            near = pc.if_else(naive, array, None).cast(pa.timestamp("us")).cast(pa.int64())
            far = pc.if_else(zoned, array, None).cast(pa.timestamp("us", "UTC")).cast(pa.int64())
        except pa.ArrowInvalid:  # such as the 30th of February
            pass
        else:
            local = _in_zone(_integers(near, "us"), clock.timezone)
            exact = _integers(far, "us")
            return _times(
                local.micros + exact.micros, blank, outside=~blank & (local.outside | exact.outside)
            )
    return _parsed(array, blank, clock, datetime.datetime.fromisoformat)


def _text_numbers(array: pa.StringArray, blank: BoolArray, unit: TimeUnit) -> Times:
    integer = pc.match_substring_regex(array, _INTEGER).fill_null(False)
    whole = _integers(pc.if_else(integer, array, None).cast(pa.int64()), unit)
    other = pc.and_(pc.match_substring_regex(array, _NUMBER).fill_null(False), pc.invert(integer))
    # Arrow reads no leading plus sign.
    floats = pc.if_else(other, pc.utf8_ltrim(array, "+"), None).cast(pa.float64())
    broken = _floats(floats, unit)
    is_integer, is_float = np.asarray(integer), np.asarray(other)
    return _times(
        whole.micros + broken.micros,
        blank | (is_integer & whole.missing) | (is_float & broken.missing),
        ~(is_integer | is_float),
        whole.outside | broken.outside,
    )


def _parsed(array: pa.StringArray, blank: BoolArray, clock: Clock, parse: Any) -> Times:
    """Read text by a function of Python, once for each distinct value."""
    encoded = array.dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    micros = np.zeros(len(texts) + 1, np.int64)
    state = np.zeros((len(texts) + 1, 2), np.bool_)  # read, with a zone of its own
    for at, text in enumerate(texts):
        try:
            moment = parse(text)
            offset = moment.utcoffset()
        except (ValueError, OverflowError):
            continue
        delta = moment.replace(tzinfo=None) - _EPOCH
        if offset is not None:
            delta -= offset
        micros[at] = delta // datetime.timedelta(microseconds=1)
        state[at] = True, offset is not None
    codes: npt.NDArray[np.int64] = np.asarray(encoded.indices.fill_null(len(texts))).astype(np.int64)
    read, zoned = state[codes].T
    found = _times(micros[codes], blank, ~read)
    local = _in_zone(_times(np.where(zoned, 0, found.micros), blank, ~read), clock.timezone)
    return _times(
        np.where(zoned, found.micros, local.micros),
        blank,
        ~read,
        np.where(zoned, found.outside, local.outside),
    )
