"""Values of every type of Arrow: fitted, encoded, asked for in JSON and filtered by as one and the same."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.config.model import FeaturesConfig
from twotower.config.service import AttributeConfig
from twotower.data.attributes import attribute_table
from twotower.data.fitting import fit_features
from twotower.errors import DataError
from twotower.index.attributes import Attributes
from twotower.model.features import encode_columns
from twotower.retrieval.given import encode_given
from twotower.schema import (
    CategoricalFeature,
    FeatureSchema,
    IdFeature,
    MultiHotFeature,
    NumericFeature,
    VectorFeature,
)
from twotower.values import as_categories, as_text, category_of


def floats(bits: int) -> st.SearchStrategy[float]:
    width = {16: np.float16, 32: np.float32, 64: np.float64}[bits]
    whole = st.integers(-(2**70), 2**70).map(float)
    plain = st.sampled_from([0.1, 0.0, -0.0, 1.0, 2.5, 1e16, 2.0**53, 1e-7])
    numbers = st.one_of(st.floats(width=bits), whole, plain)  # type: ignore[arg-type]

    def rounded(value: float) -> float:
        with np.errstate(over="ignore"):
            return float(width(value))

    return numbers.map(rounded)


def integers(bits: int, signed: bool) -> st.SearchStrategy[int]:
    low = -(2 ** (bits - 1)) if signed else 0
    return st.integers(low, low + 2**bits - 1)


WORDS = st.one_of(
    st.text(max_size=5), st.sampled_from(["1.0", "True", "-0.0", "01", "3", " a", "nan", "1e3"])
)
DECIMALS = st.integers(-(10**9), 10**9).map(lambda n: Decimal(n).scaleb(-3))
DATES = st.dates(datetime.date(1, 1, 1), datetime.date(9999, 12, 31))
TYPES: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    *((getattr(pa, f"int{b}")(), integers(b, True)) for b in (8, 16, 32, 64)),
    *((getattr(pa, f"uint{b}")(), integers(b, False)) for b in (8, 16, 32, 64)),
    (pa.float16(), floats(16).map(np.float16)),
    (pa.float32(), floats(32)),
    (pa.float64(), floats(64)),
    (pa.bool_(), st.booleans()),
    (pa.decimal128(20, 3), DECIMALS),
    (pa.decimal256(50, 3), DECIMALS),
    (pa.decimal128(38, 0), st.integers(-(10**37), 10**37).map(Decimal)),
    (pa.date32(), DATES),
    (pa.date64(), DATES),
    (pa.string(), WORDS),
    (pa.large_string(), WORDS),
    (pa.string_view(), WORDS),
    (pa.dictionary(pa.int8(), pa.string()), WORDS),
]  # fmt: skip
LISTS = [pa.list_, pa.large_list, pa.list_view, lambda kind: pa.list_(kind, 2)]


@st.composite
def columns(draw: st.DrawFn) -> tuple[pa.DataType, list[Any]]:
    kind, values = draw(st.sampled_from(TYPES))
    return kind, draw(st.lists(st.one_of(st.none(), values), min_size=1, max_size=8))


def as_json(kind: pa.DataType, value: Any) -> Any:
    """The value as a client writes it, who reads the source."""
    if pa.types.is_float32(kind) or pa.types.is_float16(kind):
        exact = float(value).is_integer() and abs(float(value)) < 2**64
        # With the digits that are shown.
        value = float(value) if exact else float(str(kind.to_pandas_dtype()(value)))
    elif isinstance(value, Decimal):
        value = int(value) if value == value.to_integral_value() else float(value)
    elif isinstance(value, datetime.date):
        value = value.isoformat()
    return json.loads(json.dumps(value))


def fitted(specs: list[Any], table: pa.Table) -> tuple[FeatureSchema, pa.Table]:
    """Fit features of items, of which the query side has the same."""
    config = FeaturesConfig(query=[s for s in specs], item=[IdFeature(name="item_id"), *specs])
    size = table.num_rows
    schema, items, _ = fit_features(config, table, table, size, size, size, True)
    return schema, items


@given(columns())
@settings(max_examples=100, deadline=None)
def test_a_category_is_the_same_fitted_encoded_and_asked_for(column: tuple[pa.DataType, list[Any]]) -> None:
    kind, values = column
    table = pa.table({"f": pa.array(values, kind), "item_id": [str(i) for i in range(len(values))]})
    spec = CategoricalFeature(name="f")
    schema, items = fitted([spec], table)
    # The stored column, and one as an update brings it.
    for form in (items, table):
        ids = encode_columns(schema.item, form)["f"][:, 0]
        for place, value in enumerate(values):
            name = as_categories(table["f"])[place].as_py()
            if name is None:
                assert ids[place] == -1
                continue
            if name.strip():
                assert ids[place] > 0, (kind, value)
            asked = as_json(kind, value)
            if not (isinstance(asked, float) and not np.isfinite(asked)):
                found = encode_given([schema.query[0]], {"f": asked}, "features")["f"]
                assert found.tolist() == [[ids[place]]], (kind, value)


@given(columns(), st.sampled_from(LISTS), st.data())
@settings(max_examples=100, deadline=None)
def test_values_of_lists_are_the_same_fitted_encoded_and_asked_for(
    column: tuple[pa.DataType, list[Any]], make: Any, data: st.DataObject
) -> None:
    kind, values = column
    if pa.types.is_dictionary(kind) or pa.types.is_string_view(kind):
        kind = pa.string()
    pairs = [[v, data.draw(st.sampled_from(values))] for v in values] + [None]
    table = pa.table({"f": pa.array(pairs, make(kind)), "item_id": [str(i) for i in range(len(pairs))]})
    spec = MultiHotFeature(name="f")
    schema, items = fitted([spec], table)
    ids = encode_columns(schema.item, items)["f"]
    names = []
    for pair in pairs:
        trimmed = pc.utf8_trim_whitespace(as_text(pa.array(pair or [], kind)))
        names.append([n for n in as_categories(trimmed).to_pylist() if n])
    for row, (pair, wanted) in enumerate(zip(pairs, names, strict=True)):
        known = schema.item[1].values or []
        place = {n: at + 1 for at, n in enumerate(known)}
        expected = {place[n] for n in wanted}
        assert set(ids[row].tolist()) - {-1} == expected, (kind, pair)
        asked = [as_json(kind, v) for v in pair or [] if v is not None]
        asked = [v for v in asked if not (isinstance(v, float) and not np.isfinite(v))]
        if len(asked) == len(wanted):
            found = encode_given([schema.query[0]], {"f": asked}, "features")["f"]
            assert set(found[0].tolist()) - {-1} == expected, (kind, pair)


@given(columns())
@settings(max_examples=80, deadline=None)
def test_a_plain_value_has_the_name_that_a_column_of_it_has(column: tuple[pa.DataType, list[Any]]) -> None:
    kind, values = column
    names = as_categories(pa.array(values, kind)).to_pylist()
    for name, value in zip(names, values, strict=True):
        if value is not None and not isinstance(value, (np.float16, Decimal, datetime.date)):
            assert kind == pa.float32() or category_of(value) == name
    # A name is its own name: what is stored is read again.
    assert as_categories(pa.array(names, pa.string())).to_pylist() == names


@given(columns())
@settings(max_examples=80, deadline=None)
def test_a_filter_finds_an_item_by_its_value(column: tuple[pa.DataType, list[Any]]) -> None:
    kind, values = column
    items = pa.table({"f": pa.array(values, kind)})
    table = attribute_table(items, {"f": AttributeConfig(type="text")})
    rows = np.arange(len(values))
    attributes = Attributes([(table, rows, rows[:0])], len(values))
    names = as_categories(items["f"]).to_pylist()
    for row, (name, value) in enumerate(zip(names, values, strict=True)):
        if name is not None:
            assert row in attributes.allowed({"f": {"any_of": [name]}}).rows()
            asked = as_json(kind, value)
            if isinstance(asked, (int, str)) and not isinstance(asked, bool):
                assert row in attributes.allowed({"f": {"any_of": [asked]}}).rows()


NUMBERS = [t for t in TYPES if not (pa.types.is_date(t[0]) or pa.types.is_dictionary(t[0]))]


@given(st.data(), st.sampled_from(["none", "log1p"]))
@settings(max_examples=150, deadline=None)
def test_numbers_that_are_prepared_are_encoded(data: st.DataObject, transform: Any) -> None:
    kind, strategy = data.draw(st.sampled_from(NUMBERS))
    values = data.draw(st.lists(st.one_of(st.none(), strategy), min_size=1, max_size=8))
    table = pa.table({"f": pa.array(values, kind), "item_id": [str(i) for i in range(len(values))]})
    try:
        schema, items = fitted([NumericFeature(name="f", transform=transform)], table)
    except DataError:
        return  # refused before anything is trained
    feature = schema.item[1]
    assert np.isfinite([feature.mean, feature.std]).all()
    assert feature.std > 0
    for form in (items, table):
        found = encode_columns(schema.item, form)["f"]
        assert np.isfinite(found).all()
        # No more than n rows allow, and a constant deviates by nothing.
        assert np.abs(found[:, 0]).max(initial=0) <= np.sqrt(len(values)) + 1e-3


@given(
    st.data(), st.sampled_from(LISTS), st.sampled_from([pa.float16(), pa.float32(), pa.float64(), pa.int64()])
)
@settings(max_examples=80, deadline=None)
def test_vectors_that_are_prepared_are_encoded(data: st.DataObject, make: Any, kind: pa.DataType) -> None:
    strategy = dict((str(k), s) for k, s in TYPES)[str(kind)]
    pairs = st.one_of(st.none(), st.lists(strategy, min_size=2, max_size=2))
    values = data.draw(st.lists(pairs, min_size=1, max_size=6))
    column = pa.array(values, make(kind))
    table = pa.table({"f": column, "item_id": [str(i) for i in range(len(values))]})
    try:
        schema, items = fitted([VectorFeature(name="f", dim=2)], table)
    except DataError:
        return
    for form in (items, table):
        found = encode_columns(schema.item, form)["f"]
        expected = np.array([v or [0, 0] for v in values], np.float64).astype(np.float32)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("noise", [0.0, 1e-17, -1e-17])
def test_a_constant_column_deviates_by_one(noise: float) -> None:
    values = [0.1 + 0.2, 0.3 + noise, 0.3] * 7
    table = pa.table({"f": values, "item_id": [str(i) for i in range(21)]})
    schema, _ = fitted([NumericFeature(name="f")], table)
    assert schema.item[1].std == 1.0
    nearby = encode_columns(schema.item, pa.table({"f": [0.3001, 7.0]}))["f"]
    np.testing.assert_allclose(nearby[:, 0], [0.0001, 6.7], atol=1e-6)


def test_the_noise_of_a_column_is_that_of_its_precision() -> None:
    values = np.array([0.3, 0.1 + 0.2, 0.30000001, 0.29999998] * 5, np.float32)
    table = pa.table({"f": values, "item_id": [str(i) for i in range(20)]})
    assert fitted([NumericFeature(name="f")], table)[0].item[1].std == 1.0
    # Of doubles the same difference is one: times in seconds, an hour apart.
    table = pa.table({"f": 1.7e9 + 3600 * np.arange(20.0), "item_id": [str(i) for i in range(20)]})
    assert fitted([NumericFeature(name="f")], table)[0].item[1].std == pytest.approx(20758.9, rel=1e-4)
