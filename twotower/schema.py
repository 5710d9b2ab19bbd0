"""Feature declarations, and the fitted feature schema that travels inside every artefact.

A feature is declared once, in the config. ``prepare`` fits what a declaration leaves open (vocabularies,
means) and stores the result as a :class:`FeatureSchema`; training, encoding and serving read that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from twotower.jsonfiles import check_shape, parse_json

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

Kind = Literal["positive", "negative", "seen_only"]
KINDS: dict[Kind, int] = {"positive": 0, "negative": 1, "seen_only": 2}
"""Code of each kind of interaction in the ``kind`` column (int8) of a prepared dataset."""

SplitName = Literal["train", "validation", "test"]
SPLITS: dict[SplitName, int] = {"train": 0, "validation": 1, "test": 2}
"""Code of each split in the ``split`` column (int8) of a prepared dataset."""

MAX_WEIGHT = 1e15
"""Largest weight of an interaction, in the data or in a request: sums and squares are 32-bit floats."""

UNKNOWN_ROW = 0
"""Embedding row of an id or category that was not there when the dataset was prepared."""

MAX_PROFILE_WIDTH = 1024


class _Feature(BaseModel):
    model_config = STRICT

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_-]*$")]
    """Name of the feature, unique on its side."""


class _ColumnFeature(_Feature):
    column: str | None = None
    """Column of the item table (or user table) that holds it; the feature's name when not given."""

    @property
    def source_column(self) -> str:
        """Column of the item or user table that the feature is read from."""
        return self.column or self.name


class IdFeature(_Feature):
    """Embedding of the id itself: the user's on the query side, the item's on the item side."""

    type: Literal["id"] = "id"
    dim: Annotated[int, Field(ge=1)] = 64
    """Width of the embedding."""
    unknown_rate: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of training rows whose id is replaced by the unknown id, so that unknown ids are trained too."""
    buckets: Annotated[int, Field(ge=2)] | None = None
    """Rows of a hashed table that ids share; each id has a row of its own when not given."""
    hashes: Annotated[int, Field(ge=1, le=8)] = 2
    """Rows of a hashed table added up for an id; two ids are the same only where all of them agree."""


class CategoricalFeature(_ColumnFeature):
    """One value out of a vocabulary, embedded."""

    type: Literal["categorical"] = "categorical"
    dim: Annotated[int, Field(ge=1)] = 16
    """Width of the embedding."""
    max_values: Annotated[int, Field(ge=1)] = 100_000
    """The most frequent values kept; all others share the unknown row."""


class MultiHotFeature(_ColumnFeature):
    """A set of values out of a vocabulary, embedded and averaged."""

    type: Literal["multi_hot"] = "multi_hot"
    dim: Annotated[int, Field(ge=1)] = 16
    """Width of the embedding."""
    separator: str = "|"
    """Separates the values in a text column; a list column is taken as it is."""
    max_values: Annotated[int, Field(ge=1)] = 100_000
    """The most frequent values kept; all others share the unknown row."""
    max_length: Annotated[int, Field(ge=1)] = 32
    """The most values kept for one row."""


class NumericFeature(_ColumnFeature):
    """A number, standardised with its table's mean and deviation; a missing value is 0 with a flag of 1."""

    type: Literal["numeric"] = "numeric"
    transform: Literal["none", "log1p"] = "none"
    """Applied before standardising."""


class TextFeature(_ColumnFeature):
    """Words and character n-grams hashed into buckets, embedded and averaged; nothing is downloaded."""

    type: Literal["text"] = "text"
    dim: Annotated[int, Field(ge=1)] = 32
    """Width of the embedding."""
    buckets: Annotated[int, Field(ge=2)] = 16_384
    """Rows of the embedding table."""
    ngram: Annotated[int, Field(ge=1)] = 4
    """Length of the character n-grams taken beside whole words."""
    max_length: Annotated[int, Field(ge=1)] = 64
    """The most hashed pieces kept for one row."""


