"""The content of a dataset: what is counted and hashed of it, and the files that its tables go to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.artefacts import fingerprint
from twotower.data.dataset import ITEM_ROW
from twotower.data.hashing import array_hash, table_hash
from twotower.data.interactions import Interactions
from twotower.data.vocabulary import Vocabulary
from twotower.schema import KINDS, SPLITS, FeatureSchema

PREPARE_VERSION = 3
"""Changes whenever the same raw data and configuration give another dataset."""

_PARTS = 8
_PART_ROWS = (1_024, 65_536)


def counted(interactions: Interactions, schema: FeatureSchema) -> dict[str, Any]:
    """Return the counts of a manifest that follow from the interactions."""
    positive = interactions.kind == KINDS["positive"]
    outside = interactions.item_row >= schema.num_catalogue_items
    return {
        "users": schema.num_users,
        "items": schema.num_items,
        "catalogue_items": schema.num_catalogue_items,
        "outside_items": schema.num_items - schema.num_catalogue_items,
        "interactions": len(interactions),
        "interactions_outside_catalogue": int(outside.sum()),
        "users_without_interactions": int((np.diff(interactions.user_offsets) == 0).sum()),
        "kinds": {name: int((interactions.kind == code).sum()) for name, code in KINDS.items()},
        "splits": {
            name: int((positive & (interactions.split == code)).sum()) for name, code in SPLITS.items()
        },
    }


def write_outside(directory: Path, item_ids: Vocabulary, num_catalogue: int) -> None:
    """Write the ids of the items outside the catalogue, which are the last of all."""
    outside = np.arange(num_catalogue, len(item_ids))
    outside_ids = item_ids.array.slice(num_catalogue)
    pq.write_table(pa.table({"item_id": outside_ids, ITEM_ROW: outside}), directory / "outside_items.parquet")


def content_hash(
    interactions: Interactions,
    vocabulary_hash: str,
    items: pa.Table,
    users: pa.Table,
    schema: FeatureSchema,
    has_times: bool,
) -> str:
    """Return the fingerprint of a dataset of this content."""
    columns: dict[str, npt.NDArray[Any]] = interactions.columns()
    return fingerprint(
        {
            "version": PREPARE_VERSION,
            "interactions": array_hash(*columns.values()),
            "vocabulary": vocabulary_hash,
            "items": table_hash(items),
            "users": table_hash(users),
            "features": schema.to_json(),
            "has_times": has_times,
        }
    )


def write_items(folder: Path, items: pa.Table) -> None:
    """Write the catalogue as several parts, so that several readers can share it."""
    folder.mkdir()
    num_items = items.num_rows
    size = min(max(math.ceil(num_items / _PARTS), _PART_ROWS[0]), _PART_ROWS[1])
    numbered = items.append_column(ITEM_ROW, pa.array(np.arange(num_items, dtype=np.int64)))
    for part, start in enumerate(range(0, num_items, size)):
        pq.write_table(
            numbered.slice(start, size), folder / f"part-{part:05d}.parquet", row_group_size=16_384
        )
