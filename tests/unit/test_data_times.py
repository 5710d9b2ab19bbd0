from __future__ import annotations

import datetime
from typing import Any

import pyarrow as pa
import pytest

from twotower.data.times import parse_time, to_micros
from twotower.errors import ConfigError, DataError


def micros(*when: int, zone: datetime.tzinfo = datetime.UTC) -> int:
    moment = datetime.datetime(*when, tzinfo=zone)  # type: ignore[misc]
    return round((moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)).total_seconds() * 1_000_000)


NOON = micros(2026, 1, 31, 12, 0, 0)


@pytest.mark.parametrize(
    ("array", "unit"),
    [
        (pa.array([NOON // 1_000_000]), "s"),
        (pa.array([NOON // 1_000]), "ms"),
        (pa.array([NOON]), "us"),
        (pa.array([NOON * 1_000]), "ns"),
        (pa.array([NOON / 1e6]), "s"),
        (pa.array([str(NOON // 1_000_000)]), "s"),
        (pa.array([f" {NOON // 1_000_000}.0"]), "s"),
        (pa.array([NOON], pa.timestamp("us", "UTC")), None),
        (pa.array([NOON * 1_000], pa.timestamp("ns", "Europe/Berlin")), None),
        (pa.array(["2026-01-31T12:00:00Z"]), None),
        (pa.array(["2026-01-31T13:00:00+01:00"]), None),
        (pa.array(["2026-01-31 06:30:00.000-0530"]), None),
    ],
)
def test_every_form_of_one_moment_is_the_same(array: pa.Array, unit: Any) -> None:
    times, bad = to_micros(array, unit, "UTC", "when")
    assert not bad.any()
    assert times.tolist() == [NOON]


@pytest.mark.parametrize(
    "array",
    [
        pa.array(["2026-07-01T12:00:00"]),
        pa.array([micros(2026, 7, 1, 12, 0, 0)], pa.timestamp("us")),
    ],
)
def test_naive_times_are_in_the_configured_zone(array: pa.Array) -> None:
    times, _ = to_micros(array, None, "Europe/Berlin", "when")
    assert times.tolist() == [micros(2026, 7, 1, 10, 0, 0)]
    assert to_micros(array, None, "UTC", "when")[0].tolist() == [micros(2026, 7, 1, 12, 0, 0)]


def test_dates_are_midnight_in_the_zone() -> None:
    array = pa.array([datetime.date(2026, 1, 31)])
    times, _ = to_micros(array, None, "America/New_York", "when")
    assert times.tolist() == [micros(2026, 1, 31, 5, 0, 0)]


def test_a_clock_time_that_never_was_or_was_twice_loses_no_row() -> None:
    array = pa.array(["2026-03-29T02:30:00", "2026-10-25T02:30:00"])
    times, bad = to_micros(array, None, "Europe/Berlin", "when")
    assert not bad.any()
    assert times[1] == micros(2026, 10, 25, 0, 30, 0)


def test_text_that_is_no_time_is_bad_and_the_rest_is_read() -> None:
    array = pa.array(
        ["2026-01-31T12:00:00Z", "yesterday", None, "2026-01-31T12:00:00", "20260131T120000Z", ""]
    )
    times, bad = to_micros(array, None, "UTC", "when")
    assert bad.tolist() == [False, True, True, False, False, True]
    assert times.tolist() == [NOON, 0, 0, NOON, NOON, 0]


def test_text_numbers_with_broken_ones_between() -> None:
    times, bad = to_micros(pa.array(["12", "x", "", None, "-3", "4.5"]), "s", "UTC", "when")
    assert bad.tolist() == [False, True, True, True, False, False]
    assert times.tolist() == [12_000_000, 0, 0, 0, -3_000_000, 4_500_000]


def test_a_time_after_year_9999_is_bad_since_its_unit_is_wrong() -> None:
    milliseconds = pa.array([NOON // 1_000, 12])
    assert to_micros(milliseconds, "s", "UTC", "when")[1].tolist() == [True, False]
    assert to_micros(milliseconds.cast(pa.float64()), "s", "UTC", "when")[1].tolist() == [True, False]


def test_nan_and_infinity_are_bad() -> None:
    _, bad = to_micros(pa.array([1.0, float("nan"), float("inf")]), "s", "UTC", "when")
    assert bad.tolist() == [False, True, True]


@pytest.mark.parametrize("array", [pa.array([5, 6]), pa.array([None, "964982703"]), pa.array([1.5])])
def test_numbers_without_a_unit_name_the_setting(array: pa.Array) -> None:
    with pytest.raises(ConfigError, match=r"'when' holds numbers .* set data\.source\.columns\.time_unit"):
        to_micros(array, None, "UTC", "when")


def test_a_column_of_another_type_is_refused() -> None:
    with pytest.raises(DataError, match=r"'when' has type bool"):
        to_micros(pa.array([True]), None, "UTC", "when")


def test_an_unknown_zone_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"data\.timezone 'Mars/Olympus' is no time zone"):
        to_micros(pa.array(["2026-01-31"]), None, "Mars/Olympus", "when")
    with pytest.raises(ConfigError, match="Mars"):
        parse_time("2026-01-31", "Mars/Olympus")


def test_parse_time_is_exact_to_the_microsecond() -> None:
    assert parse_time("2026-01-31T12:00:00.123457Z", "UTC") == NOON + 123_457
