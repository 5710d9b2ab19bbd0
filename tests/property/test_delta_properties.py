"""Updates against plain Python and NumPy: any order and grouping of them, any kind of index and sharding."""

from __future__ import annotations

import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.shop import NUM_ITEMS, build_store
from tests.updates import Item, items_of, table_of
from twotower.generations.encoding import encode_table
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.index.allowed import Allowed
from twotower.lifecycle.update import update_items
from twotower.model.checkpoint import Checkpoint

pytestmark = pytest.mark.slow

GENRES = ["Comedy", "War", "Drama|Horror", "Drama|War"]
NEW = [f"n{n}" for n in range(6)]


@dataclass
class Shop:
    store: Store
    """Its CURRENT names a full build; do not change it."""
    items: dict[str, Item]
    checkpoint: Checkpoint


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    config, _, path = build_store(tmp_path_factory.mktemp("delta"))
    return Shop(Store(config.store), items_of(path), Generation.open(path).checkpoint())


Step = tuple[list[Item], list[str]]


def steps_of(draw: random.Random, items: dict[str, Item]) -> list[Step]:
    """Up to five updates, with items that come, change, change back, go and come again."""
    steps = []
    pool = [*draw.sample(sorted(items), 8), *NEW]
    for _ in range(draw.randint(1, 5)):
        named = draw.sample(pool, draw.randint(1, len(pool)))
        cut = draw.randint(0, len(named))
        changes = []
        for item_id in named[:cut]:
            plain = items.get(item_id, {**items["1001"], "item_id": item_id})
            edited = {**plain, "genres": draw.choice(GENRES), "year": draw.randint(1900, 2030)}
            changes.append(plain if draw.random() < 0.3 else edited)
        steps.append((changes, named[cut:]))
    return steps


def after(items: dict[str, Item], steps: list[Step]) -> dict[str, Item]:
    """The catalogue that the steps lead to, by plain Python."""
    catalogue = dict(items)
    for items_given, deleted in steps:
        catalogue |= {item["item_id"]: item for item in items_given}
        for item_id in deleted:
            catalogue.pop(item_id, None)
    return catalogue


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_answers_are_those_of_the_catalogue_that_updates_lead_to(seed: int, shop: Shop) -> None:
    draw = random.Random(seed)
    steps = steps_of(draw, shop.items)
    catalogue = after(shop.items, steps)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(shutil.copytree(shop.store.root, Path(folder) / "store"))
        base = store.path("g1")
        for items, deleted in steps:
            update_items(store, table_of(items, base), deleted, ignore_missing=True)
        found = Generation.open(store.path(str(store.current())))
        assert found.num_items == len(catalogue)
        assert_answers(found, catalogue, shop.checkpoint, draw)

        # One update that does it all leads to the same answers.
        other = Store(shutil.copytree(shop.store.root, Path(folder) / "other"))
        gone = sorted(set(shop.items) - set(catalogue))
        update_items(other, table_of(list(catalogue.values()), base), gone)
        at_once = Generation.open(other.path(str(other.current())))
        assert_answers(at_once, catalogue, shop.checkpoint, draw)
        facts = at_once.manifest["delta"] or {"changed": 0, "deleted": 0, "added": 0}
        assert facts["changed"] == sum(
            catalogue[i] != shop.items[i] for i in set(catalogue) & set(shop.items)
        )
        assert facts["deleted"] == len(gone)
        assert facts["added"] == len(set(catalogue) - set(shop.items))


def assert_answers(
    generation: Generation, catalogue: dict[str, Item], checkpoint: Checkpoint, draw: random.Random
) -> None:
    """Every item is found once with its score; exclusion, allow lists and filters hold."""
    ids = sorted(catalogue)
    rows = generation.item_ids.rows(ids)
    table = pa.Table.from_pylist([catalogue[i] for i in ids], generation.items.schema)
    vectors = encode_table(checkpoint, table.append_column("item_row", pa.array(rows)))
    rng = np.random.default_rng(draw.randrange(2**32))
    queries = rng.standard_normal((3, vectors.shape[1])).astype(np.float32)
    searcher = generation.searcher()
    place = {int(row): n for n, row in enumerate(rows)}
    wars = [n for n, i in enumerate(ids) if "War" in (catalogue[i]["genres"] or "").split("|")]
    cases: list[tuple[Any, Allowed | None, list[int]]] = [(None, None, list(range(len(ids))))]
    some = rng.choice(len(ids), len(ids) // 3, replace=False)
    cases.append(([rows[some]] * 3, None, sorted(set(range(len(ids))) - set(some.tolist()))))
    cases.append((None, Allowed.of_rows(rows[some], len(generation.item_ids)), sorted(some.tolist())))
    filtered = generation.attributes.allowed({"genres": {"any_of": ["War"]}})
    assert filtered.rows().tolist() == sorted(int(rows[n]) for n in wars)
    cases.append((None, filtered, wars))
    for exclude, allowed, expected in cases:
        for k in (5, NUM_ITEMS + 10):
            for query, hits in zip(
                queries, searcher.search(queries, k, exclude, allowed=allowed), strict=True
            ):
                scores = vectors @ query
                best = sorted(-scores[n] for n in expected)[:k]
                assert len(hits.item_rows) == len(best) == len(set(hits.item_rows.tolist()))
                np.testing.assert_allclose(-hits.scores, best, atol=1e-5)
                found = [place[int(row)] for row in hits.item_rows]
                assert set(found) <= set(expected)
                np.testing.assert_allclose(scores[found], hits.scores, atol=1e-5)
    titles = generation.items.take(rows, ["item_id", "title", "year"])
    assert titles["item_id"] == ids
    assert titles["year"] == [catalogue[i]["year"] for i in ids]
