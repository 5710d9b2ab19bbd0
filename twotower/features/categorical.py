"""The feature type ``categorical``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from twotower.features.base import ColumnFeature, Counts, Fit, Learned, RowsAre, Side, feature_type

if TYPE_CHECKING:
    import numpy.typing as npt
    import pyarrow as pa


@feature_type
class CategoricalFeature(ColumnFeature):
    """One value out of a vocabulary, embedded."""

    profiled: ClassVar[bool] = True
    labels_are: ClassVar[Literal["value", "values", "number"] | None] = "value"

    type: Literal["categorical"] = "categorical"
    dim: Annotated[int, Field(ge=1)] = 16
    """Width of the embedding."""
    max_values: Annotated[int, Field(ge=1)] = 100_000
    """The most frequent values kept; all others share the unknown row."""

    def width(self, items: Mapping[str, Learned]) -> int:
        """Return the width of the embedding."""
        return self.dim

    def table_rows(self, side: Side, learned: Learned, counts: Counts) -> int:
        """Return the values and the unknown one."""
        return len(learned.values or []) + 1

    def rows_are(self, side: Side) -> RowsAre:
        """Return that a row is a value."""
        return "values"

    @classmethod
    def store(cls, side: Side, name: str, column: pa.Array, specs: Sequence[Any]) -> pa.Array:
        """Return the column as text."""
        from twotower.features.columns import checked
        from twotower.values import as_text

        return checked(side, specs[0], lambda: as_text(column))

    def fit(self, side: Side, column: pa.Array, given: pa.DataType) -> Fit:
        """Return the vocabulary."""
        from twotower.features.columns import checked, most_frequent
        from twotower.values import as_categories

        texts = checked(side, self, lambda: as_categories(column))
        return {"values": most_frequent(texts, self.max_values)}

    def encode(self, learned: Learned, column: pa.Array) -> npt.NDArray[Any]:
        """Return [n, 1] int32."""
        from twotower.features.columns import value_rows

        return value_rows(self.labels(column), learned.values or [])[:, None]

    def labels(self, column: pa.Array) -> pa.Array:
        """Return the names of the values."""
        from twotower.values import as_categories

        return as_categories(column)

    def parse(self, learned: Learned, value: Any) -> Any:
        """Return a text; a number or a boolean is the name of a category."""
        from twotower.values import category_of

        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)):
            return category_of(value)
        raise ValueError(f"{value!r} is no value")

    @property
    def allowed(self) -> str:
        """What a request may hold, for people."""
        return "a text or a number, or null"
