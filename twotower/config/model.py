"""Sections of the model: features, towers, training."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from twotower.config.section import PositiveInt, Section
from twotower.schema import HistoryFeature, IdFeature, ItemFeature, ProfileFeature, QueryFeature


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
        items = {f.name: f for f in self.item}
        item_ids = [f for f in self.item if isinstance(f, IdFeature)]
        if len(item_ids) > 1 or sum(isinstance(f, IdFeature) for f in self.query) > 1:
            raise ValueError("a side has at most one feature of type id")
        for f in self.query:
            if isinstance(f, HistoryFeature) and f.share:
                if not item_ids:
                    raise ValueError(
                        f"history feature {f.name!r} shares the item id table, but features.item has no "
                        "feature of type id; add one or set share: false"
                    )
                if item_ids[0].dim != f.dim:
                    raise ValueError(
                        f"history feature {f.name!r} has dim {f.dim} and shares the item id table of dim "
                        f"{item_ids[0].dim}; give both the same dim or set share: false"
                    )
            if isinstance(f, ProfileFeature):
                target = items.get(f.of)
                allowed = ("categorical", "multi_hot", "numeric", "vector")
                if target is None or target.type not in allowed:
                    raise ValueError(
                        f"profile feature {f.name!r} is of {f.of!r}, which is no item feature of type "
                        f"{', '.join(allowed)}"
                    )
        return self


class TowerConfig(Section):
    """The multi-layer perceptron over a side's concatenated features."""

    hidden: list[PositiveInt] = [128]
    """Widths of the hidden layers; an empty list leaves one linear layer."""
    activation: Literal["relu", "gelu", "silu", "leaky_relu", "tanh"] = "gelu"
    """Activation after each hidden layer."""
    norm: Literal["none", "layer", "batch"] = "layer"
    """Normalisation before each activation; batch needs ``train.num_workers: 1``."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout after each activation."""
    input_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the concatenated features."""
    residual: Literal["none", "linear", "id"] = "none"
    """Added to the output: nothing, a linear map of the input, or the embedding of the id feature (on the
    query side the history's where there is one) times a learned number; it must be ``embedding_dim`` wide."""


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


class LossConfig(Section):
    """In-batch softmax over the global batch."""

    temperature: Annotated[float, Field(gt=0)] = 0.07
    """Initial temperature; divides the scores."""
    learn_temperature: bool = True
    """Learn the temperature."""
    min_temperature: Annotated[float, Field(gt=0)] = 0.01
    """Floor of the learned temperature."""
    log_q: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Strength of the logQ correction: 1 is the full one, 0 is off."""
    mask_accidental_hits: bool = True
    """Leave out in-batch negatives that are the positive item itself."""
    mask_known_positives: bool = True
    """Leave out in-batch negatives that the user has interacted with elsewhere in the fitted data."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_temperature > self.temperature:
            raise ValueError(
                f"min_temperature ({self.min_temperature}) is above temperature ({self.temperature}); "
                "lower it"
            )
        return self


class OptimizerConfig(Section):
    """AdamW for the towers, a row-wise optimiser for embedding tables."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate of the towers and the temperature."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Decoupled weight decay of the towers."""
    table_kind: Literal["lazy_adam", "rowwise_adagrad"] = "lazy_adam"
    """Optimiser of embedding rows; only the rows of a batch are touched."""
    table_learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    """Peak learning rate of embedding rows."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rates after warm-up, down to 0 for linear and cosine."""
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of all steps in which learning rates rise from 0."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the towers' gradient; larger ones are scaled down."""


class ValidationConfig(Section):
    """The measurement after each epoch that picks the best checkpoint."""

    k: PositiveInt = 100
    """k of recall@k and ndcg@k."""
    metric: Literal["recall", "ndcg"] = "recall"
    """Which of the two picks the best epoch."""
    max_users: PositiveInt = 5_000
    """Users measured, drawn once; fewer where there are fewer."""


class TrainConfig(Section):
    """Training."""

    epochs: PositiveInt = 10
    """Passes over the training interactions."""
    global_batch_size: PositiveInt = 1024
    """Pairs of an optimiser step, over all workers; every other candidate in it is a negative."""
    num_workers: PositiveInt = 2
    """Ray Train workers; must divide the global batch size."""
    threads_per_worker: PositiveInt = 1
    """CPU threads of a worker."""
    fit: Literal["train", "all"] = "all"
    """The published model is fitted on the train split, or on everything for the best number of epochs."""
    loss: LossConfig = LossConfig()
    """The loss."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimisers."""
    validation: ValidationConfig = ValidationConfig()
    """Validation after each epoch."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Worker failures after which training gives up; each restarts from the last checkpoint."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        batch, workers = self.global_batch_size, self.num_workers
        if batch % workers:
            lower, upper = batch - batch % workers, batch - batch % workers + workers
            fix = f"{lower} or {upper}" if lower else f"{upper}"
            raise ValueError(
                f"global_batch_size ({batch}) must be divisible by num_workers ({workers}); use {fix}"
            )
        return self
