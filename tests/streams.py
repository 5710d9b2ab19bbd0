"""A dataset that is awkward to stream, and what identifies an example wherever it is held."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tests.sequences import with_history
from tests.shop import make_config, write_files
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.data.interactions import Interactions
from twotower.data.prepare import prepare
from twotower.schema import KINDS, SPLITS
from twotower.training.batches import Share
from twotower.training.examples import Examples

HEAVY_USER = 9


def uneven_dataset(root: Path, history: dict[str, Any] | None = None) -> tuple[Config, Dataset]:
    """Return a prepared shop whose users have 0 to 500 interactions, in row groups of 64.

    There are all kinds and splits, equal times, repeated items and items outside the catalogue. ``history``
    has other values of the history feature.
    """
    write_files(root / "files")
    config = with_history(make_config(root), **(history or {}))
    dataset = prepare(config)
    rng = np.random.default_rng(4)
    sizes = rng.integers(0, 40, dataset.num_users)
    sizes[[3, 20, 36]] = 0
    sizes[HEAVY_USER] = 500
    user = np.repeat(np.arange(dataset.num_users), sizes).astype(np.int32)
    n = len(user)
    time = rng.integers(0, 60, n).astype(np.int64)
    share = np.concatenate([np.linspace(0, 1, size) for size in sizes])
    columns = {
        "user_row": user,
        "item_row": rng.integers(0, dataset.num_items, n).astype(np.int32),
        "time": time[np.lexsort((time, user))],
        "weight": rng.choice([0.0, 0.25, 1.0], n, p=[0.1, 0.45, 0.45]).astype(np.float32),
        "kind": rng.choice(
            [KINDS[k] for k in ("positive", "negative", "seen_only")], n, p=[0.7, 0.2, 0.1]
        ).astype(np.int8),
        "split": np.where(
            share < 0.7, SPLITS["train"], np.where(share < 0.85, SPLITS["validation"], SPLITS["test"])
        ).astype(np.int8),
    }
    pq.write_table(pa.table(columns), dataset.path / "interactions.parquet", row_group_size=64)
    manifest = json.loads((dataset.path / "manifest.json").read_text())
    manifest["as_of"] = int(columns["time"].max())
    manifest["files"]["interactions.parquet"] = (dataset.path / "interactions.parquet").stat().st_size
    (dataset.path / "manifest.json").write_text(json.dumps(manifest))
    replaced = Dataset.open(dataset.path)
    assert len(replaced.interactions) == n
    return config, replaced


def with_weights(dataset: Dataset, weights: list[float]) -> Dataset:
    """Return a dataset with other weights of its interactions, drawn of these."""
    changed = Dataset.open(dataset.path)
    old = dataset.interactions
    drawn = np.random.default_rng(6).choice(weights, len(old)).astype(np.float32)
    changed.interactions = dataclasses.replace(old, weight=drawn)
    return changed


def with_train(config: Config, **train: object) -> Config:
    """Return a configuration with other values in its section train."""
    values = copy.deepcopy(config.to_json())
    values["train"] |= train
    return parse_config(values)


def keys(examples: Examples, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return for each example [B] its user and its place among that user's examples, as one number.

    A user's examples are in the same order wherever he is held, so the same example has the same key.
    """
    users = examples.user_rows(np.arange(len(examples)))
    begins = np.flatnonzero(np.concatenate([[True], users[1:] != users[:-1]]))
    first = begins[np.searchsorted(begins, rows, side="right") - 1]
    found: npt.NDArray[np.int64] = (users[rows] << 32) + rows - first
    return found


def keys_of(shares: Iterable[Share]) -> list[npt.NDArray[np.int64]]:
    """Return the keys of each share's rows, padding left out."""
    return [keys(share.examples, share.rows[share.rows >= 0]) for share in shares]


def rows_of(columns: Interactions) -> npt.NDArray[np.int64]:
    """Return the columns of interactions as [6, n] numbers."""
    return np.stack([column.astype(np.float64) for column in columns.columns().values()]).astype(np.int64)
