"""The feature type ``id``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from twotower.features.base import Counts, Feature, Learned, Reads, RowsAre, Side, feature_type

ITEM_IDS = "id_of_item"
"""Name of the table of item ids."""


@feature_type
class IdFeature(Feature):
    """Embedding of the id itself: the user's on the query side, the item's on the item side."""

    reads: ClassVar[Reads] = "id"

    type: Literal["id"] = "id"
    dim: Annotated[int, Field(ge=1)] = 64
    """Width of the embedding."""
    unknown_rate: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of training rows whose id is replaced by the unknown id, so that unknown ids are trained too."""
    buckets: Annotated[int, Field(ge=2)] | None = None
    """Rows of a hashed table that ids share; each id has a row of its own when not given."""
    hashes: Annotated[int, Field(ge=1, le=8)] = 2
    """Rows of a hashed table added up for an id; two ids are the same only where all of them agree."""

    def width(self, items: Mapping[str, Learned]) -> int:
        """Return the width of the embedding."""
        return self.dim

    def table_name(self, side: Side) -> str:
        """Return the name of the table, which is the same whatever the feature is called."""
        return "id_of_user" if side == "query" else ITEM_IDS

    def table_rows(self, side: Side, learned: Learned, counts: Counts) -> int:
        """Return the rows of all ids, or those they share, and that of the unknown id."""
        ids = counts.num_users if side == "query" else counts.num_items
        return (self.buckets or ids) + 1

    def rows_are(self, side: Side) -> RowsAre | None:
        """Return that a row is an id; a hashed id is a sum of rows that others read too."""
        return "ids" if self.buckets is None else None
