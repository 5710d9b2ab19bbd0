"""Users, histories and items looked up as a person types them, against the dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.shop import NUM_ITEMS, NUM_USERS, build_store
from twotower.data.dataset import Dataset
from twotower.data.vocabulary import Vocabulary
from twotower.errors import RequestError
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.lifecycle.update import update_items
from twotower.retrieval.lookup import UnknownUserError, find_items, find_users, user_history
from twotower.schema import KINDS


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Path, Path]:
    """The dataset, the generation of the build, and of an update: 9001 is new, 1003 changed, 1005 gone."""
    config, dataset, base = build_store(tmp_path_factory.mktemp("lookup"))
    items = dataset.item_table().to_pylist()
    given = [{**items[3], "title": "Renamed ÉTÉ"}, {**items[7], "item_id": "9001", "title": "title 9001"}]
    store = Store(config.store)
    update = update_items(store, pa.Table.from_pylist(given, Generation.open(base).items.schema), ["1005"])
    return dataset, base, store.path(update.generation)


@pytest.fixture
def base(shop: tuple[Dataset, Path, Path]) -> Generation:
    return Generation.open(shop[1])


@pytest.fixture
def updated(shop: tuple[Dataset, Path, Path]) -> Generation:
    return Generation.open(shop[2])


def found(generation: Generation, text: str, limit: int = 100) -> list[str]:
    return [item.item_id for item in find_items(generation, text, limit)]


def titles_of(dataset: Dataset) -> dict[str, str]:
    table = dataset.item_table()
    return dict(zip(table["item_id"].to_pylist(), table["title"].to_pylist(), strict=True))


def popular_first(shop: tuple[Dataset, Path, Path]) -> list[str]:
    """Ids of the catalogue by the number of positive interactions, then by row."""
    log = shop[0].interactions
    counts = np.bincount(log.item_row[log.kind == KINDS["positive"]], minlength=NUM_ITEMS)[:NUM_ITEMS]
    assert len(set(counts.tolist())) > 3
    return shop[0].item_ids.ids(np.argsort(-counts, kind="stable"))


def test_items_by_title_come_popular_first(base: Generation, shop: tuple[Dataset, Path, Path]) -> None:
    titles = titles_of(shop[0])
    for text in ("title", "TITLE 1", "itle 2", "4", "<IMG", "."):
        holding = [i for i in popular_first(shop) if text.lower() in titles[i].lower()]
        begin = [i for i in holding if titles[i].lower().startswith(text.lower())]
        expected = begin + [i for i in holding if i not in begin]
        assert found(base, text) == expected, text
        assert found(base, text, 3) == expected[:3]
        assert [item.title for item in find_items(base, text, 100)] == [titles[i] for i in expected]
    assert len(found(base, "title")) > 50
    assert found(base, "itle 2") == found(base, "title 2") != []
    assert found(base, "no such title") == []


def test_an_item_is_found_by_its_whole_id(base: Generation) -> None:
    assert found(base, "1007") == ["1007"]
    assert found(base, "100") == []
    # It only occurs in interactions.
    assert base.item_ids.row(str(1000 + NUM_ITEMS)) is not None
    assert found(base, str(1000 + NUM_ITEMS)) == []


def test_a_whole_id_stands_before_titles_that_hold_it(updated: Generation) -> None:
    assert found(updated, "9001") == ["9001"]
    items = find_items(updated, "title 9", 10)
    assert [item.title for item in items] == ["Title 9", "title 9001"]


def test_updates_are_found_as_they_are_now(base: Generation, updated: Generation) -> None:
    assert found(updated, "renamed été") == ["1003"]
    assert found(base, "renamed") == []
    assert "1003" in found(base, "title 3")
    assert "1003" not in found(updated, "title 3")
    assert found(base, "1005") == ["1005"]
    assert found(updated, "1005") == []
    assert set(found(base, "title")) - set(found(updated, "title")) == {"1003", "1005"}


def test_matching_refuses_a_column_that_is_not_there(base: Generation) -> None:
    with pytest.raises(RequestError, match="no field 'colour'"):
        base.items.matching("colour", "red")


def test_users_by_prefix(base: Generation) -> None:
    every = [str(u) for u in range(NUM_USERS)]
    order = base.user_ids.array.to_pylist()
    assert sorted(order) == sorted(every)
    for prefix in ("1", "2", "36", "x"):
        matches = [u for u in order if u.startswith(prefix)]
        expected = [u for u in matches if u == prefix] + [u for u in matches if u != prefix]
        assert find_users(base, prefix, 100) == expected
        assert find_users(base, prefix, 2) == expected[:2]
    assert len(find_users(base, "1", 100)) == 11


def test_examples_of_users_are_spread_and_never_a_forgotten_one(base: Generation) -> None:
    order = base.user_ids.array.to_pylist()
    assert find_users(base, "", 2) == [order[0], order[-1]]
    assert len(set(find_users(base, "", 7))) == 7
    assert find_users(base, "", 1000) == order
    base.user_ids = Vocabulary(pa.array(order)).without([0, 5])
    assert find_users(base, "", 1000) == [u for i, u in enumerate(order) if i not in (0, 5)]
    assert order[5] not in find_users(base, order[5], 1000)


def test_the_history_of_every_user(base: Generation, shop: tuple[Dataset, Path, Path]) -> None:
    dataset = shop[0]
    log = dataset.interactions
    titles = titles_of(dataset)
    outside = 0
    for row in range(NUM_USERS):
        part = np.arange(log.user_offsets[row], log.user_offsets[row + 1])
        positive = part[log.kind[part] == KINDS["positive"]][::-1][: base.schema.max_history]
        history = user_history(base, dataset.user_ids.id(row))
        assert [item.item_id for item in history.items] == dataset.item_ids.ids(log.item_row[positive])
        assert [item.title for item in history.items] == [titles.get(i.item_id) for i in history.items]
        assert [np.datetime64(str(item.time)[:-1], "us") for item in history.items] == log.time[
            positive
        ].astype("datetime64[us]").tolist()
        assert [item.weight for item in history.items] == log.weight[positive].tolist()
        assert history.num_seen == len(set(log.item_row[part].tolist()))
        outside += sum(item.title is None for item in history.items)
    assert outside > 0


def test_a_history_without_times_or_with_times_beyond_the_calendar(base: Generation) -> None:
    base.histories = type(base.histories)(
        base.histories.offsets,
        base.histories.item_rows,
        np.full_like(base.histories.times, 2**62),
        base.histories.weights,
    )
    assert {item.time for item in user_history(base, "5").items} == {None}
    del base.histories
    assert all(item.time for item in user_history(base, "5").items)
    base.manifest["as_of"] = None
    assert {item.time for item in user_history(base, "5").items} == {None}


@pytest.mark.parametrize("user_id", ["nobody", "", "5 ", "05", "x" * 5000])
def test_an_unknown_user_has_no_history(base: Generation, user_id: str) -> None:
    with pytest.raises(UnknownUserError, match="is not known") as error:
        user_history(base, user_id)
    assert len(error.value.message) < 100


def test_frequent_values_of_attributes(base: Generation, shop: tuple[Dataset, Path, Path]) -> None:
    table = shop[0].item_table()
    counts: dict[str, int] = {}
    for genres in table["genres"].to_pylist():
        for genre in genres.split("|"):
            counts[genre] = counts.get(genre, 0) + 1
    values = base.attributes.frequent(3)
    assert len(counts) == 4
    assert [counts[v] for v in values["genres"]] == sorted(counts.values(), reverse=True)[:3]
    assert set(base.attributes.frequent(100)["in_stock"]) == {True, False}
    assert len(values["year"]) == 3
    years = table["year"].to_pylist()
    assert [years.count(y) for y in values["year"]] == sorted(map(years.count, set(years)), reverse=True)[:3]
    # Attributes that have a range only offer no values.
    assert set(values) == {"genres", "year", "label", "in_stock"}
