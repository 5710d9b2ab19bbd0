"""Users out of a prepared dataset: what stood in their rows is emptied, and the rows stay where they are.

Rows are positions in embedding tables and arrays, so nothing is renumbered. A forgotten row has no id
(``FORGOTTEN``), no interactions and no features, as an unknown user has none. Values of features that nobody
else has go from the vocabularies too; a value's place is that of an embedding, so blank text takes it.

Items outside the catalogue that nobody else had go in the same way: their ids are known from these users
alone.

What is of all users together stays as it was fitted: the means and deviations of numeric features, the time
until which the dataset reaches, and the order of users and values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.artefacts import MANIFEST, link_or_copy, write_json, write_manifest
from twotower.data.content import content_hash, counted, write_outside
from twotower.data.dataset import KIND, Dataset
from twotower.data.interactions import Interactions
from twotower.data.vocabulary import FORGOTTEN, Vocabulary, vocabulary_hash
from twotower.errors import DataError
from twotower.features.columns import values_of_some
from twotower.schema import FeatureSchema, FittedFeature

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Erasure:
    """What has to go from everything that was made with one vocabulary."""

    num_users: int
    """Users that are forgotten now."""
    rows: IntArray
    """[m] int64 ascending, user rows that are empty afterwards: also those that were before."""
    old_hash: str
    """Hash of the vocabularies before."""
    new_hash: str
    """Hash of the vocabularies without the ids."""
    item_rows: IntArray
    """[k] int64 ascending, rows of items outside the catalogue that nobody has afterwards."""
    values: Mapping[str, frozenset[str]]
    """By query feature, values that nobody else has."""
    old_dataset: str
    """Fingerprint of the dataset before."""
    new_dataset: str
    """Its fingerprint afterwards; the same where the dataset is not there."""

    def schema(self, schema: FeatureSchema) -> FeatureSchema:
        """Return a schema without the values."""
        features = [_blanked(f, self.values.get(f.spec.name, frozenset())) for f in schema.query]
        return schema.model_copy(update={"query": features})


def _blanked(feature: FittedFeature, gone: Collection[str]) -> FittedFeature:
    if not gone or feature.values is None:
        return feature
    values = [FORGOTTEN if value in gone else value for value in feature.values]
    return feature.model_copy(update={"values": values})


@dataclass(frozen=True)
class Forgetting:
    """A dataset, and what it is without some users."""

    dataset: Dataset
    erasure: Erasure
    interactions: Interactions
    user_ids: Vocabulary
    item_ids: Vocabulary
    users: pa.Table
    """One row for each user."""

    @property
    def num_interactions(self) -> int:
        """Interactions that go."""
        return len(self.dataset.interactions) - len(self.interactions)

    @property
    def num_item_ids(self) -> int:
        """Ids of items that go."""
        return len(self.item_ids.forgotten) - len(self.dataset.item_ids.forgotten)

    @classmethod
    def of(cls, dataset: Dataset, ids: Sequence[str]) -> Forgetting | None:
        """Return what a dataset is without users; None where it knows none of them.

        Raises:
            DataError: nobody else has interactions.
        """
        rows = dataset.user_ids.rows(ids, missing="negative")
        rows = np.unique(rows[rows >= 0])
        if not len(rows):
            return None
        user_ids = dataset.user_ids.without(rows)
        gone = np.zeros(dataset.num_users, np.bool_)
        gone[user_ids.forgotten] = True
        interactions = dataset.interactions.select(~gone[dataset.interactions.user_row])
        if not len(interactions):
            raise DataError(
                f"dataset {dataset.path} has interactions of these users only; delete the directory, and "
                "what was made from it"
            )
        table = dataset.user_table()
        held = {
            f.spec.name: values_of_some(f, table.column(f.spec.source_column), gone, FORGOTTEN)
            for f in dataset.schema.query
            if f.spec.rows_are("query") == "values"
        }
        outside = np.arange(dataset.num_catalogue_items, dataset.num_items)
        item_rows = np.setdiff1d(outside, interactions.item_row)
        item_ids = dataset.item_ids.without(item_rows)
        new_hash = vocabulary_hash(user_ids, item_ids)
        users = _emptied(table, user_ids, gone)
        # The schema is needed for the fingerprint that is part of the erasure.
        erasure = Erasure(
            num_users=len(rows),
            rows=user_ids.forgotten,
            old_hash=dataset.vocabulary_hash,
            new_hash=new_hash,
            item_rows=item_rows,
            values=held,
            old_dataset=dataset.fingerprint,
            new_dataset="",
        )
        schema = erasure.schema(dataset.schema)
        items = dataset.item_table()
        fingerprint = content_hash(interactions, new_hash, items, users, schema, dataset.has_times)
        erasure = Erasure(**{**vars(erasure), "new_dataset": fingerprint})
        return cls(dataset, erasure, interactions, user_ids, item_ids, users)

    def write(self, directory: Path) -> None:
        """Write the dataset without the users into an empty directory, the manifest last."""
        old = self.dataset
        schema = self.erasure.schema(old.schema)
        self.interactions.write(directory / "interactions.parquet")
        self.user_ids.write(directory / "user_ids.arrow")
        self.item_ids.write(directory / "item_ids.arrow")
        write_outside(directory, self.item_ids, old.num_catalogue_items)
        pq.write_table(self.users, directory / "users.parquet", row_group_size=1 << 16)
        write_json(directory / "features.json", schema.to_json())
        for name in old.manifest["files"]:
            if not (directory / name).exists():
                link_or_copy(old.file(name), directory / name)
        content: dict[str, Any] = {
            **{k: v for k, v in old.manifest.items() if k not in ("kind", "schema_version")},
            "fingerprint": self.erasure.new_dataset,
            "vocabulary_hash": self.erasure.new_hash,
            "counts": {
                **old.counts,
                **counted(self.interactions, schema),
                "forgotten_users": len(self.erasure.rows),
            },
            "files": {name: (directory / name).stat().st_size for name in old.manifest["files"]},
        }
        assert MANIFEST not in content["files"]
        write_manifest(directory, KIND, content)


def _emptied(users: pa.Table, user_ids: Vocabulary, gone: npt.NDArray[np.bool_]) -> pa.Table:
    """Return a user table with nothing in some rows."""
    # What is taken from nowhere is null, whatever its type.
    kept = users.take(pa.array(np.arange(len(gone)), mask=gone))
    index = kept.column_names.index("user_id")
    return kept.set_column(index, "user_id", user_ids.array)
