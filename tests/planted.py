"""A catalogue of two genres whose users keep to one of them, and a model that was trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.generations import plain_generation
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.lifecycle.update import update_items
from twotower.model.checkpoint import Checkpoint, weights_of, write_checkpoint
from twotower.training.collectives import World
from twotower.training.loop import Trainer

GENRES = ("Comedy", "Horror")
OF_EACH = 30
"""Items of each genre that users have; the last item of each is in the catalogue and nobody has had it."""
ADDED = {"new-comedy": "Comedy", "new-horror": "Horror"}
"""Items that are added after the training, and their genres."""


def genre_of(item_id: str) -> str:
    """Return the genre of an item of the build."""
    return GENRES[int(item_id[1:]) // (OF_EACH + 1)]


def make_config(root: Path, history: dict[str, Any] | None = None, profile: bool = False) -> Config:
    """Write the files and return their configuration; ``history`` has other values of that feature."""
    rng = np.random.default_rng(5)
    users, items, times = [], [], []
    for user in range(60):
        first = user % 2 * (OF_EACH + 1)
        for place, item in enumerate(rng.permutation(OF_EACH)[:12]):
            users.append(f"u{user}")
            items.append(f"i{first + item}")
            times.append(1_700_000_000 + 60 * place)
    ids = [f"i{i}" for i in range(2 * (OF_EACH + 1))]
    root.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"user": users, "item": items, "time": times}), root / "log.parquet")
    table = pa.table({"item": ids, "title": ids, "genre": [genre_of(i) for i in ids]})
    pq.write_table(table, root / "items.parquet")
    query: list[dict[str, Any]] = [{"name": "history", "type": "history", "dim": 8, **(history or {})}]
    if profile:
        query.append({"name": "taste", "type": "profile", "of": "genre"})
    return parse_config(
        {
            "name": "planted",
            "storage": {"root": str(root / "runs")},
            "data": {
                "source": {
                    "kind": "files",
                    "interactions": str(root / "log.parquet"),
                    "columns": {"user": "user", "item": "item", "time": "time", "time_unit": "s"},
                    "items": {"path": str(root / "items.parquet"), "id": "item", "title": "title"},
                }
            },
            "features": {
                "query": query,
                "item": [
                    {"name": "item_id", "type": "id", "dim": 8, "unknown_rate": 0.1},
                    {"name": "genre", "type": "categorical", "dim": 4},
                ],
            },
            "model": {
                "embedding_dim": 8,
                "query_tower": {"hidden": [16], "dropout": 0.0},
                "item_tower": {"hidden": [16], "dropout": 0.0},
            },
            "train": {
                "epochs": 8,
                "global_batch_size": 64,
                "num_workers": 1,
                "optimizer": {"learning_rate": 0.02, "table_learning_rate": 0.05},
            },
            "index": {"num_shards": 1, "max_delta_share": None},
        }
    )


def trained(config: Config) -> Trainer:
    """Return the training after its last epoch."""
    trainer = Trainer(config, prepare(config), World(), "all")
    for _ in range(config.train.epochs):
        trainer.run_epoch()
    return trainer


def build_store(config: Config) -> tuple[Dataset, Path]:
    """Train, build and publish, and add the new items; returns the dataset and the updated generation."""
    trainer, dataset = trained(config), prepare(config)
    directory = config.checkpoints / "c"
    directory.mkdir(parents=True)
    write_checkpoint(directory, weights_of(trainer.model), dataset, config, {})
    plain_generation(config, dataset, Checkpoint.open(directory), "g1")
    store = Store(config.store)
    store.publish("g1")
    given = [{"item_id": name, "title": name, "genre": genre} for name, genre in ADDED.items()]
    schema = Generation.open(store.path("g1")).items.schema
    update = update_items(store, pa.Table.from_pylist(given, schema))
    assert update.added == len(ADDED)
    return dataset, store.path(update.generation)
