"""A small published generation: own files with user features, negatives and items outside the catalogue."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from tests.generations import plain_generation
from tests.sequences import with_history
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.generations.store import Store
from twotower.model.checkpoint import Checkpoint, weights_of, write_checkpoint
from twotower.model.towers import TwoTower

NUM_USERS, NUM_ITEMS, NUM_OUTSIDE = 37, 59, 3
HOSTILE_TITLES = {
    12: "<img src=x onerror=\"document.title='owned'\">",
    23: "</li></ol><script>document.title='owned'</script>",
    25: "{{7*7}} ${7*7} &lt;b&gt; \"quoted\" 'single' \\ \u202egnirts",
    30: "A title that does not end: " + "unbreakable" * 30,
}


def title_of(number: int) -> str:
    """Return the title of the item of id 1000 + number; whoever shows some of them as markup is found out."""
    return HOSTILE_TITLES.get(number, f"Title {number}")


def write_files(folder: Path) -> None:
    """Write interactions, items and users; ids are integers, users of an odd number have features."""
    rng = np.random.default_rng(8)
    rows = []
    for user in range(NUM_USERS):
        items = rng.permutation(NUM_ITEMS + NUM_OUTSIDE)[: rng.integers(8, 19)]
        begin = 1_700_000_000 + int(rng.integers(10_000_000))
        for place, item in enumerate(items):
            event = ("like", "love", "view", "dislike")[int(rng.integers(4)) if place > 4 else place % 2]
            rows.append((user, 1000 + int(item), begin + 86_400 * place, event))
    names = ["user", "item", "time", "event"]
    columns = [list(column) for column in zip(*rows, strict=True)]
    folder.mkdir(parents=True)
    pacsv.write_csv(pa.table(columns, names=names), folder / "interactions.csv")
    genres = ["Comedy", "Drama", "Horror", "War"]
    items = pa.table(
        {
            "item": [1000 + i for i in range(NUM_ITEMS)],
            "name": [title_of(i) for i in range(NUM_ITEMS)],
            "genres": ["|".join(rng.permutation(genres)[: rng.integers(1, 4)]) for _ in range(NUM_ITEMS)],
            "year": rng.integers(1950, 2020, NUM_ITEMS),
            # Every third item has no brand, every fifth no rating; dates and booleans are text in a CSV file.
            "brand": [None if i % 3 == 0 else f"brand {i % 4}" for i in range(NUM_ITEMS)],
            "rating": [None if i % 5 == 0 else (i * 7 % 11) / 2 for i in range(NUM_ITEMS)],
            "in_stock": ["true" if i % 4 else "false" for i in range(NUM_ITEMS)],
            "added": [f"2025-{1 + i % 12:02d}-{1 + i % 28:02d}" for i in range(NUM_ITEMS)],
        }
    )
    pacsv.write_csv(items, folder / "items.csv")
    odd = list(range(1, NUM_USERS, 2))
    users = pa.table(
        {
            "user": odd,
            "age": rng.integers(18, 80, len(odd)),
            "group": [["red", "green", "blue"][u % 3] for u in odd],
        }
    )
    pacsv.write_csv(users, folder / "users.csv")


def make_config(root: Path) -> Config:
    """Return a configuration on these files; every width differs."""
    files = root / "files"
    return parse_config(
        {
            "name": "shop",
            "storage": {"root": str(root / "runs")},
            "data": {
                "source": {
                    "kind": "files",
                    "interactions": str(files / "interactions.csv"),
                    "columns": {
                        "user": "user",
                        "item": "item",
                        "time": "time",
                        "time_unit": "s",
                        "event": "event",
                    },
                    "events": {"like": 1.0, "love": 0.25, "view": "seen_only", "dislike": "negative"},
                    "items": {"path": str(files / "items.csv"), "id": "item", "title": "name"},
                    "users": {"path": str(files / "users.csv"), "id": "user"},
                }
            },
            "features": {
                "query": [
                    {"name": "user_id", "type": "id", "dim": 5},
                    {"name": "history", "type": "history", "dim": 14, "max_length": 6, "pooling": "weighted"},
                    {"name": "taste", "type": "profile", "of": "genres", "max_length": 8},
                    {"name": "age", "type": "numeric"},
                    {"name": "colour", "type": "categorical", "column": "group", "dim": 3},
                ],
                "item": [
                    {"name": "item_id", "type": "id", "dim": 14},
                    {"name": "genres", "type": "multi_hot", "dim": 7},
                    {"name": "year", "type": "numeric"},
                ],
            },
            "model": {
                "embedding_dim": 11,
                "query_tower": {"hidden": [23], "norm": "layer", "dropout": 0.1},
                "item_tower": {"hidden": [19], "norm": "layer", "dropout": 0.1},
            },
            "train": {"loss": {"temperature": 0.07, "learn_temperature": True}},
            "index": {
                "num_shards": 3,
                "max_delta_share": None,
                "attributes": {
                    "genres": {"separator": "|"},
                    "year": {},
                    "label": {"column": "brand"},
                    "rating": {"type": "number"},
                    "in_stock": {"type": "boolean"},
                    "added": {"type": "time"},
                },
            },
            # A busy machine may take longer than the second that is the default.
            "serve": {"max_k": 200, "limits": {"deadline_ms": 30_000}},
        }
    )


def build_store(
    root: Path, kept_history: int | None = None, history: dict[str, Any] | None = None
) -> tuple[Config, Dataset, Path]:
    """Prepare, initialise a model, build and publish; ``history`` has other values of that feature.

    It is made once by this process, and copied.
    """
    settings = json.dumps([kept_history, history or {}])
    original, dataset = _build_once(settings)
    shutil.copytree(original, root, dirs_exist_ok=True)
    config = _config(root, settings)
    return config, Dataset.open(root / dataset), Store(config.store).path("g1")


@functools.cache
def _build_once(settings: str) -> tuple[Path, Path]:
    """Return a folder with a store that nobody changes, and in it the path of the dataset."""
    root = Path(tempfile.mkdtemp(prefix="shop"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    write_files(root / "files")
    config = _config(root, settings)
    dataset = prepare(config)
    checkpoint = fresh_checkpoint(config, dataset, root / "checkpoint")
    plain_generation(config, dataset, checkpoint, "g1")
    Store(config.store).publish("g1")
    return root, dataset.path.relative_to(root)


def _config(root: Path, settings: str) -> Config:
    kept_history, history = json.loads(settings)
    values = with_history(make_config(root), **history).to_json()
    values["index"]["kept_history"] = kept_history
    return parse_config(values)


def fresh_checkpoint(config: Config, dataset: Dataset, path: Path, seed: int = 3) -> Checkpoint:
    """Return a checkpoint of an untrained model."""
    model = TwoTower(dataset.schema, config.model, 0.1, seed=seed)
    # Small initial weights would give all users nearly the same ranking.
    for table in model.tables.values():
        table.data *= 1.0 / table.data.std()
    path.mkdir(parents=True)
    write_checkpoint(path, weights_of(model), dataset, config, {})
    return Checkpoint.open(path)
