"""Filters against plain Python, over any attributes, shards, dead rows and replaced items."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.index import attribute_column, attributes

TIME = pa.timestamp("us", "UTC")
SCHEMA = pa.schema(
    [
        ("brand", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("year", pa.int64()),
        ("price", pa.float64()),
        ("stock", pa.bool_()),
        ("added", TIME),
    ]
)
NAMES = ["", "a", "b", "bb", "ä", "7"]
NUMBERS = [-1.5, -0.0, 0.0, 0.1, 2.0, 1e300]
YEARS = [-(2**63), -3, 0, 7, 2**53, 2**53 + 1, 2**63 - 1]
DAYS = [datetime.datetime(2025, 1, day, tzinfo=datetime.UTC) for day in (1, 2, 3)]
BOUNDS = [*YEARS, *NUMBERS, 0.5, 2**53 + 2, 10**30, float(2**53)]
MOMENTS = [*(d.isoformat() for d in DAYS), "2025-01-02", "2025-01-02T12:00:00+01:00", "1900-01-01"]
OPERANDS: dict[str, list[Any]] = {
    "brand": [*NAMES, 7, "nothing"],
    "tags": [*NAMES, 7, "nothing"],
    "year": [*YEARS, 1, 2**53 - 1],
    "stock": [True, False],
    "price": [],
    "added": [],
}
SETS = ["any_of", "all_of", "none_of"]
RANGES = ["gte", "gt", "lte", "lt"]


def some_item(draw: random.Random) -> dict[str, Any]:
    """Each value is missing in one item of five."""
    item = {
        "brand": draw.choice(NAMES),
        "tags": [draw.choice([*NAMES, None]) for _ in range(draw.randrange(5))],
        "year": draw.choice(YEARS),
        "price": draw.choice(NUMBERS),
        "stock": draw.random() < 0.5,
        "added": draw.choice(DAYS),
    }
    return {name: value if draw.random() < 0.8 else None for name, value in item.items()}


def some_filter(draw: random.Random) -> dict[str, dict[str, Any]]:
    predicates = {}
    for name in draw.sample(sorted(OPERANDS), draw.choice([0, 1, 1, 1, 2, 3])):
        names = SETS if OPERANDS[name] else RANGES
        wanted: dict[str, Any] = {}
        for operator in draw.sample(SETS + RANGES if name == "year" else names, draw.choice([1, 1, 2])):
            if operator in SETS:
                wanted[operator] = draw.choices(OPERANDS[name], k=draw.choice([1, 1, 2, 4]))
            else:
                wanted[operator] = draw.choice(MOMENTS if name == "added" else BOUNDS)
        predicates[name] = wanted
    return predicates


def satisfies(item: dict[str, Any], predicates: dict[str, dict[str, Any]]) -> bool:
    """The meaning of a filter, spelled out."""
    compare: dict[str, Callable[[Any, Any], bool]] = {
        "gte": lambda a, b: a >= b, "gt": lambda a, b: a > b,
        "lte": lambda a, b: a <= b, "lt": lambda a, b: a < b,
    }  # fmt: skip
    for name, wanted in predicates.items():
        value = item[name]
        own = value if isinstance(value, list) else [value]
        own = [v for v in own or [] if v is not None]
        for operator, operand in wanted.items():
            if operator in compare:
                if name == "added":
                    operand = datetime.datetime.fromisoformat(operand)
                    operand = operand if operand.tzinfo else operand.replace(tzinfo=datetime.UTC)
                holds = value is not None and compare[operator](value, operand)
            else:
                named = [str(o) if name in ("brand", "tags") else o for o in operand]
                both = [o in own for o in named]
                holds = {"any_of": any(both), "all_of": all(both), "none_of": not any(both)}[operator]
            if not holds:
                return False
    return True


Shards = list[tuple[pa.Table, np.ndarray, np.ndarray]]


def some_catalogue(draw: random.Random) -> tuple[Shards, dict[int, dict[str, Any]], int]:
    """Shards, the items that are alive by row, and the number of rows."""
    num_base = draw.choice([0, 1, 7, 40])
    num_rows = num_base + draw.randrange(1, 10)
    base = {row: some_item(draw) for row in draw.sample(range(num_rows), num_base)}
    delta = {
        row: some_item(draw) for row in sorted(draw.sample(range(num_rows), draw.randrange(min(num_rows, 6))))
    }
    deleted = draw.sample(sorted(base), min(num_base, draw.randrange(4)))
    dead = np.array(sorted(base.keys() & {*delta, *deleted}), np.int64)
    shards = []
    for number in range(3):
        mine = sorted(row for row in base if row % 7 % 3 == number)
        table = pa.Table.from_pylist([base[row] for row in mine], SCHEMA)
        shards.append((table, np.array(mine, np.int64), dead))
    none = np.zeros(0, np.int64)
    shards.append((pa.Table.from_pylist(list(delta.values()), SCHEMA), np.array(list(delta), np.int64), none))
    alive = {row: item for row, item in base.items() if row not in dead}
    return shards, alive | delta, num_rows


LIMIT = st.sampled_from([1, 6, 64])


@settings(max_examples=150, deadline=None)
@given(
    draw=st.randoms(use_true_random=True),
    sparse=LIMIT,
    sorted_=LIMIT,
    scattered=LIMIT,
    few_values=st.sampled_from([0, 100]),
)
def test_filters_mean_what_they_say(
    draw: random.Random, sparse: int, sorted_: int, scattered: int, few_values: int
) -> None:
    """Also as rows, as bits and either way of making them, whatever the number of items would choose."""
    shards, items, num_rows = some_catalogue(draw)
    some = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attributes, "SPARSE", sparse)
        patch.setattr(attribute_column, "SPARSE", sparse)
        patch.setattr(attribute_column, "_SORTED", sorted_)
        patch.setattr(attribute_column, "_SCATTERED", scattered)
        patch.setattr(attribute_column, "_FEW_VALUES", few_values)
        filterable = attributes.Attributes(shards, num_rows)
        for predicates in [some_filter(draw) for _ in range(40)] * 2:
            expected = [row for row, item in sorted(items.items()) if satisfies(item, predicates)]
            found = filterable.allowed(predicates)
            assert found.num_rows == num_rows
            assert found.rows().tolist() == expected
            assert found.count == len(expected)
            assert np.flatnonzero(found.mask()).tolist() == expected
            some += 0 < len(expected) < len(items)
    assert some > 10 or len(items) < 30
