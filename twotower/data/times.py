"""Times of any form to int64 microseconds since 1970 UTC."""

from __future__ import annotations

import datetime
import zoneinfo
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.chunks import BoolArray, IntArray, TimeUnit
from twotower.errors import ConfigError, DataError

MICROS: dict[TimeUnit, float] = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}
_LATEST = 253_402_300_800_000_000  # year 10000: a later time has the wrong unit
_EARLIEST = -62_135_596_800_000_000  # year 1
_NUMBER = r"^\s*[+-]?\d+(\.\d*)?\s*$"
_ZONED = r"\d[T ]\d.*(Z|[+-]\d\d(:?\d\d)?)$"


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
    """Return times as [n] int64 microseconds UTC, and [n] bool true where none is readable (0 there).

    Args:
        array: Timestamps, dates, numbers in ``unit``, or text with either ISO 8601 times or such numbers.
        unit: Unit of numbers; None when the column is not numeric.
        timezone: Zone of times that name none.
        column: Name of the column, for messages.

    Raises:
        ConfigError: the column is numeric and has no unit.
        DataError: the column has a type that holds no times.
    """
    kind = array.type
    if pa.types.is_dictionary(kind):
        array, kind = array.dictionary_decode(), kind.value_type
    if pa.types.is_null(kind):
        return _finish(np.zeros(len(array), dtype=np.int64), np.ones(len(array), dtype=np.bool_))
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return _stamps(array, timezone)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return _text(array.cast(pa.string()), unit, timezone, column)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        if unit is None:
            raise _no_unit(column, next((v.as_py() for v in array if v.is_valid), None))
        return _numbers(array, unit)
    raise DataError(
        f"time column {column!r} has type {kind}; it must hold timestamps, ISO 8601 text, or numbers with "
        "data.source.columns.time_unit"
    )


def _no_unit(column: str, example: Any) -> ConfigError:
    return ConfigError(
        f"time column {column!r} holds numbers (such as {example!r}) and no unit is declared; set "
        "data.source.columns.time_unit to s, ms, us or ns"
    )


def _stamps(array: pa.Array, timezone: str) -> tuple[IntArray, BoolArray]:
    stamps = array if pa.types.is_timestamp(array.type) else array.cast(pa.timestamp("us"))
    stamps = stamps.cast(pa.timestamp("us", stamps.type.tz), safe=False)
    if stamps.type.tz is None:
        zone(timezone)  # a clear error, where Arrow's would not name the setting
        # Of a wall clock time that exists twice or never, take the earlier reading, so that no row is lost.
        stamps = pc.assume_timezone(stamps, timezone, ambiguous="earliest", nonexistent="earliest")
    missing = np.asarray(stamps.is_null())
    return _finish(np.asarray(stamps.cast(pa.int64()).fill_null(0)), missing)


def _numbers(array: pa.Array, unit: TimeUnit) -> tuple[IntArray, BoolArray]:
    missing = np.asarray(array.is_null())
    if pa.types.is_integer(array.type):
        whole = np.asarray(array.fill_null(0)).astype(np.int64)
        if unit == "ns":
            return _finish(whole // 1000, missing)
        factor = int(MICROS[unit])
        missing = missing | (np.abs(whole) > _LATEST // factor)
        return _finish(np.where(missing, 0, whole) * factor, missing)
    micros = np.asarray(array.cast(pa.float64()).fill_null(np.nan)) * MICROS[unit]
    missing = missing | ~(np.abs(micros) <= _LATEST)
    return _finish(np.round(np.where(missing, 0, micros)).astype(np.int64), missing)


def _text(
    array: pa.StringArray, unit: TimeUnit | None, timezone: str, column: str
) -> tuple[IntArray, BoolArray]:
    if unit is not None:
        try:
            return _numbers(array.cast(pa.int64()), unit)
        except pa.ArrowInvalid:
            numeric = pc.match_substring_regex(array, _NUMBER)
            only = pc.if_else(numeric.fill_null(False), pc.utf8_trim_whitespace(array), None)
            return _numbers(only.cast(pa.float64()), unit)
    for value in array:
        if value.is_valid and value.as_py().strip():
            if pc.match_substring_regex(value, _NUMBER).as_py():
                raise _no_unit(column, value.as_py())
            break
    zoned = pc.match_substring_regex(array, _ZONED).fill_null(False)
    try:
        naive = pc.if_else(zoned, None, array).cast(pa.timestamp("us"))
        exact = pc.if_else(zoned, array, None).cast(pa.timestamp("us", "UTC"))
    except pa.ArrowInvalid:  # a row is bad, or ISO 8601 in a form that Arrow does not know
        return _each(array, timezone)
    (near, no_near), (far, no_far) = _stamps(naive, timezone), _stamps(exact, "UTC")
    return _finish(near + far, no_near & no_far)


def _each(array: pa.StringArray, timezone: str) -> tuple[IntArray, BoolArray]:
    micros = np.zeros(len(array), dtype=np.int64)
    missing = np.zeros(len(array), dtype=np.bool_)
    for at, text in enumerate(array.to_pylist()):
        try:
            micros[at] = parse_time(text, timezone)
        except (ValueError, TypeError, AttributeError, OverflowError):
            missing[at] = True
    return _finish(micros, missing)


def _finish(micros: IntArray, missing: BoolArray) -> tuple[IntArray, BoolArray]:
    missing = missing | (micros > _LATEST) | (micros < _EARLIEST)
    return np.where(missing, 0, micros).astype(np.int64), missing
