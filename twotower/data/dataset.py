"""A prepared dataset on disk: what ``prepare`` writes and everything downstream reads."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, Field, TypeAdapter

from twotower.artefacts import MANIFEST, read_manifest
from twotower.config import Source
from twotower.data.interactions import Interactions
from twotower.data.vocabulary import Vocabulary
from twotower.errors import ArtefactError, DamagedError, DataError
from twotower.jsonfiles import check_shape
from twotower.listing import STORED, Count, Sizes, inside, listed_file
from twotower.schema import FeatureSchema

KIND = "dataset"
ITEM_ROW = "item_row"
AGAIN = "Delete the directory and prepare again."


class SplitCounts(BaseModel):
    """Positive interactions of each split."""

    model_config = STORED

    train: Count
    validation: Count
    test: Count


class DatasetCounts(BaseModel):
    """What every dataset counts, of many more."""

    model_config = STORED

    users: Count
    catalogue_items: Count
    interactions: Count
    splits: SplitCounts


class DatasetManifest(BaseModel):
    """The manifest of a dataset."""

    model_config = STORED

    fingerprint: str
    vocabulary_hash: str
    has_times: bool
    as_of: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None
    counts: DatasetCounts
    source: dict[str, Any]
    files: Sizes
    config: dict[str, Any] = {}


class Dataset:
    """A finished dataset directory; large parts are read when first asked for and then kept.

    Rows count from 0, and stand for ids by ``user_ids`` and ``item_ids``; times are int64 microseconds UTC.

    Example:
        >>> tt.Dataset.open(data.path).num_items == data.num_items
        True
        >>> data.user_ids.id(0), data.interactions.time.dtype.name
        ('u0', 'int64')
    """

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
        manifest = read_manifest(path, KIND, DatasetManifest)
        check_shape(manifest["source"], Source, f"{path}/{MANIFEST}", AGAIN)
        for name, size in manifest["files"].items():
            try:
                file = inside(path, name, AGAIN)
            except DamagedError:
                raise ArtefactError(
                    f"dataset {path} lacks {name}; delete the directory and prepare again"
                ) from None
            if file.stat().st_size != size:
                raise ArtefactError(
                    f"{file} has {file.stat().st_size} bytes, its manifest says {size}; delete {path} and "
                    "prepare again"
                )
        features = listed_file(path, "features.json", manifest["files"], AGAIN)
        try:
            data = features.read_bytes()
        except OSError as error:
            raise ArtefactError(f"{features} can not be read ({error.strerror}). {AGAIN}") from None
        return cls(path, manifest, FeatureSchema.parse(data, str(features), AGAIN))

    def file(self, name: str) -> Path:
        """Return the path of a file that the manifest lists; no other is opened.

        Raises:
            ArtefactError: it lists no such file.
        """
        return listed_file(self.path, name, self.manifest["files"], AGAIN)

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
    def train_positives(self) -> int:
        """Positive interactions of the train split."""
        return int(self.counts["splits"]["train"])

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
        return Interactions.read(self.file("interactions.parquet"), self.num_users)

    @functools.cached_property
    def user_ids(self) -> Vocabulary:
        """User ids in row order, memory-mapped."""
        return Vocabulary.open(self.file("user_ids.arrow"))

    @functools.cached_property
    def item_ids(self) -> Vocabulary:
        """Item ids in row order, outside items last, memory-mapped."""
        return Vocabulary.open(self.file("item_ids.arrow"))

    @property
    def item_paths(self) -> list[str]:
        """Parquet parts of the catalogue in row order; each has an int64 ``item_row`` column."""
        names = sorted(n for n in self.manifest["files"] if n.startswith("items/part-"))
        return [str(self.file(name)) for name in names]

    @property
    def item_schema(self) -> pa.Schema:
        """Columns of the catalogue, without ``item_row``."""
        if not self.item_paths:
            raise ArtefactError(f"the manifest of {self.path} lists no items. {AGAIN}")
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
        path = self.file("users.parquet")
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
