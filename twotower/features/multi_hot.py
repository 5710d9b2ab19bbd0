"""The feature type ``multi_hot``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from twotower.features.base import ColumnFeature, Counts, Fit, Learned, RowsAre, Side, feature_type

if TYPE_CHECKING:
    import numpy.typing as npt
    import pyarrow as pa


@feature_type
class MultiHotFeature(ColumnFeature):
    """A set of values out of a vocabulary, embedded and averaged."""

    profiled: ClassVar[bool] = True
    labels_are: ClassVar[Literal["value", "values", "number"] | None] = "values"
    # Others read its column as text, which would take its lists.
    store_rank: ClassVar[int] = 1

    type: Literal["multi_hot"] = "multi_hot"
    dim: Annotated[int, Field(ge=1)] = 16
    """Width of the embedding."""
    separator: str = "|"
    """Separates the values in a text column; a list column is taken as it is."""
    max_values: Annotated[int, Field(ge=1)] = 100_000
    """The most frequent values kept; all others share the unknown row."""
    max_length: Annotated[int, Field(ge=1)] = 32
    """The most values kept for one row."""

    def width(self, items: Mapping[str, Learned]) -> int:
        """Return the width of the embedding."""
        return self.dim

    def table_rows(self, side: Side, learned: Learned, counts: Counts) -> int:
        """Return the values and the unknown one."""
        return len(learned.values or []) + 1

    def rows_are(self, side: Side) -> RowsAre:
        """Return that a row is a value."""
        return "values"

    def fit(self, side: Side, column: pa.Array, given: pa.DataType) -> Fit:
        """Return the vocabulary."""
        import pyarrow.compute as pc

        from twotower.features.columns import checked, most_frequent
        from twotower.values import is_text

        if is_text(column.type):
            self._check_separator(side, column)
        lists = checked(side, self, lambda: self.labels(column))
        return {"values": most_frequent(pc.list_flatten(lists), self.max_values)}

    def _check_separator(self, side: Side, column: pa.Array) -> None:
        """Refuse, or say, that the values of a column have another separator between them than declared."""
        from twotower import progress
        from twotower.cells import other_separator
        from twotower.errors import DataError

        other = other_separator(column, self.separator)
        if other is None:
            return
        what = (
            f"features.{side} {self.name!r}: {other.cells:,} cells of column {self.source_column!r} hold "
            f"{other.separator!r} and not the separator {self.separator!r}, such as {other.example!r}"
        )
        if other.sure:
            raise DataError(
                f"{what}; set the feature's separator to the one in the file, or write one in all cells"
            )
        progress.say(f"{what}; each is one value")

    def encode(self, learned: Learned, column: pa.Array) -> npt.NDArray[Any]:
        """Return [n, L] int32, L at most ``max_length``."""
        import numpy as np

        from twotower.cells import flattened
        from twotower.features.columns import value_rows

        values = learned.values or []
        flat, parents = flattened(self.labels(column))
        ids = value_rows(flat, values)
        if len(ids):
            # Each value counts once a row, in ascending order: a set has no order of its own.
            _, first = np.unique(parents * (len(values) + 2) + ids, return_index=True)
            ids, parents = ids[first], parents[first]
        counts = np.bincount(parents, minlength=len(column))
        place = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
        width = int(min(max(counts.max(initial=1), 1), self.max_length))
        out = np.full((len(column), width), -1, np.int32)
        kept = place < width
        out[parents[kept], place[kept]] = ids[kept]
        return out

    def labels(self, column: pa.Array) -> pa.Array:
        """Return lists of names of values; blank pieces are left out."""
        from twotower.features.columns import as_lists

        return as_lists(column, self.separator)

    def parse(self, learned: Learned, value: Any) -> Any:
        """Return a list of texts, or a text; a number or a boolean is the name of a value."""
        from twotower.values import category_of

        if isinstance(value, list):
            names = [category_of(v) if isinstance(v, (str, int, float)) else None for v in value]
            # A fraction is a value where the column has such, and a slip elsewhere.
            fractions = [isinstance(v, float) and not v.is_integer() for v in value]
            odd = [name for name, fraction in zip(names, fractions, strict=True) if fraction]
            if None in names or any(name not in (learned.values or []) for name in odd):
                raise ValueError(f"{value!r} is no list of values")
            return names
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)):
            return category_of(value)
        raise ValueError(f"{value!r} is no list of values")

    @property
    def allowed(self) -> str:
        """What a request may hold, for people."""
        return f"a list of texts, or one text separated by {self.separator!r}, or null"
