"""Times of every type of Arrow over its whole range, against Python's integers and datetime."""

from __future__ import annotations

import datetime
import zoneinfo
from fractions import Fraction
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from twotower.data.chunks import TimeUnit
from twotower.data.times import Clock, read_times

UNITS = list(get_args(TimeUnit))
NANOS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
EPOCH = datetime.datetime(1970, 1, 1)
BEGIN, END = -62_135_596_800_000_000, 253_402_300_800_000_000
NAT = -(2**63)
ZONES = [
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "Australia/Lord_Howe",
    "Asia/Kolkata",
    "Africa/Casablanca",
]


def expected(value: int, unit: str) -> int | None:
    """The microseconds of an integer; None where it is none of the years 1 to 9999, or pandas' NaT."""
    nanos = value * NANOS[unit]
    if value == NAT or abs(nanos - NAT) < NANOS[unit]:
        return None
    return nanos // 1_000 if BEGIN <= nanos // 1_000 < END else None


def bounds(bits: int, signed: bool) -> st.SearchStrategy[int]:
    low = -(2 ** (bits - 1)) if signed else 0
    high = low + 2**bits - 1
    edges = [low, high, 0]
    for unit in UNITS:
        ends = (BEGIN, END, NAT // 1_000)
        edges += [e * 1_000 // NANOS[unit] + d for e in ends for d in (-1, 0, 1)]
    return st.one_of(st.integers(low, high), st.sampled_from([e for e in edges if low <= e <= high]))


INTEGERS = {
    **{getattr(pa, f"int{b}")(): bounds(b, True) for b in (8, 16, 32, 64)},
    **{getattr(pa, f"uint{b}")(): bounds(b, False) for b in (8, 16, 32, 64)},
}


@given(st.sampled_from(list(INTEGERS)), st.sampled_from(UNITS), st.data())
@settings(max_examples=200, deadline=None)
def test_integers_are_never_wrapped(kind: pa.DataType, unit: Any, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.one_of(st.none(), INTEGERS[kind]), max_size=8))
    wanted = [None if v is None else expected(v, unit) for v in values]
    array = pa.array(values, kind)
    forms = [array, array.cast(pa.string()), array.dictionary_encode()]
    for form in forms:
        found = read_times(form, Clock("t", unit))
        assert found.bad.tolist() == [w is None for w in wanted], (form.type, values)
        if pa.types.is_string(form.type) and unit == "ns":
            # Text of more digits than int64 surely has is read as a float.
            assert np.abs(found.micros - [w or 0 for w in wanted]).max(initial=0) <= 1
        else:
            assert found.micros.tolist() == [w or 0 for w in wanted]


@given(st.sampled_from(UNITS), st.sampled_from([None, "UTC", "Europe/Berlin"]), st.data())
@settings(max_examples=100, deadline=None)
def test_timestamps_are_never_wrapped(unit: Any, zone: str | None, data: st.DataObject) -> None:
    values = data.draw(st.lists(bounds(64, True), max_size=8))
    array = pa.array(values, pa.int64()).cast(pa.timestamp(unit, zone))
    wanted = [expected(v, unit) for v in values]
    found = read_times(array, Clock("t"))
    assert found.bad.tolist() == [w is None for w in wanted]
    assert found.micros.tolist() == [w or 0 for w in wanted]


@given(st.sampled_from([pa.date32(), pa.date64()]), st.data())
@settings(max_examples=60, deadline=None)
def test_dates_are_never_wrapped(kind: pa.DataType, data: st.DataObject) -> None:
    days = pa.types.is_date32(kind)
    values = data.draw(st.lists(bounds(32 if days else 64, True), max_size=8))
    array = pa.array(values, pa.int32() if days else pa.int64()).view(kind)
    wanted = [expected(v * 86_400, "s") if days else expected(v, "ms") for v in values]
    found = read_times(array, Clock("t"))
    assert found.bad.tolist() == [w is None for w in wanted]
    assert found.micros.tolist() == [w or 0 for w in wanted]


@given(st.sampled_from([16, 32, 64]), st.sampled_from(UNITS), st.data())
@settings(max_examples=200, deadline=None)
def test_floats_are_rounded_and_never_wrapped(bits: Any, unit: Any, data: st.DataObject) -> None:
    near = st.one_of(st.floats(-(2**63), 2**63), st.just(1e302)) if bits == 64 else st.floats(width=bits)
    values = data.draw(st.lists(st.one_of(st.floats(width=bits), near), max_size=8))
    kind = {16: pa.float16(), 32: pa.float32(), 64: pa.float64()}[bits]
    array = pa.array(np.array(values, kind.to_pandas_dtype()), kind)
    found = read_times(array, Clock("t", unit))
    for value, micros, bad in zip(values, found.micros.tolist(), found.bad.tolist(), strict=True):
        if not np.isfinite(value):
            assert bad
            continue
        exact = Fraction(value) * NANOS[unit] / 1_000
        assume(abs(exact - BEGIN) > 100 and abs(exact - END) > 100)
        if BEGIN < exact < END and abs(exact - Fraction(NAT, 1_000)) > 2_000_000:
            assert not bad
            assert abs(micros - exact) <= max(1, abs(exact) * Fraction(1, 2**51))
        else:
            assert bad or abs(exact - Fraction(NAT, 1_000)) <= 2_000_000


CLOCKS = st.datetimes(datetime.datetime(1, 1, 3), datetime.datetime(9999, 12, 29))
# Nights in which clocks of these zones are changed, some by half an hour.
CHANGES = [
    (2026, 3, 29),
    (2026, 10, 25),
    (2026, 3, 8),
    (2026, 11, 1),
    (2026, 4, 5),
    (2026, 10, 4),
    (1916, 4, 30),
]
NIGHTS = st.builds(
    lambda day, minutes: datetime.datetime(*day) + datetime.timedelta(minutes=minutes),
    st.sampled_from(CHANGES),
    st.integers(0, 300),
)


@given(st.sampled_from(ZONES), st.lists(st.one_of(CLOCKS, NIGHTS), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_clock_times_are_those_of_datetime(zone: str, clocks: list[datetime.datetime]) -> None:
    name = zoneinfo.ZoneInfo(zone)
    wanted = []
    for clock in clocks:
        moment = clock - clock.replace(tzinfo=name).utcoffset() - EPOCH  # type: ignore[operator]
        wanted.append(moment // datetime.timedelta(microseconds=1))
    texts = [clock.isoformat() for clock in clocks]
    forms = [pa.array(clocks, pa.timestamp("us")), pa.array(texts), pa.array([*texts, "never"])]
    for form in forms:
        found = read_times(form, Clock("t", timezone=zone))
        assert found.micros.tolist()[: len(clocks)] == wanted
    written = pa.array([clock.strftime("%d/%m/%Y %H:%M:%S.%f") for clock in clocks if clock.year > 999])
    found = read_times(written, Clock("t", format="%d/%m/%Y %H:%M:%S.%f", timezone=zone))
    assert found.micros.tolist() == [w for w, c in zip(wanted, clocks, strict=True) if c.year > 999]


TEXTS = st.one_of(
    st.datetimes().map(lambda d: d.isoformat()),
    st.datetimes(timezones=st.timezones()).map(lambda d: d.isoformat()),
    st.dates().map(lambda d: d.isoformat()),
    st.sampled_from(
        [
            "2026-02-30",
            "0000-01-01",
            "2026-01-31T10",
            "2026-01-31 10:00Z",
            "20260131T101010",
            " 2026-01-31 ",
            "",
        ]
    ),
    st.text(max_size=6),
)


@given(st.lists(st.one_of(st.none(), TEXTS), min_size=1, max_size=6), st.sampled_from(ZONES))
@settings(max_examples=150, deadline=None)
def test_no_time_depends_on_its_neighbours(texts: list[str | None], zone: str) -> None:
    clock = Clock("t", timezone=zone)
    assume(not any(t and t.strip().lstrip("+-").replace(".", "").isdecimal() for t in texts))
    together = read_times(pa.array(texts, pa.string()), clock)
    for place, text in enumerate(texts):
        alone = read_times(pa.array([text], pa.string()), clock)
        assert (alone.micros[0], alone.bad[0]) == (together.micros[place], together.bad[place]), text


@pytest.mark.parametrize("unit", UNITS)
def test_the_missing_time_of_pandas_is_missing_in_every_unit(unit: Any) -> None:
    tick = NANOS[unit]
    values = [NAT, NAT // tick, -(2**63 // tick)]
    for array in (pa.array(values), pa.array([str(v) for v in values]), pa.array([float(v) for v in values])):
        found = read_times(array, Clock("t", unit))
        assert found.missing.all()
        assert not found.micros.any()
