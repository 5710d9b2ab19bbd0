"""Answers after items were added, changed and deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.shop import NUM_ITEMS, NUM_USERS, build_store
from twotower.data.dataset import Dataset
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.lifecycle.update import update_items
from twotower.retrieval.query import HistoryItem, HistoryUse, Query, UnknownItemError
from twotower.retrieval.retriever import Retriever

# "1059" only occurred in interactions before it was added; users have had it.
ADDED, CHANGED, DELETED = ["9001", "9002", "1059"], "1003", ["1005", "1020"]
EVERYTHING = NUM_ITEMS + len(ADDED) - len(DELETED)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Path, Path]:
    """The dataset, the generation of the build, and that of one update."""
    config, dataset, base = build_store(tmp_path_factory.mktemp("updates"))
    items = dataset.item_table().to_pylist()
    given = [{**items[3], "genres": "War", "year": 2031}]
    given += [{**items[7 + i], "item_id": name, "title": f"New {i}"} for i, name in enumerate(ADDED)]
    store = Store(config.store)
    update = update_items(store, pa.Table.from_pylist(given, Generation.open(base).items.schema), DELETED)
    assert (update.added, update.changed, update.deleted, update.published) == (3, 1, 2, True)
    return dataset, base, store.path(update.generation)


@pytest.fixture(scope="module")
def before(shop: tuple[Dataset, Path, Path]) -> Retriever:
    return Retriever.open(shop[1])


@pytest.fixture(scope="module")
def after(shop: tuple[Dataset, Path, Path]) -> Retriever:
    return Retriever.open(shop[2])


def ids(retriever: Retriever, **query: Any) -> list[str]:
    return [item["item_id"] for item in retriever.retrieve(Query(**query)).items]


def test_every_source_answers_with_the_items_that_there_are(
    shop: tuple[Dataset, Path, Path], after: Retriever
) -> None:
    catalogue = set(shop[0].item_ids.ids(np.arange(NUM_ITEMS))) - set(DELETED) | set(ADDED)
    sources: list[dict[str, Any]] = [{"user_id": "3"}, {"history": [HistoryItem("1001")]}, {}]
    for source in sources:
        found = ids(after, k=500, exclude_seen=False, **source)
        assert len(found) == EVERYTHING
        assert set(found) == catalogue
    assert after.describe()["num_items"] == EVERYTHING
    described = after.retrieve(Query(k=500, user_id="3", exclude_seen=False, fields=["title", "year"])).items
    told = {item["item_id"]: item for item in described}
    assert told["9001"]["title"] == "New 0"
    assert told[CHANGED]["year"] == 2031


def test_new_items_can_be_excluded(after: Retriever) -> None:
    for source in ({"user_id": "3"}, {}):
        assert not set(ADDED) & set(ids(after, k=500, exclude_items=ADDED, exclude_seen=False, **source))
    # What is in the history of a query has been seen.
    found = ids(after, k=500, history=[HistoryItem("1001"), HistoryItem("9002")])
    assert len(found) == EVERYTHING - 2
    assert "9002" not in found


def test_an_item_that_was_added_later_counts_as_seen_by_who_has_had_it(
    shop: tuple[Dataset, Path, Path], after: Retriever
) -> None:
    dataset = shop[0]
    row = dataset.item_ids.row("1059")
    seen_by = set(dataset.interactions.user_row[dataset.interactions.item_row == row].tolist())
    assert 0 < len(seen_by) < NUM_USERS
    for user in range(NUM_USERS):
        answered = "1059" in ids(after, k=500, user_id=dataset.user_ids.id(user))
        assert answered == (user not in seen_by)


def test_new_and_deleted_items_of_a_history_count(before: Retriever, after: Retriever) -> None:
    """This model was not trained, so that new items are in its profile alone."""
    only_new = after.retrieve(Query(k=5, history=[HistoryItem("9001"), HistoryItem("9002")]))
    assert (only_new.strategy, only_new.history) == ("history", HistoryUse(by_features=2))
    assert not {"9001", "9002"} & {item["item_id"] for item in only_new.items}
    # A generation before the update knows nothing of them.
    unknown = before.retrieve(Query(k=5, history=[HistoryItem("9001"), HistoryItem("9002")]))
    assert (unknown.strategy, unknown.history) == ("popular", HistoryUse(ignored=2))
    # Deleted items still tell something about the user.
    deleted = [HistoryItem(item) for item in DELETED]
    assert after.retrieve(Query(k=5, history=deleted)).strategy == "history"
    expected = {i["item_id"]: i["score"] for i in before.retrieve(Query(k=500, history=deleted)).items}
    found = {i["item_id"]: i["score"] for i in after.retrieve(Query(k=500, history=deleted)).items}
    for name in ("1001", "1040"):
        assert found[name] == pytest.approx(expected[name], abs=1e-6)


def test_popularity_ranks_the_catalogue_as_it_is(before: Retriever, after: Retriever) -> None:
    ranking = [i for i in ids(before, k=NUM_ITEMS) if i not in DELETED]
    # Those that nobody had before come last, in the order of their rows.
    expected = [*ranking, "1059", "9001", "9002"]
    assert ids(after, k=500) == expected
    for k in (1, 5, NUM_ITEMS - 2, NUM_ITEMS):
        assert ids(after, k=k) == expected[:k]
    assert ids(after, k=3, exclude_items=expected[1:4]) == [expected[0], *expected[4:6]]
    scores = [item["score"] for item in after.retrieve(Query(k=500)).items]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] == 0


def test_similar_items(after: Retriever) -> None:
    for item in (ADDED[0], CHANGED, "1059"):
        found = [i["item_id"] for i in after.similar(item, 500).items]
        assert len(found) == EVERYTHING - 1
        assert item not in found
    # "9001" has the features of "1007", and no embedding of its own.
    assert set(ADDED) & {i["item_id"] for i in after.similar("1007", 500).items} == set(ADDED)
    for item in (*DELETED, "1060"):
        with pytest.raises(UnknownItemError, match=f"item '{item}' is not in the catalogue"):
            after.similar(item, 3)


def test_a_retriever_of_an_update_that_took_only_items_away(
    shop: tuple[Dataset, Path, Path], before: Retriever
) -> None:
    last = str(1000 + NUM_ITEMS - 1)
    store = Store(shop[1].parent.parent)
    store.publish("g1")
    update = update_items(store, None, [last], publish=False)
    retriever = Retriever.open(store.path(update.generation))
    # Rows behind the last one that is there.
    excluded = [last, "1059", "1060", *(f"10{number}" for number in range(10, 20))]
    expected = [i for i in ids(before, k=500, user_id="3", exclude_seen=False) if i not in excluded]
    assert ids(retriever, k=500, user_id="3", exclude_seen=False, exclude_items=excluded) == expected
    assert last not in ids(retriever, k=500)
