"""Which stored and given values of a query reach the query tower, and what is excluded."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from twotower.data.histories import Histories
from twotower.data.vocabulary import Vocabulary
from twotower.errors import NotAllowedError
from twotower.retrieval.inputs import Inputs, UserTable
from twotower.retrieval.query import HistoryItem, Query
from twotower.schema import (
    CategoricalFeature,
    FeatureSchema,
    FittedFeature,
    HistoryFeature,
    IdFeature,
    MultiHotFeature,
    NumericFeature,
    TextFeature,
    VectorFeature,
)

NOW = 10_000
USERS = ["u0", "u1", "u2"]
# Rows 0 to 4 are the catalogue; "x5" only occurs in interactions.
ITEMS = ["i0", "i1", "i2", "i3", "i4", "x5"]
# By user: (item row, time, weight), oldest first.
STORED = {0: [(1, 10, 1.0), (5, 20, 0.5), (3, 30, 2.0), (0, 40, 1.0)], 1: [(2, 15, 1.0)], 2: []}
SEEN = {0: [0, 1, 3, 4, 5], 1: [2], 2: []}


def make_schema(history: bool = True, **features: Any) -> FeatureSchema:
    query = [FittedFeature(spec=IdFeature(name="user_id", dim=2))]
    if history:
        query.append(FittedFeature(spec=HistoryFeature(name="history", max_length=3)))
    query += features.values()
    item = [FittedFeature(spec=IdFeature(name="item_id"))]
    return FeatureSchema(query=query, item=item, num_users=3, num_items=6, num_catalogue_items=5)


def make_inputs(schema: FeatureSchema, columns: dict[str, np.ndarray] | None = None) -> Inputs:
    flat = [entry for user in STORED.values() for entry in user]
    histories = Histories(
        np.cumsum([0, *(len(e) for e in STORED.values())]),
        np.array([e[0] for e in flat], np.int32),
        np.array([e[1] for e in flat], np.int64),
        np.array([e[2] for e in flat], np.float32),
    )
    seen = np.array([row for rows in SEEN.values() for row in rows], np.int32)
    offsets = np.cumsum([0, *(len(rows) for rows in SEEN.values())])
    users = UserTable(Vocabulary(pa.array(USERS)), histories, offsets, seen, columns or {})
    return Inputs(schema, users, Vocabulary(pa.array(ITEMS)))


@pytest.fixture
def inputs() -> Inputs:
    return make_inputs(make_schema())


def test_a_known_user_has_his_stored_history(inputs: Inputs) -> None:
    found = inputs.resolve(Query(k=7, user_id="u0"), NOW)
    assert (found.strategy, found.user_row) == ("personal", 0)
    assert found.history_rows.tolist() == [0, 3, 5]
    assert found.history_weights.tolist() == [1.0, 2.0, 0.5]
    # The item outside the catalogue counts in the history, and an update may have added it.
    assert found.excluded.tolist() == [0, 1, 3, 4, 5]


@pytest.mark.parametrize(
    ("at", "rows"), [(41, [0, 3, 5]), (40, [3, 5, 1]), (30, [5, 1, -1]), (10, [-1, -1, -1])]
)
def test_only_what_is_strictly_before_the_moment_counts(inputs: Inputs, at: int, rows: list[int]) -> None:
    stored = inputs.resolve(Query(k=7, user_id="u0", at=at), NOW)
    assert stored.history_rows.tolist() == rows
    items = [HistoryItem(ITEMS[row], time, weight) for row, time, weight in STORED[0]]
    given = inputs.resolve(Query(k=7, user_id="u0", at=at, history=items), NOW)
    assert given.history_rows.tolist() == rows
    assert given.history_weights.tolist() == stored.history_weights.tolist()
    assert given.strategy == "personal"


def test_a_history_in_the_query_replaces_the_stored_one_but_not_the_seen_set(inputs: Inputs) -> None:
    found = inputs.resolve(Query(k=7, user_id="u1", history=[HistoryItem("i4"), HistoryItem("i3")]), NOW)
    assert found.history_rows.tolist() == [3, 4, -1]
    assert found.excluded.tolist() == [2, 3, 4]
    assert inputs.resolve(Query(k=7, user_id="u1", history=[]), NOW).history_rows.tolist() == [-1, -1, -1]


def test_items_without_a_time_count_at_every_moment(inputs: Inputs) -> None:
    history = [HistoryItem("i1"), HistoryItem("i2", time=99)]
    assert inputs.resolve(Query(k=7, history=history, at=50), NOW).history_rows.tolist() == [1, -1, -1]


def test_unknown_items_take_no_place(inputs: Inputs) -> None:
    history = [
        HistoryItem("i1"),
        HistoryItem("nobody"),
        HistoryItem("i2"),
        HistoryItem("none"),
        HistoryItem("i0"),
    ]
    found = inputs.resolve(Query(k=7, history=history), NOW)
    assert found.history_rows.tolist() == [0, 2, 1]
    assert found.excluded.tolist() == [0, 1, 2]


def test_exclusions(inputs: Inputs) -> None:
    query = Query(
        k=7, user_id="u1", history=[HistoryItem("i0")], exclude_seen=False, exclude_items=["i4", "x5", "zz"]
    )
    assert inputs.resolve(query, NOW).excluded.tolist() == [4, 5]
    # Later items of the history are not encoded, and are still not recommended.
    late = Query(k=7, history=[HistoryItem("i3", time=NOW + 1)])
    found = inputs.resolve(late, NOW)
    assert found.excluded.tolist() == [3]
    assert found.strategy == "popular"


GENRE = FittedFeature(spec=CategoricalFeature(name="group", column="age_group"), values=["young", "old"])


@pytest.mark.parametrize(
    ("query", "strategy"),
    [
        (Query(k=7, user_id="u2"), "personal"),
        (Query(k=7, user_id="u9"), "popular"),
        (Query(k=7), "popular"),
        (Query(k=7, user_id="u9", history=[HistoryItem("i1")]), "history"),
        (Query(k=7, history=[HistoryItem("x5")]), "history"),
        (Query(k=7, history=[HistoryItem("zz")]), "popular"),
        (Query(k=7, history=[HistoryItem("i1", time=5)], at=5), "popular"),
        (Query(k=7, features={"age_group": "old"}), "features"),
        (Query(k=7, features={"age_group": None}), "popular"),
        (Query(k=7, history=[HistoryItem("zz")], features={"age_group": "old"}), "features"),
        (Query(k=7, history=[HistoryItem("i1")], features={"age_group": "old"}), "history"),
    ],
)
def test_strategies(query: Query, strategy: str) -> None:
    inputs = make_inputs(make_schema(group=GENRE), {"group": np.array([[1], [2], [-1]], np.int32)})
    assert inputs.resolve(query, NOW).strategy == strategy


def test_a_history_is_of_no_use_to_a_model_without_one() -> None:
    inputs = make_inputs(make_schema(history=False))
    found = inputs.resolve(Query(k=7, history=[HistoryItem("i1")]), NOW)
    assert found.strategy == "popular"
    assert found.excluded.tolist() == [1]


def test_given_features_replace_stored_ones_one_by_one() -> None:
    age = FittedFeature(spec=NumericFeature(name="age"), mean=30.0, std=10.0)
    schema = make_schema(group=GENRE, age=age)
    stored = {
        "group": np.array([[1], [2], [-1]], np.int32),
        "age": np.array([[1, 0], [2, 0], [0, 1]], np.float32),
    }
    inputs = make_inputs(schema, stored)
    assert inputs.user_columns == ["age", "age_group"]

    found = inputs.resolve(Query(k=7, user_id="u0", features={"age_group": "old"}), NOW)
    assert found.columns["group"].tolist() == [[2]]
    assert found.columns["age"].tolist() == [[1, 0]]
    found = inputs.resolve(Query(k=7, user_id="u0", features={"age": 50}), NOW)
    assert found.columns["group"].tolist() == [[1]]
    assert found.columns["age"].tolist() == [[2, 0]]
    found = inputs.resolve(Query(k=7, user_id="u0", features={"age": None, "age_group": "teen"}), NOW)
    assert found.columns["group"].tolist() == [[0]]
    assert found.columns["age"].tolist() == [[0, 1]]
    found = inputs.resolve(Query(k=7, user_id="stranger"), NOW)
    assert found.columns["group"].tolist() == [[-1]]
    assert found.columns["age"].tolist() == [[0, 1]]


FEATURES = {
    "group": GENRE,
    "age": FittedFeature(spec=NumericFeature(name="age")),
    "income": FittedFeature(spec=NumericFeature(name="income", transform="log1p")),
    "likes": FittedFeature(spec=MultiHotFeature(name="likes"), values=["a", "b", "7"]),
    "bio": FittedFeature(spec=TextFeature(name="bio", buckets=40, max_length=6)),
    "face": FittedFeature(spec=VectorFeature(name="face", dim=4)),
}


@pytest.mark.parametrize(
    ("features", "name"),
    [
        ({"nothing": 1}, "nothing"),
        ({"group": "old"}, "group"),
        ({"user_id": "u1"}, "user_id"),
        ({"age": "33"}, "age"),
        ({"age": True}, "age"),
        ({"age": [1]}, "age"),
        ({"income": -2}, "income"),
        ({"likes": 1.5j}, "likes"),
        ({"likes": [["a"]]}, "likes"),
        ({"likes": [1.5]}, "likes"),
        ({"likes": {"a": 1}}, "likes"),
        ({"bio": 5}, "bio"),
        ({"face": [1, 2, 3]}, "face"),
        ({"face": "1,2,3,4"}, "face"),
        ({"face": [1, 2, 3, float("nan")]}, "face"),
        ({"face": [1, 2, 3, 1e300]}, "face"),
        ({"face": [1, 2, 3, 1e25]}, "face"),
        ({"age_group": ["old"]}, "age_group"),
        ({"age_group": {}}, "age_group"),
    ],
)
def test_feature_values_that_are_not_allowed(features: dict[str, Any], name: str) -> None:
    inputs = make_inputs(make_schema(**FEATURES), {})
    with pytest.raises(NotAllowedError) as caught:
        inputs.resolve(Query(k=7, features=features), NOW)
    assert name in caught.value.message
    assert caught.value.allowed


@pytest.mark.parametrize(
    ("features", "name", "expected"),
    [
        ({"age_group": "young"}, "group", [[1]]),
        ({"age_group": 5}, "group", [[0]]),
        ({"age": 3}, "age", [[3, 0]]),
        ({"income": 0}, "income", [[0, 0]]),
        ({"likes": ["b", 7, "z"]}, "likes", [[0, 2, 3]]),
        ({"likes": "b|a"}, "likes", [[1, 2]]),
        ({"likes": []}, "likes", [[-1]]),
        ({"face": [1, 2, 3, 4.5]}, "face", [[1, 2, 3, 4.5]]),
    ],
)
def test_feature_values_of_each_type(
    features: dict[str, Any], name: str, expected: list[list[float]]
) -> None:
    columns = make_inputs(make_schema(**FEATURES), {}).resolve(Query(k=7, features=features), NOW).columns
    assert columns[name].tolist() == expected


def test_a_batch_is_its_queries_below_each_other() -> None:
    schema = make_schema(**FEATURES)
    stored = {f: np.repeat(c, 3, axis=0) for f, c in make_inputs(schema)._missing.items()}
    inputs = make_inputs(schema, stored)
    queries = [
        Query(k=7, user_id="u0"),
        Query(k=3, features={"likes": ["a", "b"], "bio": "the quick fox"}),
        Query(k=5, user_id="u1", history=[HistoryItem("i3")], features={"age": 2}),
    ]
    resolved = [inputs.resolve(q, NOW) for q in queries]
    rows, columns, history_rows, history_weights, _ = inputs.batch(resolved)
    assert rows.tolist() == [0, -1, 1]
    assert history_rows.shape == history_weights.shape == (3, 3)
    assert {c.shape[0] for c in columns.values()} == {3}
    assert columns["likes"].tolist() == [[-1, -1], [1, 2], [-1, -1]]
    for b, one in enumerate(resolved):
        assert history_rows[b].tolist() == one.history_rows.tolist()
        for name, column in one.columns.items():
            width = column.shape[1]
            assert columns[name][b, :width].tolist() == column[0].tolist()
            assert (columns[name][b, width:] == -1).all()
