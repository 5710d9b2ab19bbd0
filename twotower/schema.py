"""Feature declarations, and the fitted feature schema that travels inside every artefact.

A feature is declared once, in the config. ``prepare`` fits what a declaration leaves open (vocabularies,
means) and stores the result as a :class:`FeatureSchema`; training, encoding and serving read that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer

from twotower.features import FEATURES
from twotower.features.base import STRICT as STRICT
from twotower.features.base import UNKNOWN_ROW as UNKNOWN_ROW
from twotower.features.base import Feature, Side
from twotower.features.categorical import CategoricalFeature as CategoricalFeature
from twotower.features.history import HistoryFeature as HistoryFeature
from twotower.features.history import TransformerSpec as TransformerSpec
from twotower.features.ids import IdFeature as IdFeature
from twotower.features.multi_hot import MultiHotFeature as MultiHotFeature
from twotower.features.numeric import NumericFeature as NumericFeature
from twotower.features.profile import MAX_PROFILE_WIDTH as MAX_PROFILE_WIDTH
from twotower.features.profile import ProfileFeature as ProfileFeature
from twotower.features.text import TextFeature as TextFeature
from twotower.features.vector import VectorFeature as VectorFeature
from twotower.jsonfiles import check_shape, parse_json
from twotower.registry import ModelIn

Kind = Literal["positive", "negative", "seen_only"]
KINDS: dict[Kind, int] = {"positive": 0, "negative": 1, "seen_only": 2}
"""Code of each kind of interaction in the ``kind`` column (int8) of a prepared dataset."""

SplitName = Literal["train", "validation", "test"]
SPLITS: dict[SplitName, int] = {"train": 0, "validation": 1, "test": 2}
"""Code of each split in the ``split`` column (int8) of a prepared dataset."""

MAX_WEIGHT = 1e15
"""Largest weight of an interaction, in the data or in a request: sums and squares are 32-bit floats."""

QueryFeature = Annotated[Feature, ModelIn(FEATURES, "type")]
"""A declared feature of the query side, of any type."""
ItemFeature = Annotated[Feature, ModelIn(FEATURES, "type", lambda kind: "item" in kind.sides)]
"""A declared feature of the item side."""


def ids_among(features: Sequence[Feature]) -> list[IdFeature]:
    """Return the features that are embeddings of ids."""
    return [f for f in features if isinstance(f, IdFeature)]


def histories_among(features: Sequence[Feature]) -> list[HistoryFeature]:
    """Return the features that read the items of a history."""
    return [f for f in features if isinstance(f, HistoryFeature)]


def profiles_among(features: Sequence[Feature]) -> list[ProfileFeature]:
    """Return the features that average an item feature over a history."""
    return [f for f in features if isinstance(f, ProfileFeature)]


def residual_feature(features: Sequence[Feature]) -> HistoryFeature | IdFeature | None:
    """Return the feature that ``residual: id`` adds: the first history, else the id, else none."""
    found: list[HistoryFeature | IdFeature] = [*histories_among(features), *ids_among(features)]
    return found[0] if found else None


@FEATURES.model
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

    more: dict[str, Any] = {}
    """What else a type learns, as JSON values; not written where there is nothing."""

    @property
    def profile_width(self) -> int:
        """Width of the profile of an item feature."""
        return self.spec.profile_width(self)

    @model_serializer(mode="wrap")
    def _plain(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = plain(self)
        return values if self.more else {name: value for name, value in values.items() if name != "more"}


_Number = Annotated[int, Field(ge=0, lt=1 << 40)]


@FEATURES.model
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

    def features(self, side: Side) -> list[FittedFeature]:
        """Return the features of a tower."""
        return self.query if side == "query" else self.item

    @property
    def item_id(self) -> IdFeature | None:
        """The embedding of item ids, if the item tower reads it."""
        return next(iter(ids_among([f.spec for f in self.item])), None)

    @property
    def histories(self) -> list[HistoryFeature]:
        """Features that read the items of a history."""
        return histories_among([f.spec for f in self.query])

    @property
    def profiles(self) -> list[ProfileFeature]:
        """Features that average an item feature over a history."""
        return profiles_among([f.spec for f in self.query])

    @property
    def max_history(self) -> int:
        """Longest history that any query feature looks at."""
        return max((f.spec.history_length for f in self.query), default=0)

    @property
    def max_pooled_history(self) -> int:
        """Longest history that any query feature looks at other than as a sequence."""
        specs = [f.spec for f in self.query]
        return max((s.history_length for s in specs if not s.sequence_length), default=0)

    @property
    def new_items_by_features(self) -> bool:
        """Whether catalogue items that no example has are read as the unknown id and their features.

        Where they are nothing but ids, ids share hashed rows, or the unknown id is not trained, each keeps
        the row of its own id.
        """
        ids = ids_among([f.spec for f in self.item])
        return len(self.item) > len(ids) == 1 and ids[0].buckets is None and ids[0].unknown_rate > 0

    @property
    def time_gaps(self) -> bool:
        """Whether a feature reads the times of a history."""
        return any(f.spec.time_gaps for f in self.query)

    @property
    def sequence_length(self) -> int:
        """Longest history that is read as a sequence; 0 where none is."""
        return max((f.spec.sequence_length for f in self.query), default=0)

    @property
    def item_columns(self) -> list[str]:
        """Columns of the item table that item features are read from, each once."""
        columns = (f.spec.source_column for f in self.item)
        return list(dict.fromkeys(name for name in columns if name is not None))

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
