"""Slices of users and items, the vectors of attributes, and what is told of a collapse."""

from __future__ import annotations

import datetime
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from tests import oracles
from twotower.config import AttributeConfig
from twotower.data.knowledge import Holdout
from twotower.errors import ConfigError
from twotower.evaluation.comparison import Measure, Outcome
from twotower.evaluation.lists import ItemFacts
from twotower.evaluation.metrics import metric_names
from twotower.evaluation.slices import (
    MISSING,
    OTHER,
    attribute_vectors,
    check_slices,
    item_slices,
    user_slices,
)
from twotower.evaluation.summary import collapse_of, slice_tables
from twotower.schema import (
    CategoricalFeature,
    FeatureSchema,
    FittedFeature,
    HistoryFeature,
    IdFeature,
    MultiHotFeature,
    NumericFeature,
)

ITEMS = pa.table(
    {
        "item_id": ["a", "b", "c", "d"],
        "kinds": ["x|y", "y", None, "z"],
        "brand": ["north", "north", "south", None],
        "since": [datetime.datetime(2020, 1, 5), datetime.datetime(2021, 3, 1), None, None],
        "price": [1.0, 2.0, 2.0, None],
    }
)
USERS = pa.table({"user_id": ["u", "v", "w", "t"], "country": ["NL", "BE", "NL", None], "age": [1, 2, 3, 4]})


def dataset_of(items=ITEMS, users=USERS, more=()):
    schema = FeatureSchema(
        query=[
            FittedFeature(spec=HistoryFeature(name="history")),
            FittedFeature(spec=CategoricalFeature(name="country"), values=["NL", "BE"]),
            FittedFeature(spec=NumericFeature(name="age"), mean=2.5, std=1.0),
            *more,
        ],
        item=[
            FittedFeature(spec=IdFeature(name="item_id")),
            FittedFeature(spec=MultiHotFeature(name="genres", column="kinds"), values=["x", "y", "z"]),
            FittedFeature(spec=CategoricalFeature(name="brand"), values=["north", "south"]),
            FittedFeature(spec=NumericFeature(name="price"), mean=1.5, std=1.0),
        ],
        num_users=len(users),
        num_items=len(items),
        num_catalogue_items=len(items),
    )
    return SimpleNamespace(
        schema=schema,
        item_schema=items.schema,
        item_table=lambda columns=None: items.select(columns) if columns else items,
        user_table=lambda columns=None: users.select(columns) if columns else users,
    )


def shown(slices):
    return {(piece.by, piece.value): np.flatnonzero(piece.members).tolist() for piece in slices}


def test_users_by_activity():
    activity = np.array([0, 1, 5, 6, 20, 21, 100, 101, 9_999])
    users = np.zeros(9, dtype=np.int64)
    assert shown(user_slices(dataset_of(), users, activity, [])) == {
        ("activity", "none"): [0],
        ("activity", "1 to 5"): [1, 2],
        ("activity", "6 to 20"): [3, 4],
        ("activity", "21 to 100"): [5, 6],
        ("activity", "over 100"): [7, 8],
    }


def test_users_by_their_attributes():
    """Test users are rows 3, 0 and 2 of the user table."""
    found = shown(user_slices(dataset_of(), np.array([3, 0, 2]), np.ones(3, np.int64), ["country", "genres"]))
    del found["activity", "1 to 5"]
    assert found == {("country", "NL"): [1, 2], ("country", MISSING): [0]}


def test_items_by_popularity():
    # 100 positives: 50 + 10 are head (the second begins at 50: middle), and so on; the last was never taken.
    counts = np.array([5, 50, 15, 10, 0, 20])
    found = shown(item_slices(dataset_of(), counts, [], {}))
    assert found == {
        ("popularity", "head"): [1],
        ("popularity", "middle"): [2, 5],
        ("popularity", "tail"): [0, 3],
        ("popularity", "new"): [4],
    }


def test_items_by_their_attributes():
    attributes = {"since": AttributeConfig(), "tags": AttributeConfig(column="kinds", separator="|")}
    names = ["genres", "brand", "price", "since", "tags", "country"]
    found = shown(item_slices(dataset_of(), np.ones(4, np.int64), names, attributes))
    assert {key: rows for key, rows in found.items() if key[0] != "popularity"} == {
        ("genres", "y"): [0, 1],
        ("genres", "x"): [0],
        ("genres", "z"): [3],
        ("genres", MISSING): [2],
        ("brand", "north"): [0, 1],
        ("brand", "south"): [2],
        ("brand", MISSING): [3],
        ("price", "2"): [1, 2],
        ("price", "1"): [0],
        ("price", MISSING): [3],
        ("since", "2020"): [0],
        ("since", "2021"): [1],
        ("since", MISSING): [2, 3],
        ("tags", "y"): [0, 1],
        ("tags", "x"): [0],
        ("tags", "z"): [3],
        ("tags", MISSING): [2],
    }


