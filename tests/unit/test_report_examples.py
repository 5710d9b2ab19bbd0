"""Example users of a report: what they had, what they took next, and that nobody is chosen for the looks."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from twotower.config import parse_config
from twotower.data.prepare import prepare
from twotower.evaluation.examples import SHOWN, Examples
from twotower.evaluation.holdout import evaluation_queries
from twotower.evaluation.report import item_groups


@pytest.fixture(scope="module")
def held(small_dataset):
    return evaluation_queries(small_dataset, "exclude", 10_000, 1)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, small_values):
    """A dataset whose earlier parts reach beyond the moment of the query."""
    values = small_values(tmp_path_factory.mktemp("mixed"))
    return prepare(parse_config({**values, "split": {"kind": "random", "test_share": 0.2}}))


def lists_of(count, num_items):
    lists = np.arange(count * SHOWN).reshape(count, SHOWN) % num_items
    lists[0, 7:] = -1
    return lists


@pytest.mark.parametrize("kind", ["small_dataset", "mixed"])
def test_each_list_is_that_of_the_log(request, kind):
    small_dataset = request.getfixturevalue(kind)
    held = evaluation_queries(small_dataset, "exclude", 10_000, 1)
    examples = Examples(small_dataset, held, 4, 9)
    lists = lists_of(4, small_dataset.num_catalogue_items)
    # Whom the model recommends what he takes has a hit.
    lists[2, 3] = examples.relevant(int(examples.places[2]))[0]
    rows = examples.item_rows(lists)
    found = examples.shown(lists, rows, item_groups(small_dataset, rows)[0])
    log, ids = small_dataset.interactions, small_dataset.item_ids
    titles = small_dataset.item_table(["title"]).column(0).to_pylist()
    assert len({example["user_id"] for example in found}) == 4
    for example, ranked in zip(found, lists, strict=True):
        user = small_dataset.user_ids.rows([example["user_id"]])[0]
        mine = log.user_row == user
        test = mine & (log.split == 2) & (log.kind == 0)
        moment = log.time[test].min()
        had = np.flatnonzero(mine & (log.split != 2) & (log.kind == 0) & (log.time < moment))
        assert example["num_history"] == len(had)
        assert [i["item_id"] for i in example["history"]] == [
            ids.id(r) for r in log.item_row[had][::-1][:SHOWN]
        ]
        assert [i["time"] for i in example["history"]] == log.time[had][::-1][:SHOWN].tolist()
        before = set(log.item_row[mine & (log.split != 2)].tolist())
        took = sorted(set(log.item_row[test].tolist()) - before)
        took = [row for row in took if row < small_dataset.num_catalogue_items]
        assert example["num_held_out"] == len(took)
        assert [i["item_id"] for i in example["held_out"]] == [ids.id(r) for r in took[:SHOWN]]
        assert [i["item_id"] for i in example["recommended"]] == [ids.id(r) for r in ranked if r >= 0]
        assert [i["hit"] for i in example["recommended"]] == [r in took for r in ranked if r >= 0]
        assert example["key"] == hashlib.sha256(example["user_id"].encode()).hexdigest()[:32]
        for item in example["history"] + example["recommended"]:
            assert item.get("title") == titles[ids.rows([item["item_id"]])[0]]
    assert sum(item["hit"] for item in found[2]["recommended"]) >= 1
    assert len(found[0]["recommended"]) == 7


def test_users_are_of_little_to_much_history_and_drawn_with_the_seed(small_dataset, held):
    first = Examples(small_dataset, held, 5, 9)
    lists = np.full((5, SHOWN), -1)
    rows = first.item_rows(lists)
    lengths = [e["num_history"] for e in first.shown(lists, rows, ["other"] * len(rows))]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]
    np.testing.assert_array_equal(first.places, Examples(small_dataset, held, 5, 9).places)
    assert not np.array_equal(first.places, Examples(small_dataset, held, 5, 10).places)


@pytest.mark.parametrize("count", [0, 100_000])
def test_none_and_more_than_there_are(small_dataset, held, count):
    examples = Examples(small_dataset, held, count, 1)
    assert sorted(examples.places.tolist()) == list(range(min(count, len(held))))
    if not count:
        assert examples.shown(np.empty((0, SHOWN), np.int64), np.empty(0, np.int64), []) == []
