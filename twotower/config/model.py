"""Sections of the model: features and towers."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from twotower.config.section import PositiveInt, Section
from twotower.features import FEATURES
from twotower.schema import HistoryFeature, IdFeature, ItemFeature, QueryFeature, ids_among


@FEATURES.model
class FeaturesConfig(Section):
    """Features of the two towers."""

    query: list[QueryFeature] = [HistoryFeature(name="history")]
    """Features of the query tower."""
    item: list[ItemFeature] = [IdFeature(name="item_id")]
    """Features of the item tower."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for side, features in (("query", self.query), ("item", self.item)):
            if not features:
                raise ValueError(f"features.{side} is empty; declare at least one feature")
            names = [f.name for f in features]
            repeated = sorted({n for n in names if names.count(n) > 1})
            if repeated:
                raise ValueError(f"features.{side} declares {repeated} more than once")
        if len(ids_among(self.item)) > 1 or len(ids_among(self.query)) > 1:
            raise ValueError("a side has at most one feature of type id")
        encoded = [f for f in self.query if f.sequence_length]
        for one in encoded:
            if one.sequence_length != encoded[0].sequence_length:
                raise ValueError(
                    f"history features {encoded[0].name!r} and {one.name!r} are read as sequences of "
                    f"max_length {encoded[0].sequence_length} and {one.sequence_length}; give all such the "
                    "same one"
                )
        for feature in (*self.query, *self.item):
            feature.check_with(self.query, self.item)
        return self


class TowerConfig(Section):
    """The multi-layer perceptron over a side's concatenated features."""

    hidden: list[PositiveInt] = [128]
    """Widths of the hidden layers; an empty list leaves one linear layer."""
    activation: Literal["relu", "gelu", "silu", "leaky_relu", "tanh"] = "gelu"
    """Activation after each hidden layer."""
    norm: Literal["none", "layer", "batch"] = "none"
    """Normalisation before each activation; batch takes its statistics over the global batch, and is refused
    with ``train.tower_chunk_size``."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout after each activation."""
    input_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the concatenated features."""
    residual: Literal["auto", "none", "linear", "id"] = "auto"
    """Added to the output: nothing, a linear map of the input, or the embedding of the id feature (on the
    query side the history's where there is one) times a learned number; it must be ``embedding_dim`` wide.
    auto is id where there is such a feature of that width, and none elsewhere."""


class ModelConfig(Section):
    """The two towers."""

    embedding_dim: PositiveInt = 64
    """Width of query and candidate embeddings."""
    query_tower: TowerConfig = TowerConfig()
    """The query tower."""
    item_tower: TowerConfig = TowerConfig()
    """The item tower."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of fresh embedding tables."""
    normalize: bool = True
    """Scale embeddings to length 1, so that scores are cosines; without it scores are inner products."""
    item_bias: bool = False
    """Make the last coordinate of an item's embedding a number that is added to all its scores, as the biases
    of matrix factorisation are; that of every query is 1. ``normalize`` scales the others."""
    table_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type that embedding tables are held in; updates are computed in float32."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.item_bias and self.embedding_dim == 1:
            raise ValueError(
                "model.item_bias takes the last coordinate, and embedding_dim (1) leaves no other; raise it"
            )
        return self
