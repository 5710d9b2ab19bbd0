"""Test users, what is masked and relevant for them, and what their queries may know."""

import itertools
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from twotower.data.interactions import Interactions
from twotower.errors import DataError
from twotower.evaluation.baselines import PopularityRanker, popular_order
from twotower.evaluation.holdout import evaluation_queries, open_arrays, query_inputs, write_arrays
from twotower.schema import KINDS, SPLITS, FeatureSchema, FittedFeature, HistoryFeature, IdFeature

NUM_ITEMS, NUM_OUTSIDE = 7, 2
# user, item, split, kind; items 7 and 8 are outside the catalogue.
LOG = [
    (0, 1, "train", "positive"),
    (0, 2, "train", "negative"),
    (0, 7, "train", "positive"),
    (0, 3, "validation", "positive"),
    (0, 4, "test", "positive"),
    (0, 5, "test", "negative"),
    (0, 8, "test", "positive"),
    # Had before: can not be recommended, so it can not be relevant.
    (1, 0, "train", "positive"),
    (1, 0, "test", "positive"),
    # A negative and a repeated positive.
    (3, 6, "train", "seen_only"),
    (3, 2, "train", "positive"),
    (3, 2, "train", "positive"),
    (3, 1, "validation", "positive"),
    (3, 5, "test", "positive"),
    (3, 0, "test", "positive"),
    (3, 0, "test", "positive"),
    # Nothing before the test.
    (4, 4, "test", "positive"),
    # Nothing in the test.
    (5, 3, "train", "positive"),
]
NUM_USERS = 6  # user 2 has no interaction at all


def stub(log=LOG):
    users, items, splits, kinds = zip(*log, strict=True)
    interactions = Interactions.of(
        NUM_USERS,
        user_row=np.array(users, np.int32),
        item_row=np.array(items, np.int32),
        time=np.arange(len(log), dtype=np.int64),
        weight=np.ones(len(log), np.float32),
        kind=np.array([KINDS[k] for k in kinds], np.int8),
        split=np.array([SPLITS[s] for s in splits], np.int8),
    )
    schema = FeatureSchema(
        query=[FittedFeature(spec=HistoryFeature(name="history", max_length=2))],
        item=[FittedFeature(spec=IdFeature(name="item_id"))],
        num_users=NUM_USERS,
        num_items=NUM_ITEMS + NUM_OUTSIDE,
        num_catalogue_items=NUM_ITEMS,
    )
    return SimpleNamespace(
        path="stub",
        has_times=True,
        ties="together",
        interactions=interactions,
        schema=schema,
        num_users=NUM_USERS,
        num_items=NUM_ITEMS + NUM_OUTSIDE,
        num_catalogue_items=NUM_ITEMS,
        user_table=lambda: pa.table({"user_id": [f"u{i}" for i in range(NUM_USERS)]}),
        item_table=lambda: pa.table({"item_id": [f"i{i}" for i in range(NUM_ITEMS)]}),
    )


def held_out(max_users=100, seed=1, log=LOG):
    return evaluation_queries(stub(log), "exclude", max_users, seed)


def sets(offsets, rows):
    return [sorted(rows[a:b].tolist()) for a, b in itertools.pairwise(offsets)]


def test_who_is_evaluated_on_what():
    held = held_out()
    assert held.user_rows.tolist() == [0, 3, 4]
    assert sets(held.masked_offsets, held.masked_rows) == [[1, 2, 3], [1, 2, 6], []]
    assert sets(held.relevant_offsets, held.relevant_rows) == [[4], [0, 5], [4]]
    assert held.counts == {
        "users": 5,
        "without_relevant": 2,
        "not_drawn": 0,
        "evaluated": 3,
        "outside_catalogue": 1,
        "had_before": 1,
        "relevant": 4,
    }


def test_queries_know_train_and_validation_and_nothing_of_the_test():
    held = held_out()
    inputs = query_inputs(stub(), held.user_rows)
    rows, _ = inputs.histories.before(np.arange(3), None, 3)
    # Latest first, at most the two that the feature looks at; a negative is no history, an outside item is.
    assert rows.tolist() == [[3, 7, -1], [1, 2, -1], [-1, -1, -1]]


def test_the_test_split_changes_nothing_but_what_is_relevant():
    other = [(u, (i + 3) % NUM_ITEMS if s == "test" else i, s, k) for u, i, s, k in LOG]
    first, second = held_out(), held_out(log=other)
    assert first.relevant_rows.tolist() != second.relevant_rows.tolist()
    assert set(first.user_rows) & set(second.user_rows) == {0, 3, 4}
    before = query_inputs(stub(), np.arange(NUM_USERS)).histories
    after = query_inputs(stub(other), np.arange(NUM_USERS)).histories
    assert len(before.item_rows)
    np.testing.assert_array_equal(before.item_rows, after.item_rows)
    np.testing.assert_array_equal(popular_order(stub()), popular_order(stub(other)))


def test_drawn_users_depend_on_the_seed_alone():
    drawn = {tuple(held_out(2, seed).user_rows) for seed in range(20)}
    assert drawn == {(0, 3), (0, 4), (3, 4)}
    again = held_out(2, 7)
    assert again.user_rows.tolist() == held_out(2, 7).user_rows.tolist()
    assert again.counts["not_drawn"] == 1
    assert again.counts["evaluated"] == 2
    whole = dict(zip([0, 3, 4], [[4], [0, 5], [4]], strict=True))
    assert sets(again.relevant_offsets, again.relevant_rows) == [whole[u] for u in again.user_rows.tolist()]


def test_parts_are_the_whole():
    held = held_out()
    parts = [held.part(0, 1), held.part(1, 1), held.part(1, 3)]
    assert [len(p) for p in parts] == [1, 0, 2]
    for names in (("masked_offsets", "masked_rows"), ("relevant_offsets", "relevant_rows")):
        joined = [s for p in parts for s in sets(*(getattr(p, n) for n in names))]
        assert joined == sets(*(getattr(held, n) for n in names))


def test_arrays_survive_the_disk(tmp_path):
    held = held_out()
    inputs = query_inputs(stub(), held.user_rows)
    inputs.columns["age / group"] = np.array([[1], [-1], [2]], np.int32)
    write_arrays(tmp_path / "arrays", held, inputs)
    opened, mapped = open_arrays(tmp_path / "arrays")
    assert opened.counts == held.counts
    np.testing.assert_array_equal(opened.relevant_rows, held.relevant_rows)
    np.testing.assert_array_equal(mapped.histories.item_rows, inputs.histories.item_rows)
    np.testing.assert_array_equal(mapped.columns["age / group"], inputs.columns["age / group"])
    assert isinstance(opened.masked_rows, np.memmap)


def test_nobody_to_evaluate_is_an_error():
    log = [row for row in LOG if row[2] != "test"]
    with pytest.raises(DataError, match="nothing to measure"):
        held_out(log=log)


def test_popularity_counts_positives_of_train_and_validation():
    # Item 2 has two, items 0, 1 (train and validation) and 3 follow; 4 and 5 are only in the test.
    order = popular_order(stub())
    counts = {2: 2, 1: 2, 3: 2, 0: 1, 4: 0, 5: 0, 6: 0}
    assert order.tolist() == sorted(range(NUM_ITEMS), key=lambda row: (-counts[row], row))


def test_popularity_leaves_out_what_was_seen():
    held = held_out()
    ranked = PopularityRanker(popular_order(stub()))(0, held, 5)
    assert ranked.tolist() == [[0, 4, 5, 6, -1], [3, 0, 4, 5, -1], [1, 2, 3, 0, 4]]