class VectorFeature(_ColumnFeature):
    """A precomputed vector of fixed width, taken as it is."""

    type: Literal["vector"] = "vector"
    dim: Annotated[int, Field(ge=1)]
    """Width of the vector in the column."""


class TransformerSpec(BaseModel):
    """A causal transformer over the items of a history, with learned positions."""

    model_config = STRICT

    blocks: Annotated[int, Field(ge=1, le=32)] = 2
    """Blocks of attention and a feed-forward layer."""
    heads: Annotated[int, Field(ge=1)] = 1
    """Attention heads; must divide the feature's ``dim``."""
    feed_forward: Annotated[int, Field(ge=1, le=16)] = 4
    """Width of the feed-forward layers as a multiple of ``dim``."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Dropout on the embeddings and on what each layer adds."""
    time_gaps: bool = False
    """Read how long before an item the one before it came, by powers of two of seconds; needs times."""


class HistoryFeature(_Feature):
    """Item id embeddings of the user's latest items before the query's time, pooled or encoded.

    Of items that training did not know, vectors made from their features are read.
    """

    type: Literal["history"] = "history"
    max_length: Annotated[int, Field(ge=1)] = 50
    """The latest items kept."""
    dim: Annotated[int, Field(ge=1)] = 64
    """Width of the embedding; with ``share: true`` it must be that of the item id feature."""
    share: bool = True
    """Use the item tower's id embedding table (true) or a table of its own (false)."""
    pooling: Literal["auto", "mean", "weighted", "recency", "attention", "transformer"] = "auto"
    """Mean; mean weighted by interaction weight; or by ``decay ** (steps before the latest)``; mean with
    learned weights of items and of steps before the latest; or a causal transformer's output at the latest
    item. auto is recency for data with times, and mean without."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Weight of an item relative to the next later one, for ``recency``, and for ``attention`` at first."""
    transformer: TransformerSpec = TransformerSpec()
    """Sizes of the transformer."""
    item_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of a training query's items that are left out of it, drawn anew in each step, so that histories
    are not learned by heart; a mean's weights go to those that stay, an encoder reads zeros instead. 0.5 for
    means and 0 for encoders, which have dropout of their own, when not given."""

    def fitted(self, has_times: bool) -> Self:
        """Return the declaration for data with or without times."""
        if self.pooling != "auto":
            return self
        return self.model_copy(update={"pooling": "recency" if has_times else "mean"})

    @property
    def left_out(self) -> float:
        """Share of a training query's items that are left out of it."""
        if self.item_dropout is None:
            return 0.0 if self.encoded else 0.5
        return self.item_dropout

    @property
    def encoded(self) -> bool:
        """Whether its items are read as a sequence, by an encoder with weights of its own."""
        return self.pooling in ("attention", "transformer")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pooling == "transformer" and self.dim % self.transformer.heads:
            raise ValueError(
                f"history feature {self.name!r} has dim {self.dim}, which its {self.transformer.heads} "
                "attention heads do not divide; change dim or transformer.heads"
            )
        return self


class ProfileFeature(_Feature):
    """sum(w x) / max(count, 1) of an item feature x over the history, w clipped to [0, 1]."""

    type: Literal["profile"] = "profile"
    of: str
    """Name of the categorical, multi_hot, numeric or vector item feature that is averaged."""
    max_length: Annotated[int, Field(ge=1)] = 50
    """The latest items kept."""


QueryFeature = Annotated[
    IdFeature
    | CategoricalFeature
    | MultiHotFeature
    | NumericFeature
    | TextFeature
    | VectorFeature
    | HistoryFeature
    | ProfileFeature,
    Field(discriminator="type"),
]
ItemFeature = Annotated[
    IdFeature | CategoricalFeature | MultiHotFeature | NumericFeature | TextFeature | VectorFeature,
    Field(discriminator="type"),
]


def residual_feature(features: Sequence[QueryFeature]) -> HistoryFeature | IdFeature | None:
    """Return the feature that ``residual: id`` adds: the first history, else the id, else none."""
    for kind in (HistoryFeature, IdFeature):
        for feature in features:
            if isinstance(feature, kind):
                return feature
    return None


