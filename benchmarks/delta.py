"""Updating: 1,000 changed items of a million, from the call to the published generation, over a full rebuild.

``delta_over_full``: ``update_items`` with the changed rows over encoding, building, measuring and publishing
all items, on a Ray that is up, with the kind that auto picks and towers that were trained for an epoch.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks import measure
from twotower.cluster.build import build_generation
from twotower.cluster.session import session
from twotower.cluster.train import train
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.lifecycle.update import update_items
from twotower.retrieval.retriever import HistoryItem, Query, Retriever

CHANGED = 1_000
DIM = 128


def configuration(root: Path, num_items: int) -> Config:
    """Return towers of id, text and category features on generated data, and an index as auto makes it."""
    tower = {"hidden": [128], "norm": "none", "dropout": 0.0}
    return parse_config(
        {
            "storage": {"root": str(root)},
            "data": {
                "source": {
                    "kind": "generated",
                    "num_users": num_items // 40,
                    "num_items": num_items,
                    "num_interactions": num_items,
                    "num_tastes": 200,
                }
            },
            "features": {
                "query": [
                    {"name": "history", "type": "history", "dim": 32},
                    {"name": "genre_profile", "type": "profile", "of": "genres"},
                ],
                "item": [
                    {"name": "item_id", "type": "id", "dim": 32, "unknown_rate": 0.1},
                    {"name": "genres", "type": "multi_hot", "dim": 32},
                    {"name": "title", "type": "text", "dim": 16, "buckets": 4096},
                ],
            },
            "model": {"embedding_dim": DIM, "query_tower": tower, "item_tower": tower},
            "train": {"epochs": 1, "global_batch_size": 2_048, "num_workers": 2},
            "index": {"num_shards": 4},
        }
    )


def main() -> None:
    """Measure, print and write."""
    quick = measure.start(__doc__ or "", threads=1)
    num_items, rounds, repeats = (50_000, 1, 2) if quick else (1_000_000, 2, 3)
    rows: list[list[object]] = [["what", "seconds"]]
    full, delta = [], []
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(Path(folder) / "0", num_items)
        dataset = prepare(config)
        with session(config):
            checkpoint = train(config, dataset, fit="all", epochs=1)
            for number in range(rounds):
                # A store of its own: a generation is built once.
                own = configuration(Path(folder) / str(number), num_items)
                store = Store(own.store)
                begin = time.perf_counter()
                built = build_generation(own, dataset, checkpoint)
                store.publish(built.name)
                full.append(time.perf_counter() - begin)
                index = Generation.open(built, verify=False).manifest["index"]
                found = f"index recall {index['index_recall']:.4f}, p50 {index['search_ms']['p50']:.3f} ms"
                rows.append([f"full rebuild, {num_items:,} items, {index['factory']}: {found}", full[-1]])
                for turn in range(repeats):
                    changes = _changed(dataset, seed=10 * number + turn)
                    begin = time.perf_counter()
                    update = update_items(store, changes)
                    delta.append(time.perf_counter() - begin)
                    if (update.changed, update.published) != (len(changes), True):
                        raise SystemExit(f"{update}: not all {len(changes)} items were changed")
                    rows.append([f"update of {len(changes):,} items ({update.share:.2%} changed)", delta[-1]])
                _check(store, changes)
    figures = {"delta_over_full": statistics.median(delta) / statistics.median(full)}
    table = [[cell if isinstance(cell, str) else f"{cell:.2f}" for cell in row] for row in rows]
    measure.finish("delta", figures, table, quick)


def _changed(dataset: Dataset, seed: int) -> pa.Table:
    """Return items as they are, but for new titles and other genres."""
    rng = np.random.default_rng(seed)
    table = dataset.item_table()
    some = table.take(
        pa.array(np.sort(rng.choice(len(table), min(CHANGED, len(table) // 50), replace=False)))
    )
    titles = pa.array([f"The Changed Harbour {seed} ({n})" for n in range(len(some))])
    genres = pa.array(rng.permutation(some["genres"].to_pylist()))
    for name, values in (("title", titles), ("genres", genres)):
        some = some.set_column(some.column_names.index(name), name, values)
    return some


def _check(store: Store, changes: pa.Table) -> None:
    """Answers must come from the published generation and have the new titles."""
    retriever = Retriever.open(store.path(str(store.current())), verify=False)
    first = changes["item_id"][0].as_py()
    query = Query(
        k=1, history=[HistoryItem(first)], allow_items=[first], exclude_seen=False, fields=["title"]
    )
    (item,) = retriever.retrieve(query).items
    if item["title"] != changes["title"][0].as_py():
        raise SystemExit(f"item {first} is answered as {item['title']!r}")


if __name__ == "__main__":
    main()