def test_a_name_of_both_sides_is_told_apart():
    users = USERS.append_column("brand", pa.array(["north"] * 4))
    twice = FittedFeature(spec=CategoricalFeature(name="brand"), values=["north"])
    dataset = dataset_of(users=users, more=[twice])
    theirs = user_slices(dataset, np.arange(4), np.ones(4, np.int64), ["brand"])
    ours = item_slices(dataset, np.ones(4, np.int64), ["brand"], {})
    assert {piece.by for piece in theirs} == {"activity", "brand of users"}
    assert {piece.by for piece in ours} == {"popularity", "brand of items"}


def test_rare_values_are_one_slice_and_many_numbers_are_quarters():
    names = [f"v{i}" for i in range(25) for _ in range(25 - i)]
    users = pa.table({"user_id": names, "country": names, "age": np.arange(len(names)).astype(float)})
    dataset = dataset_of(users=users)
    rows = np.arange(len(names))
    found = shown(user_slices(dataset, rows, np.ones(len(rows), np.int64), ["country", "age"]))
    by_country = {value: members for (by, value), members in found.items() if by == "country"}
    assert len(by_country) == 21
    assert next(iter(by_country)) == "v0"
    assert [names[row] for row in by_country[OTHER]] == [n for n in names if int(n[1:]) >= 20]
    by_age = {value: len(members) for (by, value), members in found.items() if by == "age"}
    assert list(by_age) == ["0 to below 81", "81 to below 162", "162 to below 243", "243 to 324"] or (
        sum(by_age.values()) == len(names) and len(by_age) == 4
    )
    assert max(by_age.values()) - min(by_age.values()) <= 1


def test_names_that_are_not_declared_are_refused():
    check_slices(["genres", "country", "age", "since"], dataset_of(), {"since": AttributeConfig()})
    with pytest.raises(ConfigError, match=r"'kinds' is no .*allowed: country, age, genres, brand, price$"):
        check_slices(["genres", "kinds"], dataset_of(), {})
    with pytest.raises(ConfigError, match="'history'"):
        check_slices(["history"], dataset_of(), {})


def test_attribute_vectors_have_length_one():
    vectors = attribute_vectors(dataset_of()).toarray()
    same = vectors @ vectors.T
    # a: x, y and north; b: y and north; c: south; d: z.
    assert same[0, 1] == pytest.approx(2 / np.sqrt(3 * 2))
    assert np.diag(same).tolist() == pytest.approx([1.0] * 4)
    assert same[2, [0, 1, 3]].tolist() == [0, 0, 0]


def test_without_attributes_there_are_no_vectors():
    dataset = dataset_of()
    dataset.schema.item[1:] = []
    assert attribute_vectors(dataset) is None


def outcome_of(lists, relevant, members):
    measure = Measure([1, 3], ItemFacts(np.ones(8, np.int64), 5), members)
    offsets, rows = oracles.csr(relevant)
    none = np.empty(0, np.int64)
    held = Holdout(
        np.arange(len(lists)), np.zeros(len(lists) + 1, np.int64), none, offsets, rows, {"evaluated": 1}
    )
    outcome = Outcome(measure)
    return outcome, outcome.add(oracles.pad(lists, 3), held)


def test_a_slice_of_items_counts_its_relevant_items_only():
    lists = [[0, 1, 2], [4, 0, 5], [6, 7, 3]]
    relevant = [{1, 5}, {0, 4, 7}, {3}]
    members = np.zeros((2, 8), dtype=bool)
    members[0, [0, 1]] = True
    members[1, [2, 6]] = True
    outcome, values = outcome_of(lists, relevant, members)
    # Of users 0 and 1 one relevant item each is a member: both at rank 2.
    assert outcome.slices[0].num_queries == 2
    assert outcome.slices[0].result()["recall@3"] == 1.0
    assert outcome.slices[0].result()["mrr@3"] == 0.5
    assert outcome.slices[0].result()["recall@1"] == 0.0
    assert outcome.slices[1].num_queries == 0
    tables = slice_tables(
        {"model": values},
        {"model": outcome},
        metric_names([1, 3]),
        [],
        [SimpleNamespace(by="b", value="v", members=m) for m in members],
    )
    assert [(t["by"], t["users"]) for t in tables] == [("b", 2)]
    assert tables[0]["metrics"]["model"]["recall@3"] == 1.0


def test_a_slice_of_users_has_their_means():
    lists = [[0, 1, 2], [4, 0, 5], [6, 7, 3]]
    relevant = [{1, 5}, {0, 4, 7}, {3}]
    outcome, values = outcome_of(lists, relevant, np.zeros((0, 8), dtype=bool))
    piece = SimpleNamespace(by="activity", value="none", members=np.array([True, False, True]))
    tables = slice_tables({"model": values}, {"model": outcome}, metric_names([1, 3]), [piece], [])
    assert tables[0]["users"] == 2
    assert tables[0]["metrics"]["model"]["recall@3"] == pytest.approx((0.5 + 1.0) / 2)
    assert outcome.result()["recall@3"] == pytest.approx((0.5 + 2 / 3 + 1.0) / 3)


def test_a_collapse_is_said_in_one_line():
    said = collapse_of(0.83, 100)
    assert said.startswith("The model gives most users the same answer")
    assert "83%" in said
    assert "\n" not in said
    assert collapse_of(0.49, 100) is None
    assert collapse_of(1.0, 5) is None
    assert collapse_of(float("nan"), 100) is None
