"""What a type of feature is: one class that says how it is fitted, stored, encoded, requested and forgotten.

A feature is declared in the configuration; the class of its type is the declaration, and these methods are
all that the rest of the program knows of the type. No method needs torch: a type that is read from a column
returns arrays, and how they become inputs of a tower follows from their type (``encode``) and from the table
of embeddings that it declares (``table_rows``).

The methods that need numpy or pyarrow import them when they are called: a configuration loads neither.

Shapes: n rows of a column, L ids of a row, D width of a dense feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self, TypedDict, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from twotower.registry import Registry

if TYPE_CHECKING:
    import numpy.typing as npt
    import pyarrow as pa

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

UNKNOWN_ROW = 0
"""Embedding row of an id or category that was not there when the dataset was prepared."""

Side = Literal["query", "item"]
Reads = Literal["id", "column", "history", "profile"]
"""What a feature is made from: the row of its user or item; a column of their table; the items of the user's
history; or what an item feature is over that history."""
RowsAre = Literal["ids", "items", "values"]
"""What each row of a table of embeddings stands for: a user or item of its side, an item, or a value of the
vocabulary; row 0 is the unknown one, and row i + 1 stands for number i."""


class Learned(Protocol):
    """What ``prepare`` learned of a feature; ``FittedFeature`` holds it."""

    @property
    def values(self) -> list[str] | None:
        """Vocabulary; value i has embedding row i + 1."""

    @property
    def mean(self) -> float:
        """Mean of a number."""

    @property
    def std(self) -> float:
        """Standard deviation of a number."""

    @property
    def more(self) -> dict[str, Any]:
        """What else a type learns, as JSON values."""

    @property
    def profile_width(self) -> int:
        """Width of a profile of the feature."""


class Fit(TypedDict, total=False):
    """What ``fit`` returns: the fields of ``Learned`` that a type needs."""

    values: list[str] | None
    mean: float
    std: float
    more: dict[str, Any]


class Counts(Protocol):
    """How many rows there are; ``FeatureSchema`` has them."""

    @property
    def num_users(self) -> int:
        """Users in the vocabulary."""

    @property
    def num_items(self) -> int:
        """Items in the vocabulary."""


class Feature(BaseModel):
    """A declared feature. Each type is a subclass with its own ``type``, decorated with ``feature_type``.

    A type that is read from a column derives from ``ColumnFeature``.
    """

    model_config = STRICT

    if TYPE_CHECKING:
        # Each type declares it behind its name, as Literal["..."] with a default.
        type: str

    reads: ClassVar[Reads]
    """What it is made from."""
    sides: ClassVar[tuple[Side, ...]] = ("query", "item")
    """Sides that may have such a feature."""
    profiled: ClassVar[bool] = False
    """Whether a profile can average it; its ``profile_width`` says how wide that is."""
    labels_are: ClassVar[Literal["value", "values", "number"] | None] = None
    """What ``labels`` returns; None where metrics can not be measured by this feature."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_-]*$")]
    """Name of the feature, unique on its side."""

    @property
    def source_column(self) -> str | None:
        """Column of the item or user table that it is read from; None for other features."""
        return None

    def check_with(self, query: Sequence[Feature], item: Sequence[Feature]) -> None:
        """Check a feature beside all others.

        Raises:
            ValueError: they do not fit together; the message says what to change.
        """

    def fitted(self, has_times: bool) -> Self:
        """Return the declaration for data with or without times."""
        return self

    # The model: widths, and tables of embeddings.

    def width(self, items: Mapping[str, Learned]) -> int:
        """Return how many inputs of its tower the feature is.

        Args:
            items: the fitted item features by name.
        """
        raise NotImplementedError

    def table_name(self, side: Side) -> str:
        """Return the name of the table of embeddings that it reads, if it reads one."""
        return f"{side}_{self.name}"

    def table_rows(self, side: Side, learned: Learned, counts: Counts) -> int | None:
        """Return the rows of its table, each ``width`` wide; None where it has none of its own."""
        return None

    def rows_are(self, side: Side) -> RowsAre | None:
        """Return what the rows of its own table stand for, so that one can be forgotten.

        None where it has no table of its own, or where rows are shared, as those of a hashed table are.
        """
        return None

    def profile_width(self, learned: Learned) -> int:
        """Return the width of its profile, where ``profiled``: of its vocabulary and the unknown value."""
        return len(learned.values or []) + 1

    @property
    def history_length(self) -> int:
        """The latest items of a history that it looks at."""
        return 0

    @property
    def sequence_length(self) -> int:
        """The same where it reads the history as a sequence; 0 where it does not."""
        return 0

    @property
    def time_gaps(self) -> bool:
        """Whether it reads the times of a history."""
        return False

    # The data: from a column to what is stored, learned and encoded.

    def fit(self, side: Side, column: pa.Array, given: pa.DataType) -> Fit:
        """Return what there is to learn from a column.

        Args:
            side: of the feature.
            column: [n] in stored form.
            given: type of the column in the raw table.

        Raises:
            DataError: the column can not be read as this type; the message names feature and column.
        """
        return {}

    def encode(self, learned: Learned, column: pa.Array) -> npt.NDArray[Any]:
        """Return a column as the model reads it.

        Returns:
            int32 rows [n, L] of the feature's table, padded with -1, whose embeddings are averaged; or
            float32 [n, D], which are inputs as they are.

        Raises:
            DataError, ValueError: a value can not be read; the caller names feature and column.
        """
        raise AssertionError(f"feature type {self.type} has no static column")

    def labels(self, column: pa.Array) -> pa.Array:
        """Return a column as values that people know, by which metrics are told, as ``labels_are`` says.

        Returns:
            [n] text, lists of text, or numbers; null where it is missing.
        """
        raise AssertionError(f"feature type {self.type} has no labels")

    # Requests.

    def parse(self, learned: Learned, value: Any) -> Any:
        """Return a value of a request, not null, in a form that Arrow reads as a column of this type.

        Raises:
            ValueError: it is of another type; the caller says what is ``allowed``.
        """
        raise AssertionError(f"feature type {self.type} is not requested")

    @property
    def allowed(self) -> str:
        """What a request may hold, for people, such as "a number, or null"."""
        raise AssertionError(f"feature type {self.type} is not requested")


class ColumnFeature(Feature):
    """A feature that is read from a column of the item or user table."""

    reads: ClassVar[Reads] = "column"
    store_rank: ClassVar[int] = 0
    """Of several features of one column those with the highest rank say how it is stored."""

    column: str | None = None
    """Column of the item table (or user table) that holds it; the feature's name when not given."""

    @property
    def source_column(self) -> str:
        """Column of the item or user table that the feature is read from."""
        return self.column or self.name

    @classmethod
    def store(cls, side: Side, name: str, column: pa.Array, specs: Sequence[Any]) -> pa.Array:
        """Return a raw column in the form in which a dataset stores it; as it is where not overridden.

        Args:
            side: of the features.
            name: of the column.
            column: [n], without dictionary encoding.
            specs: features of this type that read it, one or more.

        Raises:
            DataError: a value can not be read as this type.
        """
        return column


FEATURES: Registry[type[Feature]] = Registry("a type of feature")
"""All types of features by the name that the configuration gives them."""

F = TypeVar("F", bound=type[Feature])


def feature_type(kind: F) -> F:
    """Add a type of feature to ``FEATURES`` under the default of its field ``type``; a class decorator."""
    fields: dict[str, Any] = kind.__pydantic_fields__
    FEATURES.add(str(fields["type"].default), kind)
    return kind


def is_number(value: Any) -> bool:
    """Return whether a value of a request is a number, which true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
