"""Writes what a generation has beside its shards: its tables first, its manifest when all is there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.artefacts import MANIFEST, write_json, write_manifest
from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.data.histories import Histories
from twotower.data.sampling import popularity
from twotower.generations.files import (
    BASE,
    CONFIG,
    FACTS,
    HISTORY,
    HISTORY_CUT,
    ITEM_IDS,
    KIND,
    column_file,
    list_files,
    profile_file,
    read_shard_facts,
)
from twotower.index.parts import save_array
from twotower.model.checkpoint import CONFIG as CHECKPOINT_CONFIG
from twotower.model.checkpoint import FEATURES, WEIGHTS, Checkpoint
from twotower.model.features import encode_columns, profile_values

_METRIC = "inner_product"


def write_tables(directory: Path, config: Config, dataset: Dataset, checkpoint: Checkpoint) -> None:
    """Write everything of a generation but its shards and its manifest.

    Args:
        directory: of the generation, unfinished.
        config: resolved, stored beside the rest.
        dataset: all its interactions count, whatever split they are in.
        checkpoint: must be trained on the dataset's vocabulary.
    """
    checkpoint.require_dataset(dataset)
    schema = checkpoint.schema
    write_json(directory / CONFIG, config.to_stored())
    (directory / "model").mkdir()
    for name in (WEIGHTS, FEATURES, CHECKPOINT_CONFIG):
        shutil.copyfile(checkpoint.file(name), directory / "model" / name)
    shutil.copyfile(checkpoint.path / MANIFEST, directory / "model" / MANIFEST)
    dataset.user_ids.write(directory / "user_ids.arrow")
    dataset.item_ids.write(directory / ITEM_IDS)

    users = directory / "users"
    users.mkdir()
    kept = max(schema.max_history, config.index.kept_history or 0)
    histories = Histories.of(dataset.interactions, capped=kept)
    for name in HISTORY:
        save_array(users / f"history_{name}.npy", getattr(histories, name))
    assert histories.cut is not None
    save_array(directory / HISTORY_CUT, histories.cut)
    offsets, item_rows = seen_sets(dataset)
    save_array(users / "seen_offsets.npy", offsets)
    save_array(users / "seen_item_rows.npy", item_rows)
    for name, column in encode_columns(schema.query, dataset.user_table()).items():
        save_array(users / column_file(name), column)

    items = directory / "items"
    items.mkdir()
    for name, values in profile_values(schema, encode_columns(schema.item, dataset.item_table())).items():
        save_array(items / profile_file(name), values)
    counts = popularity(dataset.interactions, dataset.num_items)[: dataset.num_catalogue_items]
    save_array(directory / "popularity.npy", np.argsort(-counts, kind="stable").astype(np.int32))


def seen_sets(dataset: Dataset) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Return what each user ever had, of every kind and split: offsets [U + 1], ascending item rows [m].

    What was only shown to him, in an impression, he has not had.
    """
    log = dataset.interactions.select(~dataset.interactions.is_impression)
    pairs = np.unique((log.user_row.astype(np.int64) << 32) | log.item_row)
    counts = np.bincount(pairs >> 32, minlength=dataset.num_users)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return offsets, (pairs & 0xFFFF_FFFF).astype(np.int32)


def finish(
    directory: Path,
    generation_id: str,
    created: str,
    dataset: Dataset,
    checkpoint: Checkpoint,
    index: dict[str, Any],
) -> None:
    """Write the manifest, after which the directory is a generation.

    Args:
        directory: complete but for the manifest.
        generation_id: its name in the store.
        created: ISO 8601 time.
        dataset: what it was made from.
        checkpoint: what encoded its shards.
        index: factory, num_shards, effort, index_recall, target_index_recall, recall_k, num_queries and more.
    """
    write_manifest(
        directory,
        KIND,
        {
            "id": generation_id,
            "created": created,
            "checkpoint_fingerprint": checkpoint.fingerprint,
            "dataset_fingerprint": dataset.fingerprint,
            "vocabulary_hash": dataset.vocabulary_hash,
            "embedding_dim": checkpoint.embedding_dim,
            "metric": _METRIC,
            "num_items": dataset.num_catalogue_items,
            "as_of": dataset.as_of,
            "shards": built_shards(directory),
            "delta": None,
            "files": list_files(directory),
            "index": index,
        },
    )


def built_shards(directory: Path) -> list[dict[str, Any]]:
    """Return ``shards`` of the manifest of a generation that was just built, whose shards are all base."""
    folders = sorted(p for p in (directory / "shards").iterdir() if (p / FACTS).is_file())
    facts = {path.name: read_shard_facts(path) for path in folders}
    return [{"name": name, "role": BASE, **each} for name, each in facts.items()]
