"""The whole configuration: every section, and the rules between them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from twotower.config.data import SOURCES, DataConfig
from twotower.config.evaluation import BASELINES, EvaluationConfig
from twotower.config.index_kinds import INDEX_KINDS
from twotower.config.losses import LOSSES
from twotower.config.model import FeaturesConfig, ModelConfig, TowerConfig
from twotower.config.section import Section
from twotower.config.service import (
    ClusterConfig,
    IndexConfig,
    RecommendConfig,
    ServeConfig,
    StorageConfig,
)
from twotower.config.splits import SPLIT_KINDS, SplitConfig
from twotower.config.training import TrainConfig
from twotower.config.tune import TuneConfig
from twotower.features import FEATURES
from twotower.redaction import redacted_values
from twotower.schema import residual_feature


@FEATURES.model
@LOSSES.model
@SPLIT_KINDS.model
@SOURCES.model
@INDEX_KINDS.model
@BASELINES.model
class Config(Section):
    """Everything a pipeline needs to know: sections, of which each value has a default; none can be changed.

    ``configure`` and ``load_config`` make one, with errors that name the key and the remedy. Widths are in
    numbers of components, shares in (0, 1), and what has a unit has it in its name, such as ``timeout_s``.

    Example:
        >>> config = tt.Config(name="shop")
        >>> config.train.epochs > 0, config.store.parts[-2:]
        (True, ('shop', 'store'))
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "twotower"
    """Name of the scenario; its artefacts are in ``storage.root/name``."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    """Seed of everything random; same seed, data and workers on CPU give the same checkpoint."""
    storage: StorageConfig = StorageConfig()
    """Where artefacts live."""
    data: DataConfig = DataConfig()
    """Raw data."""
    split: SplitConfig = SplitConfig()
    """Held-out data."""
    features: FeaturesConfig = FeaturesConfig()
    """Features of the towers."""
    model: ModelConfig = ModelConfig()
    """The towers."""
    train: TrainConfig = TrainConfig()
    """Training."""
    tune: TuneConfig = TuneConfig()
    """Sweeps."""
    index: IndexConfig = IndexConfig()
    """The index."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation."""
    recommend: RecommendConfig = RecommendConfig()
    """Offline top k."""
    serve: ServeConfig = ServeConfig()
    """The service."""
    cluster: ClusterConfig = ClusterConfig()
    """Resources on Ray."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        norms = {self.model.query_tower.norm, self.model.item_tower.norm}
        if "batch" in norms and self.train.tower_chunk_size is not None:
            raise ValueError(
                "norm: batch takes statistics over the whole batch, so it can not work with "
                f"train.tower_chunk_size ({self.train.tower_chunk_size}); use norm: layer, or "
                "train.tower_chunk_size: null"
            )
        if self.train.ingest == "stream" and self.train.negatives.mined.per_query:
            raise ValueError(
                f"train.negatives.mined.per_query ({self.train.negatives.mined.per_query}) needs the "
                "interactions in memory, and train.ingest is stream; use ingest: memory, or per_query: 0"
            )
        if not self.train.loss.settings.bounded and not self.model.normalize:
            raise ValueError(
                f"train.loss.kind: {self.train.loss.kind} falls without end as scores grow, so it needs unit "
                "vectors; use model.normalize: true, or another kind"
            )
        if self.model.item_bias and not self.train.loss.settings.bounded:
            raise ValueError(
                f"train.loss.kind: {self.train.loss.kind} falls without end as scores grow, and "
                "model.item_bias has no limit; use item_bias: false, or another kind"
            )
        source = self.data.source
        kind = SPLIT_KINDS[self.split.kind]
        if kind.needs_given and source.without_split:
            raise ValueError(
                f"split.kind: {self.split.kind} needs data.source.columns.split, the column that says so"
            )
        self._check_residual("query", self.model.query_tower)
        self._check_residual("item", self.model.item_tower)
        if source.timeless and kind.needs_times:
            raise ValueError(self.split.needs_times_message())
        return self

    def _check_residual(self, side: Literal["query", "item"], tower: TowerConfig) -> None:
        if tower.residual != "id":
            return
        features = self.features.query if side == "query" else self.features.item
        feature = residual_feature(features)
        if feature is None:
            raise ValueError(
                f"model.{side}_tower.residual: id needs an id or history feature in features.{side}; "
                "add one or use linear"
            )
        if feature.dim != self.model.embedding_dim:
            raise ValueError(
                f"model.{side}_tower.residual: id needs feature {feature.name!r} (dim {feature.dim}) to be "
                f"as wide as model.embedding_dim ({self.model.embedding_dim}); make them equal or use linear"
            )

    @property
    def home(self) -> Path:
        """Folder of all artefacts of this configuration."""
        return self.storage.path / self.name

    @property
    def datasets(self) -> Path:
        """Folder of prepared datasets."""
        return self.home / "datasets"

    @property
    def checkpoints(self) -> Path:
        """Folder of trained checkpoints."""
        return self.home / "checkpoints"

    @property
    def store(self) -> Path:
        """Folder of generations and pointers; with ``storage.store`` a cache of what is there."""
        return self.home / "store"

    @property
    def reports(self) -> Path:
        """Folder of evaluation reports."""
        return self.home / "reports"

    @property
    def recommendations(self) -> Path:
        """Folder of offline top k."""
        return self.home / "recommendations"

    @property
    def mirror(self) -> str | None:
        """Stand-in for the official download address, from the config or TWOTOWER_MIRROR."""
        return self.data.mirror or os.environ.get("TWOTOWER_MIRROR") or None

    def to_json(self) -> dict[str, Any]:
        """Return the resolved configuration as plain JSON values."""
        return self.model_dump(mode="json")

    def to_stored(self) -> dict[str, Any]:
        """Return the same to be kept beside an artefact: without the passwords and tokens in it."""
        values: dict[str, Any] = redacted_values(self.to_json())
        return values
