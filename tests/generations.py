"""Generations for tests, made in this process without Ray and without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from twotower.artefacts import MANIFEST, write_manifest
from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.generations.encoding import encode_table
from twotower.generations.files import KIND, list_files
from twotower.generations.generation import Generation
from twotower.generations.shards import write_shard
from twotower.generations.store import Store
from twotower.generations.writing import finish, write_tables
from twotower.index.choice import choose
from twotower.index.parts import Part, write_part
from twotower.index.spec import shard_of
from twotower.lifecycle.measurement import measure
from twotower.model.checkpoint import Checkpoint, weights_of, write_checkpoint
from twotower.model.towers import TwoTower


def untrained_checkpoint(config: Config, dataset: Dataset, directory: Path, seed: int = 3) -> Checkpoint:
    """A checkpoint whose weights are as the seed made them."""
    directory.mkdir(parents=True)
    model = TwoTower(dataset.schema, config.model, config.train.loss.temperature, seed=seed)
    write_checkpoint(directory, weights_of(model), dataset, config, {"fit": "train"})
    return Checkpoint.open(directory)


def catalogue_vectors(checkpoint: Checkpoint, dataset: Dataset) -> np.ndarray:
    """All items through the tower in one batch, in item row order."""
    table = dataset.item_table()
    rows = np.arange(len(table))
    return encode_table(checkpoint, table.append_column("item_row", [rows]))


def encoded_parts(checkpoint: Checkpoint, dataset: Dataset, directory: Path, num_shards: int) -> list[Part]:
    """The catalogue as two parts."""
    directory.mkdir(parents=True)
    vectors = catalogue_vectors(checkpoint, dataset)
    rows = np.arange(len(vectors))
    shards = shard_of(dataset.item_table()["item_id"].to_pylist(), num_shards)
    return [
        write_part(directory, half, shards[half], vectors[half], num_shards)
        for half in (rows[::2], rows[1::2])
    ]


def plain_generation(config: Config, dataset: Dataset, checkpoint: Checkpoint, name: str) -> Path:
    """A finished generation in the store of the configuration, not published."""
    directory = Store(config.store).path(name)
    directory.mkdir(parents=True)
    parts = encoded_parts(checkpoint, dataset, config.home / f"parts-{name}", config.index.num_shards)
    for number in range(config.index.num_shards):
        write_shard(
            parts,
            number,
            choose(config.index, dataset.num_catalogue_items, checkpoint.embedding_dim).factory,
            dataset.item_paths,
            ["title", *checkpoint.schema.item_columns],
            config.index.attributes,
            checkpoint.fingerprint,
            str(directory / "shards" / f"{number:05d}"),
            threads=1,
        )
    write_tables(directory, config, dataset, checkpoint)
    facts = measure(config, Generation(directory, {}), checkpoint, parts, directory / "shards", threads=1)
    finish(directory, name, f"2026-01-01T00:00:00 {name}", dataset, checkpoint, facts)
    return directory


def light_generation(store: Store, name: str) -> Path:
    """A generation without items that can be published, verified and pruned."""
    directory = store.path(name)
    (directory / "model").mkdir(parents=True)
    write_manifest(directory / "model", "checkpoint", {"fingerprint": "c"})
    light_manifest(directory, name, name, list_files(directory))
    return directory


def light_manifest(
    directory: Path, name: str, created: str, files: dict[str, dict[str, Any]] | None = None
) -> None:
    """Write the manifest of a generation without items and shards: what stores look at."""
    ends = {"p50": 0.1, "p99": 0.2}
    index = {
        "factory": "Flat",
        "effort": {},
        "index_recall": 1.0,
        "target_index_recall": 0.9,
        "recall_k": 10,
        "num_queries": 5,
        "search_ms": ends,
    }
    content = {
        "id": name,
        "created": created,
        "checkpoint_fingerprint": "c",
        "dataset_fingerprint": "d",
        "vocabulary_hash": "v",
        "embedding_dim": 4,
        "metric": "inner_product",
        "num_items": 0,
        "as_of": None,
        "shards": [],
        "delta": None,
        "files": files or {},
        "index": index,
    }
    write_manifest(directory, KIND, content)


def edit_manifest(directory: Path, **changes: Any) -> None:
    """Replace values of a generation's manifest."""
    path = directory / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_index(directory: Path, **changes: Any) -> None:
    """Replace facts of the index in a generation's manifest."""
    index = json.loads((directory / MANIFEST).read_text())["index"]
    edit_manifest(directory, index={**index, **changes})