class FittedFeature(BaseModel):
    """A declared feature with what ``prepare`` learned of it from the item or user table."""

    model_config = STRICT

    spec: QueryFeature
    """The declaration."""
    values: list[str] | None = None
    """Vocabulary of a categorical or multi_hot feature; value i has embedding row i + 1."""
    mean: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """Mean of a numeric feature after its transform, missing values left out."""
    std: Annotated[float, Field(allow_inf_nan=False, gt=0)] = 1.0
    """Standard deviation of a numeric feature after its transform; 1 where it would be 0."""

    @property
    def profile_width(self) -> int:
        """Width of the profile of an item feature."""
        if isinstance(self.spec, NumericFeature):
            return 1
        return self.spec.dim if isinstance(self.spec, VectorFeature) else len(self.values or []) + 1


_Number = Annotated[int, Field(ge=0, lt=1 << 40)]


class FeatureSchema(BaseModel):
    """All features of both towers, fitted. Its JSON is stored in datasets, checkpoints and generations."""

    model_config = STRICT

    query: list[FittedFeature]
    """Features of the query tower, in the order of its input."""
    item: list[FittedFeature]
    """Features of the item tower, in the order of its input."""
    num_users: _Number
    """Users in the vocabulary; a user's embedding row is its user_row + 1."""
    num_items: _Number
    """Items in the vocabulary, catalogue first, then others of interactions; embedding row = item_row + 1."""
    num_catalogue_items: _Number
    """Items that are indexed and recommended: item rows 0 to num_catalogue_items - 1."""

    @property
    def max_history(self) -> int:
        """Longest history that any query feature looks at."""
        lengths = [
            f.spec.max_length for f in self.query if isinstance(f.spec, (HistoryFeature, ProfileFeature))
        ]
        return max(lengths, default=0)

    @property
    def max_pooled_history(self) -> int:
        """Longest history that any query feature looks at other than as a sequence."""
        specs = [f.spec for f in self.query]
        lengths = [
            s.max_length
            for s in specs
            if isinstance(s, ProfileFeature) or (isinstance(s, HistoryFeature) and not s.encoded)
        ]
        return max(lengths, default=0)

    @property
    def new_items_by_features(self) -> bool:
        """Whether catalogue items that no example has are read as the unknown id and their features.

        Where they are nothing but ids, ids share hashed rows, or the unknown id is not trained, each keeps
        the row of its own id.
        """
        ids = [f.spec for f in self.item if isinstance(f.spec, IdFeature)]
        return len(self.item) > len(ids) == 1 and ids[0].buckets is None and ids[0].unknown_rate > 0

    @property
    def time_gaps(self) -> bool:
        """Whether a feature reads the times of a history."""
        specs = [f.spec for f in self.query]
        return any(
            isinstance(s, HistoryFeature) and s.pooling == "transformer" and s.transformer.time_gaps
            for s in specs
        )

    @property
    def sequence_length(self) -> int:
        """Longest history that is read as a sequence; 0 where none is."""
        specs = [f.spec for f in self.query]
        lengths = [s.max_length for s in specs if isinstance(s, HistoryFeature) and s.encoded]
        return max(lengths, default=0)

    @property
    def item_columns(self) -> list[str]:
        """Columns of the item table that item features are read from, each once."""
        specs = (f.spec for f in self.item)
        return list(dict.fromkeys(s.source_column for s in specs if isinstance(s, _ColumnFeature)))

    def to_json(self) -> dict[str, Any]:
        """Return the schema as plain JSON values."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> FeatureSchema:
        """Return the schema that ``to_json`` wrote."""
        return cls.model_validate(value)

    @classmethod
    def parse(cls, data: bytes, place: str, remedy: str) -> FeatureSchema:
        """Return the schema in the bytes of a file.

        Args:
            data: the bytes.
            place: they are from, for the error.
            remedy: what to do where they are damaged, a sentence.

        Raises:
            ArtefactError: they hold none.
        """
        schema: FeatureSchema = check_shape(parse_json(data, place, remedy), cls, place, remedy)
        return schema
