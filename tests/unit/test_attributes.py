"""Columns as attributes: their types, what filters refuse, what is kept."""

from __future__ import annotations

import datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from twotower.config import AttributeConfig
from twotower.data.attributes import attribute_columns, attribute_table
from twotower.errors import ConfigError, NotAllowedError
from twotower.index.attributes import Attributes
from twotower.index.kept import Kept

DAY = datetime.datetime(2025, 1, 2, tzinfo=datetime.UTC)
NONE = np.zeros(0, np.int64)


def typed(values: Any, **declared: Any) -> pa.Array:
    items = pa.table({"x": values})
    return attribute_table(items, {"a": AttributeConfig(column="x", **declared)})["a"].combine_chunks()


@pytest.mark.parametrize(
    ("values", "declared", "kind", "expected"),
    [
        (["a", None, ""], {}, pa.string(), ["a", None, ""]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), {}, pa.string(), ["a", "b", "a"]),
        ([7, None, -1], {"type": "text"}, pa.string(), ["7", None, "-1"]),
        (["a| b", None, "|"], {"separator": "|"}, pa.list_(pa.string()), [["a", "b"], None, []]),
        ([["a", None], None, []], {}, pa.list_(pa.string()), [["a"], None, []]),
        ([[7], [], None], {}, pa.list_(pa.string()), [["7"], [], None]),
        (pa.array([7, None], pa.uint8()), {}, pa.int64(), [7, None]),
        (["7", None, " 8"], {"type": "integer"}, pa.int64(), [7, None, 8]),
        ([0.5, np.nan, np.inf, None], {}, pa.float64(), [0.5, None, None, None]),
        (["0.5", "7", None], {"type": "number"}, pa.float64(), [0.5, 7.0, None]),
        ([Decimal("0.25"), None], {}, pa.float64(), [0.25, None]),
        ([True, None], {}, pa.bool_(), [True, None]),
        (["true", "FALSE", "0"], {"type": "boolean"}, pa.bool_(), [True, False, False]),
        ([datetime.date(2025, 1, 2), None], {}, pa.timestamp("us", "UTC"), [DAY, None]),
        (["2025-01-02", "2025-01-02T02:00+02:00"], {"type": "time"}, pa.timestamp("us", "UTC"), [DAY, DAY]),
        (pa.nulls(2), {}, pa.string(), [None, None]),
    ],
)  # fmt: skip
def test_types(values: Any, declared: dict[str, Any], kind: pa.DataType, expected: list[Any]) -> None:
    found = typed(values, **declared)
    assert found.type == kind
    assert found.to_pylist() == expected


