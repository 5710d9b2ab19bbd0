"""A prepared dataset on disk: what ``prepare`` writes and everything downstream reads."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from twotower.artefacts import read_manifest
from twotower.config import Source
from twotower.data.interactions import Interactions
from twotower.data.vocabulary import Vocabulary
from twotower.errors import ArtefactError, DataError
from twotower.schema import FeatureSchema

KIND = "dataset"
ITEM_ROW = "item_row"


class Dataset:
    """A finished dataset directory; large parts are read when first asked for and then kept."""

    def __init__(self, path: Path, manifest: dict[str, Any], schema: FeatureSchema) -> None:
        """Take what ``open`` has checked."""
        self.path = path
        self.manifest = manifest
        self.schema = schema

    @classmethod
    def open(cls, path: Path | str) -> Dataset:
        """Open a finished dataset and check that every file is there in its recorded size.

        Raises:
            ArtefactError: it is not finished, damaged, or something else.
        """
        path = Path(path)
        manifest = read_manifest(path, KIND)
        for name, size in manifest["files"].items():
            file = path / name
            if not file.is_file():
                raise ArtefactError(f"dataset {path} lacks {name}; delete the directory and prepare again")
            if file.stat().st_size != size:
                raise ArtefactError(
                    f"{file} has {file.stat().st_size} bytes, its manifest says {size}; delete {path} and "
                    "prepare again"
                )
        schema = FeatureSchema.from_json(json.loads((path / "features.json").read_bytes()))
        return cls(path, manifest, schema)

    @property
    def fingerprint(self) -> str:
        """Hash of the content: the same data, rules and features give the same one anywhere."""
        return str(self.manifest["fingerprint"])

    @property
    def vocabulary_hash(self) -> str:
        """Hash of the user and item ids in row order."""
        return str(self.manifest["vocabulary_hash"])

    @property
    def num_users(self) -> int:
        """Users in the vocabulary."""
        return self.schema.num_users

    @property
    def num_items(self) -> int:
        """Items in the vocabulary, outside items included."""
        return self.schema.num_items

    @property
    def num_catalogue_items(self) -> int:
        """Items of the catalogue: item rows 0 to num_catalogue_items - 1."""
        return self.schema.num_catalogue_items

    @property
    def has_times(self) -> bool:
        """Whether interactions have times; without them every time is 0."""
        return bool(self.manifest["has_times"])

    @property
    def ties(self) -> Literal["together", "order"]:
        """``split.ties`` that it was prepared with: what the order of rows of one time means."""
        ties: Literal["together", "order"] = self.manifest["config"]["split"]["ties"]
        return ties

    @property
    def as_of(self) -> int | None:
        """Time of the latest interaction, int64 microseconds UTC; None without times."""
        value = self.manifest["as_of"]
        return None if value is None else int(value)

    @property
    def counts(self) -> dict[str, Any]:
        """Counts of users, items, interactions per split and kind, and of what was left out."""
        return dict(self.manifest["counts"])

    @property
    def source(self) -> Source:
        """The source section of the configuration it was prepared with."""
        adapter: TypeAdapter[Source] = TypeAdapter(Source)
        return adapter.validate_python(self.manifest["source"])

    @functools.cached_property
    def interactions(self) -> Interactions:
        """All interactions, in memory."""
        return Interactions.read(self.path / "interactions.parquet", self.num_users)

    @functools.cached_property
    def user_ids(self) -> Vocabulary:
        """User ids in row order, memory-mapped."""
        return Vocabulary.open(self.path / "user_ids.arrow")

    @functools.cached_property
    def item_ids(self) -> Vocabulary:
        """Item ids in row order, outside items last, memory-mapped."""
        return Vocabulary.open(self.path / "item_ids.arrow")

    @property
    def item_paths(self) -> list[str]:
        """Parquet parts of the catalogue in row order; each has an int64 ``item_row`` column."""
        return [str(p) for p in sorted((self.path / "items").glob("part-*.parquet"))]

    @property
    def item_schema(self) -> pa.Schema:
        """Columns of the catalogue, without ``item_row``."""
        schema = pq.read_schema(self.item_paths[0]).remove_metadata()
        return schema.remove(schema.get_field_index(ITEM_ROW))

    def item_table(self, columns: list[str] | None = None) -> pa.Table:
        """Return the catalogue, one row per item in row order: item_id, title and the item table's columns.

        Args:
            columns: Names of the columns wanted, in that order; all when not given.

        Raises:
            DataError: a column is not there.
        """
        wanted = _known("item", columns, self.item_schema.names)
        return pa.concat_tables([pq.read_table(p, columns=wanted) for p in self.item_paths]).select(wanted)

    def user_table(self, columns: list[str] | None = None) -> pa.Table:
        """Return one row per user in row order: user_id and the user table's columns.

        Args:
            columns: Names of the columns wanted, in that order; all when not given.

        Raises:
            DataError: a column is not there.
        """
        path = self.path / "users.parquet"
        wanted = _known("user", columns, pq.read_schema(path).names)
        return pq.read_table(path, columns=wanted).select(wanted)


def _known(side: str, columns: list[str] | None, known: list[str]) -> list[str]:
    if columns is None:
        return known
    absent = [c for c in columns if c not in known]
    if absent:
        raise DataError(
            f"the {side} table has no column {', '.join(map(repr, absent))}; it has {', '.join(known)}"
        )
    return columns
