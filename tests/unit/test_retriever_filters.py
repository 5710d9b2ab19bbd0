"""Filters through the retriever: only what satisfies them, all of it, in the order of brute force."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.generations import plain_generation
from tests.shop import NUM_ITEMS, NUM_USERS, build_store
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.errors import ConfigError, DataError, NotAllowedError
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.lifecycle.update import update_items
from twotower.model.checkpoint import Checkpoint
from twotower.retrieval.front import allowed_items
from twotower.retrieval.query import HistoryItem, Query
from twotower.retrieval.retriever import Retriever

Item = dict[str, Any]
FILTERS: list[tuple[dict[str, Any], Callable[[Item], bool]]] = [
    ({"genres": {"any_of": ["Comedy", "War"]}}, lambda i: bool({"Comedy", "War"} & genres(i))),
    ({"genres": {"all_of": ["Comedy", "War"]}}, lambda i: {"Comedy", "War"} <= genres(i)),
    ({"genres": {"none_of": ["Comedy"]}}, lambda i: "Comedy" not in genres(i)),
    ({"year": {"gte": 1970, "lt": 2000}}, lambda i: 1970 <= i["year"] < 2000),
    ({"label": {"any_of": ["brand 1"]}}, lambda i: i["brand"] == "brand 1"),
    ({"label": {"none_of": ["brand 1", "brand 2"]}}, lambda i: i["brand"] not in ("brand 1", "brand 2")),
    ({"rating": {"gt": 2}}, lambda i: i["rating"] not in (None, "") and float(i["rating"]) > 2),
    ({"in_stock": {"any_of": [False]}}, lambda i: i["in_stock"] == "false"),
    ({"added": {"gte": "2025-06-01"}}, lambda i: i["added"] >= "2025-06"),
    (
        {"genres": {"any_of": ["Drama"]}, "year": {"gt": 1980}, "in_stock": {"any_of": [True]}},
        lambda i: "Drama" in genres(i) and i["year"] > 1980 and i["in_stock"] == "true",
    ),
    ({"label": {"any_of": ["nothing"]}}, lambda i: False),
    ({}, lambda i: True),
]


def genres(item: Item) -> set[str]:
    return set(item["genres"].split("|"))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Dataset, Path]:
    return build_store(tmp_path_factory.mktemp("filters"))


@pytest.fixture(scope="module")
def items(shop: tuple[Config, Dataset, Path]) -> dict[str, Item]:
    """The catalogue by item id."""
    return {item["item_id"]: item for item in shop[1].item_table().to_pylist()}


@pytest.fixture(scope="module")
def retriever(shop: tuple[Config, Dataset, Path]) -> Retriever:
    return Retriever.open(shop[2])


def ids(retriever: Retriever, **query: Any) -> list[str]:
    return [item["item_id"] for item in retriever.retrieve(Query(**query)).items]


SOURCES: list[dict[str, Any]] = [
    {"user_id": "3"},
    {"user_id": "8", "exclude_seen": False},
    {"history": [HistoryItem("1001"), HistoryItem("1017")], "exclude_items": ["1002", "1003"]},
    {},
]


@pytest.mark.parametrize(("predicates", "satisfies"), FILTERS, ids=[str(f) for f, _ in FILTERS])
def test_answers_are_those_of_brute_force(
    retriever: Retriever,
    items: dict[str, Item],
    predicates: dict[str, Any],
    satisfies: Callable[[Item], bool],
) -> None:
    wanted = {item_id for item_id, item in items.items() if satisfies(item)}
    assert len(wanted) < NUM_ITEMS or not predicates
    for source in SOURCES:
        ranking = ids(retriever, k=NUM_ITEMS, **source)
        expected = [item_id for item_id in ranking if item_id in wanted]
        for k in (1, 4, NUM_ITEMS):
            assert ids(retriever, k=k, filter=predicates, **source) == expected[:k]
    similar = [i["item_id"] for i in retriever.similar("1005", NUM_ITEMS).items]
    found = [i["item_id"] for i in retriever.similar("1005", 5, filter=predicates).items]
    assert found == [i for i in similar if i in wanted][:5]


def test_most_filters_leave_some_items_and_not_all(items: dict[str, Item]) -> None:
    counts = [sum(map(satisfies, items.values())) for _, satisfies in FILTERS]
    assert sum(3 < count < NUM_ITEMS for count in counts) >= 9


def test_allow_lists(retriever: Retriever) -> None:
    allow = ["1004", "1007", "1030", "1044", "unknown", f"{1000 + NUM_ITEMS}"]
    known = {"1004", "1007", "1030", "1044"}
    for source in SOURCES:
        expected = [i for i in ids(retriever, k=NUM_ITEMS, **source) if i in known]
        assert ids(retriever, k=50, allow_items=allow, **source) == expected
    both = ids(retriever, k=50, allow_items=allow, filter={"year": {"gte": 1980}})
    assert set(both) == known & set(ids(retriever, k=50, filter={"year": {"gte": 1980}}))
    assert ids(retriever, k=50, user_id="3", allow_items=[]) == []


def test_a_batch_with_different_filters(retriever: Retriever) -> None:
    queries = [
        Query(k=5 + user % 2, user_id=str(user), filter=FILTERS[user % 4][0] if user % 5 else None)
        for user in range(NUM_USERS)
    ]
    queries += [Query(k=3, user_id="1", allow_items=["1004", "1005"]), Query(k=3, filter=FILTERS[3][0])]
    answers = retriever.retrieve_batch(queries)
    for query, answer in zip(queries, answers, strict=True):
        single = retriever.retrieve(query)
        assert [i["item_id"] for i in answer.items] == [i["item_id"] for i in single.items]
    assert len({len(a.items) for a in answers}) > 1


def test_what_is_not_there_to_filter_by(retriever: Retriever) -> None:
    with pytest.raises(NotAllowedError, match="no attribute 'colour'; allowed: genres, year, label, rating"):
        retriever.retrieve(Query(k=3, filter={"colour": {"any_of": ["red"]}}))
    with pytest.raises(NotAllowedError, match="is no object"):
        retriever.similar("1001", 3, filter=[])  # type: ignore[arg-type]
    described = retriever.describe()["attributes"]
    assert {name: facts["type"] for name, facts in described.items()} == {
        "genres": "list", "year": "integer", "label": "text", "rating": "number", "in_stock": "boolean",
        "added": "time",
    }  # fmt: skip


def test_filters_follow_updates(
    shop: tuple[Config, Dataset, Path], items: dict[str, Item], retriever: Retriever
) -> None:
    config, _, base = shop
    satisfies = FILTERS[0][1]
    changed = {**items["1002"], "genres": "War", "brand": "new", "year": 2030}
    added = {**items["1003"], "item_id": "9001", "genres": "Comedy", "brand": "new"}
    table = pa.Table.from_pylist([changed, added], Generation.open(base).items.schema)
    update = update_items(Store(config.store), table, ["1001", "1006"], publish=False)
    updated = Retriever.open(Store(config.store).path(update.generation))
    assert set(ids(updated, k=9, user_id="1", exclude_seen=False, filter={"label": {"any_of": ["new"]}})) == {
        "1002", "9001",
    }  # fmt: skip
    assert ids(updated, k=9, user_id="1", exclude_seen=False, filter={"year": {"gte": 2030}}) == ["1002"]
    # What it was before no longer counts.
    old_year = {"year": {"any_of": [items["1002"]["year"]]}}
    assert "1002" in ids(retriever, k=99, user_id="1", exclude_seen=False, filter=old_year)
    assert "1002" not in ids(updated, k=99, user_id="1", exclude_seen=False, filter=old_year)
    now = {k: v for k, v in items.items() if k not in ("1001", "1006")} | {"1002": changed, "9001": added}
    found = ids(updated, k=99, user_id="1", exclude_seen=False, filter=FILTERS[0][0])
    assert set(found) == {item_id for item_id, item in now.items() if satisfies(item)}
    assert "1001" in ids(retriever, k=99, user_id="1", exclude_seen=False)


def test_an_update_needs_the_columns_of_attributes(
    shop: tuple[Config, Dataset, Path], items: dict[str, Item]
) -> None:
    store = Store(shop[0].store)
    table = pa.Table.from_pylist([items["1002"]], Generation.open(shop[2]).items.schema)
    with pytest.raises(DataError, match="no column 'brand', which the catalogue's have"):
        update_items(store, table.drop_columns(["brand"]), publish=False)


def test_an_attribute_whose_column_is_not_there(shop: tuple[Config, Dataset, Path], tmp_path: Path) -> None:
    values = shop[0].to_json()
    values["index"]["attributes"] = {"colour": {}}
    config = parse_config(values | {"storage": {"root": str(tmp_path)}})
    with pytest.raises(ConfigError, match="index.attributes.colour: the item table has no column 'colour'"):
        plain_generation(config, shop[1], Checkpoint.open(shop[2] / "model"), "g2")


def test_what_holds_for_all_queries_adds_to_what_each_says(
    shop: tuple[Config, Dataset, Path], retriever: Retriever
) -> None:
    generation = Generation.open(shop[2])
    listed = [str(1000 + i) for i in range(0, NUM_ITEMS, 2)]
    among = allowed_items(generation, FILTERS[0][0], listed, ["1002", "1004", "unknown"])
    satisfying = set(ids(retriever, k=99, user_id="1", exclude_seen=False, filter=FILTERS[0][0]))
    may = satisfying & set(listed) - {"1002", "1004"}
    assert 0 < len(may) < len(satisfying)
    queries = [
        Query(k=99, user_id="1"),
        Query(k=99),
        Query(k=99, user_id="2", filter=FILTERS[3][0], exclude_seen=False),
        Query(k=99, user_id="3", allow_items=["1000", "1001", "1006", *listed[5:]], exclude_items=["1010"]),
    ]
    for query, found in zip(queries, retriever.find(queries, among), strict=True):
        expected = [item["item_id"] for item in retriever.retrieve(query).items if item["item_id"] in may]
        assert generation.item_ids.ids(found.hits.item_rows) == expected
    assert allowed_items(generation) is None
    assert allowed_items(generation, filter={}) is None


def test_queries_with_equal_restrictions_share_a_search(
    retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    real = retriever._searcher.search

    def search(vectors: Any, *rest: Any, **more: Any) -> Any:
        sizes.append(len(vectors))
        return real(vectors, *rest, **more)

    monkeypatch.setattr(retriever._searcher, "search", search)
    restrictions: list[dict[str, Any]] = [
        {},
        {"filter": FILTERS[0][0]},
        # Equal lists, each an object of its own.
        {"allow_items": ["1001", "1002"]},
        {"filter": FILTERS[0][0], "allow_items": ["1001", "1002"]},
    ]
    retriever.retrieve_batch(
        [Query(k=3, user_id=str(i), **copy.deepcopy(r)) for i in range(5) for r in restrictions]
    )
    assert sizes == [5] * len(restrictions)