@pytest.mark.parametrize(
    ("values", "declared", "message"),
    [
        (
            ["7", "seven"],
            {"type": "integer"},
            "index.attributes.a: column 'x' of type string",
        ),
        ([1, 2], {"type": "time"}, "numbers are no times"),
        (["yesterday"], {"type": "time"}, "no times, such as 'yesterday'"),
        ([[0.5]], {}, "lists must be of text or integers"),
        ([{"b": 1}], {}, "no filter reads this type"),
        ([2**63], {}, "can not be filtered by"),
    ],
)
def test_values_that_a_type_can_not_hold(values: Any, declared: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        typed(pa.array(values, pa.uint64()) if values == [2**63] else values, **declared)


def test_a_column_that_is_not_there() -> None:
    items = pa.table({"item_id": ["a"], "year": [1990]})
    declared = {"year": AttributeConfig(), "when": AttributeConfig(column="date")}
    assert attribute_columns(declared) == {"year": "year", "when": "date"}
    with pytest.raises(ConfigError, match="index.attributes.when: .* no column 'date'; .* item_id, year"):
        attribute_table(items, declared)


@pytest.fixture
def attributes() -> Attributes:
    table = pa.table(
        {
            "genre": [["a", "b"], ["b"], None],
            "brand": ["x", None, "y"],
            "year": [1990, 2000, None],
            "price": [0.5, 1.5, None],
            "stock": [True, False, None],
            "added": pa.array([DAY, None, DAY], pa.timestamp("us", "UTC")),
        }
    )
    return Attributes([(table, [1, 3, 4], NONE)], 6)


@pytest.mark.parametrize(
    ("predicates", "message", "allowed"),
    [
        ([], "filter: [] is no object", "an object such as"),
        ({"colour": {"any_of": ["red"]}}, "no attribute 'colour'", "genre, brand, year, price, stock, added"),
        ({"year": 1990}, "filter.year: 1990 is no object of operators", "any_of, all_of, none_of, gte"),
        ({"year": {}}, "filter.year: {} is no object of operators", "any_of"),
        (
            {"year": {"above": 1990}},
            "filter.year: 'above' is no operator",
            "any_of, all_of, none_of, gte, gt",
        ),
        ({"brand": {"gte": "x"}}, "filter.brand: 'gte' is no operator", "any_of, all_of, none_of"),
        ({"price": {"any_of": [0.5]}}, "filter.price: 'any_of' is no operator", "gte, gt, lte, lt"),
        ({"brand": {"any_of": "x"}}, "filter.brand.any_of: 'x' is not allowed", "a list of one or more"),
        ({"brand": {"any_of": []}}, "filter.brand.any_of: [] is not allowed", "a list of one or more"),
        ({"brand": {"none_of": [None]}}, "filter.brand.none_of: null is not", "a text or an integer"),
        ({"genre": {"any_of": [True]}}, "filter.genre.any_of: true is not", "a text or an integer"),
        ({"year": {"any_of": [1990.0]}}, "filter.year.any_of: 1990.0 is not", "an integer"),
        ({"year": {"gte": "1990"}}, "filter.year.gte: '1990' is not", "a number"),
        ({"year": {"gte": True}}, "filter.year.gte: true is not", "a number"),
        ({"price": {"lt": float("nan")}}, "filter.price.lt: nan is not", "a number"),
        ({"stock": {"any_of": [1]}}, "filter.stock.any_of: 1 is not", "true or false"),
        ({"added": {"gte": "soon"}}, "filter.added.gte: 'soon' is not", "ISO 8601"),
        ({"added": {"gte": 5}}, "filter.added.gte: 5 is not", "ISO 8601"),
        ({"brand": {"any_of": ["x"] * 1001}}, "more than 1,000 values", "1,000 in all"),
        ({"brand": {"any_of": ["x"] * 600}, "genre": {"any_of": ["x"] * 401}}, "more than 1,000", "in all"),
    ],
)
def test_what_filters_refuse(attributes: Attributes, predicates: Any, message: str, allowed: str) -> None:
    # Twice, since what was evaluated is kept.
    for _ in range(2):
        with pytest.raises(NotAllowedError) as caught:
            attributes.allowed(predicates)
        assert message in caught.value.message
        assert allowed in caught.value.allowed


def test_values_that_no_item_has_are_allowed(attributes: Attributes) -> None:
    assert attributes.allowed({"brand": {"any_of": ["z"]}}).rows().tolist() == []
    assert attributes.allowed({"brand": {"none_of": ["z"]}}).rows().tolist() == [1, 3, 4]
    assert attributes.allowed({}).rows().tolist() == [1, 3, 4]


def test_it_says_what_there_is_to_filter_by(attributes: Attributes) -> None:
    described = attributes.describe()
    assert {name: facts["type"] for name, facts in described.items()} == {
        "genre": "list", "brand": "text", "year": "integer", "price": "number", "stock": "boolean",
        "added": "time",
    }  # fmt: skip
    assert described["price"]["operators"] == ["gte", "gt", "lte", "lt"]
    assert described["genre"]["operators"] == ["any_of", "all_of", "none_of"]
    nothing = Attributes([], 4)
    assert nothing.describe() == {}
    with pytest.raises(NotAllowedError, match="none was declared in index.attributes"):
        nothing.allowed({"year": {"gte": 1}})


def test_evaluated_filters_are_kept_unless_switched_off() -> None:
    table = pa.table({"year": [1, 2, 3]})
    kept, anew = (Attributes([(table, [0, 1, 2], NONE)], 3, answer_bytes=size) for size in (1 << 10, 0))
    for attributes in (kept, anew):
        first, again = (attributes.allowed({"year": {"gte": 2}}) for _ in range(2))
        assert first.rows().tolist() == again.rows().tolist() == [1, 2]
        assert (first is again) == (attributes is kept)


def test_what_was_used_longest_ago_goes_first() -> None:
    kept = Kept(10)
    kept.put("a", 1, 4)
    kept.put("b", 2, 4)
    kept.put("too large", 3, 11)
    assert kept.get("a") == 1
    kept.put("c", 3, 4)
    assert [kept.get(key) for key in ("a", "b", "c", "too large", None)] == [1, None, 3, None, None]


def test_sets_are_drawn_as_queries_ask_for_them() -> None:
    count = 5_000
    rng = np.random.default_rng(3)
    # Rows have gaps, and some values are missing.
    rows = np.flatnonzero(rng.random(2 * count) < 0.5)
    count = len(rows)
    tags = [rng.choice(list("abcdefgh"), rng.integers(0, 3), replace=False).tolist() for _ in range(count)]
    columns = {
        "brand": pa.array([f"b{n}" for n in rng.integers(0, 60, count)]),
        "tags": pa.array(tags, pa.list_(pa.string())),
        "year": pa.array(rng.integers(1900, 2030, count)),
        "price": pa.array([None if x < 0.1 else float(x) for x in rng.random(count)]),
        "stock": pa.array(rng.random(count) < 0.5),
    }
    whole = Attributes([(pa.table(columns), rows, NONE)], 2 * count + 100)
    alone = {n: Attributes([(pa.table({n: c}), rows, NONE)], 2 * count + 100) for n, c in columns.items()}
    for share in (0.5, 0.1, 0.01):
        for _ in range(20):
            found = whole.drawn(share, rng)
            assert found is not None
            assert share / 2 <= found.count / count <= 2 * share
            assert np.isin(found.rows(), rows).all()
    # Values lie together: what is drawn is all of some values, or a range of them.
    brands = np.array(columns["brand"].to_pylist())
    drawn = alone["brand"].drawn(0.1, rng)
    assert drawn is not None
    inside = np.isin(rows, drawn.rows())
    assert 2 < len(set(brands[inside])) < 20
    assert set(brands[inside]).isdisjoint(brands[~inside])
    years = np.array(columns["year"].to_pylist())
    drawn = alone["year"].drawn(0.1, rng)
    assert drawn is not None
    inside = np.isin(rows, drawn.rows())
    outside = years[~inside]
    assert not ((outside >= years[inside].min()) & (outside <= years[inside].max())).any()
    # Two values have no tenth.
    assert alone["stock"].drawn(0.1, rng) is None
    assert alone["stock"].drawn(0.5, rng) is not None
    assert len({repr(alone["price"].drawn(0.1, rng).rows()[:3]) for _ in range(5)}) > 1  # type: ignore[union-attr]
    assert Attributes([], 10).drawn(0.5, rng) is None
