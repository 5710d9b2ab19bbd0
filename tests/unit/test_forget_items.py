"""What only the forgotten user had beside his own rows: items, lists for queries; and what is in the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.forgetting import (
    COLOUR,
    GONE,
    HISTORY,
    ITEM,
    copy_of,
    dataset_of,
    files_with,
    make_shop,
    successors,
)
from twotower.artefacts import read_manifest, write_manifest
from twotower.config import Config
from twotower.errors import ArtefactError
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.lifecycle.forget import REQUEST, forget_users
from twotower.lifecycle.update import update_items
from twotower.retrieval.query import Query
from twotower.retrieval.retriever import Retriever


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict[str, str]]:
    """Before anybody is forgotten; do not change it."""
    return make_shop(tmp_path_factory.mktemp("made"))


@pytest.fixture
def shop(made: tuple[Config, dict[str, str]], tmp_path: Path) -> Config:
    """A copy, with its hard links."""
    return copy_of(made[0], tmp_path)


@pytest.fixture
def store(shop: Config) -> Store:
    return Store(shop.store)


def test_lists_for_files_of_queries_lose_what_names_the_user(shop: Config, store: Store) -> None:
    directory = shop.recommendations / "build-4567cdef"
    (directory / "parts").mkdir(parents=True)
    rows: list[tuple[str, str | None]] = [
        ("q1", GONE),
        (GONE, None),
        ("q2", "14"),
        ("q3", None),
        (GONE, "15"),
    ]
    for number, some in enumerate((rows[:2], rows[2:])):
        table = pa.Table.from_pylist(
            [{"query_id": q, "user_id": u, "item_id": "1005"} for q, u in some for _ in (1, 2)],
            pa.schema(
                [(n, pa.string()) for n in ("query_id", "user_id", "item_id")] + [("rank", pa.int32())]
            ),
        )
        pq.write_table(table, directory / "parts" / f"part-{number}.parquet")
    write_manifest(directory, "recommendations", {"id": directory.name, "num_rows": 10})
    done = forget_users(shop, store, [GONE])
    counts = {c.name: c.removed for c in done.changes if c.kind == "recommendations"}
    assert counts[directory.name] == {"users": 1, "rows": 6}
    assert files_with(shop.home, GONE) == set()
    left = [r for p in sorted((directory / "parts").iterdir()) for r in pq.read_table(p).to_pylist()]
    assert [(r["query_id"], r["user_id"]) for r in left] == [("q2", "14")] * 2 + [("q3", None)] * 2
    assert read_manifest(directory, "recommendations")["num_rows"] == 4


def test_an_item_that_an_update_put_into_the_catalogue_stays_there(shop: Config, store: Store) -> None:
    """What he alone had is an item like others by then, and not his any more, in that generation."""
    some = Generation.open(store.path("build")).items.table([3]).to_pylist()[0]
    schema = Generation.open(store.path("build")).items.schema
    given = pa.Table.from_pylist([{**some, "item_id": ITEM}], schema)
    update = update_items(store, given).generation
    forget_users(shop, store, [GONE])
    to = successors(store)
    assert ITEM in Generation.open(store.path(to[update])).item_ids
    found = Retriever.open(store.path(to[update])).retrieve(Query(history=HISTORY, k=200, allow_items=[ITEM]))
    assert [item["item_id"] for item in found.items] == [ITEM]
    for name in ("build", "other"):
        assert ITEM not in Generation.open(store.path(to[name])).item_ids
    assert ITEM not in dataset_of(shop).item_ids


def test_items_that_others_had_too_keep_their_ids_and_embeddings(
    made: Any, shop: Config, store: Store
) -> None:
    before = dataset_of(shop)
    row = before.item_ids.row(ITEM)
    forget_users(shop, store, [GONE])
    after = dataset_of(shop)
    assert after.item_ids.id(row) == ""
    assert [i for i in after.item_ids.array.to_pylist() if i] == [
        i for i in before.item_ids.array.to_pylist() if i != ITEM
    ]
    assert after.num_items == before.num_items
    for name in store.generations():
        table = Generation.open(store.path(name)).checkpoint().model.tables["id_of_item"].detach().numpy()
        np.testing.assert_array_equal(table[row + 1], table[0])
    # A second user later, and what is blank stays so.
    forget_users(shop, store, ["14"])
    assert dataset_of(shop).item_ids.id(row) == ""


def test_what_can_not_be_read_is_named_and_the_rest_is_forgotten(shop: Config, store: Store) -> None:
    (shop.datasets / "torn").mkdir()
    (shop.datasets / "torn" / "manifest.json").write_text("{")
    (shop.checkpoints / "notes.txt").write_text("mine")
    (shop.recommendations / "cut").mkdir()
    (shop.recommendations / "cut" / "part.parquet").write_bytes(b"PAR1")
    (store.path("x") / "manifest.json").mkdir(parents=True)
    done = forget_users(shop, store, [GONE])
    assert len(done.left) == 4
    for name in ("torn", "notes.txt", "cut", "x"):
        assert any(name in sentence for sentence in done.left)
    assert files_with(shop.home, GONE, COLOUR, ITEM) == set()


@pytest.mark.parametrize("data", [b"", b"[]", b'{"users": 7}', b'{"users": [null]}', b"\xff"])
def test_a_damaged_request_of_a_killed_run_is_an_error_in_a_line(
    shop: Config, store: Store, data: bytes
) -> None:
    (shop.home / REQUEST).write_bytes(data)
    with pytest.raises(
        ArtefactError, match=r"forgetting\.json is damaged .* Remove it, and forget the users"
    ):
        forget_users(shop, store, [GONE])
