"""The configuration: strict models, one YAML file, dotted overrides.

Every field's docstring is its help text. Unknown keys are refused with the nearest valid name.
"""

from __future__ import annotations

import copy
import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from twotower.errors import ConfigError
from twotower.schema import (
    STRICT,
    HistoryFeature,
    IdFeature,
    ItemFeature,
    ProfileFeature,
    QueryFeature,
    VectorFeature,
    residual_feature,
)

MovieLensName = Literal[
    "ml-100k", "ml-1m", "ml-10m", "ml-20m", "ml-25m", "ml-32m", "ml-latest-small", "ml-latest"
]
PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """A part of the configuration."""

    model_config = STRICT


class StorageConfig(Section):
    """Where artefacts live."""

    root: str = "runs"
    """Folder of all artefacts of this configuration; relative to the working directory, absolute on a remote cluster."""

    @property
    def path(self) -> Path:
        """The absolute root."""
        return Path(self.root).expanduser().absolute()


class MovieLensSource(Section):
    """A MovieLens data set, downloaded from GroupLens."""

    kind: Literal["movielens"]
    name: MovieLensName = "ml-latest-small"
    """Official name."""


class ColumnsConfig(Section):
    """Names of the columns of your interactions."""

    user: str = "user_id"
    """Column of the user's id (text or integer)."""
    item: str = "item_id"
    """Column of the item's id (text or integer)."""
    time: str | None = None
    """Column of the time: a timestamp, ISO 8601 text, or a number with ``time_unit``."""
    time_unit: Literal["s", "ms", "us", "ns"] | None = None
    """Unit of a numeric time column."""
    value: str | None = None
    """Column of a rating or another strength."""
    event: str | None = None
    """Column of the event type; ``events`` says what each type means."""
    split: str | None = None
    """Column with train, validation or test, for ``split.kind: given``."""


class TableConfig(Section):
    """An item or user table; its other columns are there for features."""

    path: str
    """A CSV or Parquet file, a folder of them, or a glob."""
    id: str
    """Column of the id."""
    title: str | None = None
    """Column of a title for people to read (item table)."""


class FilesSource(Section):
    """Your own CSV or Parquet files."""

    kind: Literal["files"]
    interactions: str
    """A CSV or Parquet file, a folder of them, or a glob, read in the order of their names."""
    columns: ColumnsConfig = ColumnsConfig()
    """Names of the interaction columns."""
    events: dict[str, float | Literal["negative", "seen_only"]] = {}
    """Per event type its weight, or ``negative``, or ``seen_only``; a type not listed is a bad row."""
    items: TableConfig | None = None
    """The item table; without one the catalogue is every item in the interactions."""
    users: TableConfig | None = None
    """The user table."""


class LightGCNSource(Section):
    """The LightGCN text format: ``train.txt`` and ``test.txt``, a user and then his items on each line."""

    kind: Literal["lightgcn"]
    path: str
    """Folder, or zip file, that holds ``train.txt`` and ``test.txt``."""


class GeneratedSource(Section):
    """A catalogue and interactions drawn from planted tastes; the true scores are known."""

    kind: Literal["generated"]
    num_users: PositiveInt = 2_000
    """Users to draw."""
    num_items: Annotated[int, Field(ge=50)] = 1_500
    """Catalogue size."""
    num_interactions: PositiveInt = 100_000
    """Interactions to draw; repeats of a user and item are left out, so a few fewer come out."""
    num_tastes: Annotated[int, Field(ge=2)] = 24
    """Planted tastes; every item belongs to one, every user likes a few."""
    popularity_exponent: Annotated[float, Field(ge=0)] = 0.8
    """Zipf exponent of item popularity inside a taste; 0 is uniform."""
    seed: int = 7
    """Seed of the generator."""


Source = Annotated[
    MovieLensSource | FilesSource | LightGCNSource | GeneratedSource, Field(discriminator="kind")
]


class PositivesConfig(Section):
    """Which interactions are positive, and with what weight."""

    min_value: float | None = None
    """Interactions with a smaller value are negatives; all are positive when not given."""
    weight: Literal["one", "value", "scaled"] = "one"
    """1; the value; or clip((value - min) / (max - min), 0, 1) over ``value_range``."""
    value_range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """Smallest and largest value of the scale; MovieLens declares its own."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.value_range is not None and self.value_range[0] >= self.value_range[1]:
            raise ValueError(f"value_range {self.value_range} must be [smallest, largest]")
        return self


class WindowConfig(Section):
    """Interactions outside the window are left out."""

    start: str | None = None
    """ISO 8601 time; interactions before it are left out."""
    end: str | None = None
    """ISO 8601 time; interactions at or after it are left out."""


class MinInteractionsConfig(Section):
    """Users and items with fewer interactions are left out, again and again until none has fewer."""

    user: Annotated[int, Field(ge=0)] = 0
    """Fewest interactions of a user."""
    item: Annotated[int, Field(ge=0)] = 0
    """Fewest interactions of an item."""


class DataConfig(Section):
    """Raw data and the rules for reading it."""

    source: Source = GeneratedSource(kind="generated")
    """Where the data comes from."""
    mirror: str | None = None
    """Folder or URL that stands in for the official download address; TWOTOWER_MIRROR when not given."""
    cache: str = "~/.cache/twotower"
    """Folder of downloads."""
    timezone: str = "UTC"
    """Zone of times that name none."""
    on_bad_rows: Literal["error", "drop"] = "error"
    """What to do with rows that can not be read; both count them and show examples."""
    repeats: Literal["first", "last", "sum", "keep"] = "last"
    """What to do with several interactions of one user and item: keep one, add up the weights in the last, or keep all."""
    window: WindowConfig = WindowConfig()
    """Time window."""
    min_interactions: MinInteractionsConfig = MinInteractionsConfig()
    """Smallest users and items."""
    positives: PositivesConfig = PositivesConfig()
    """Which interactions are positive."""


class SplitConfig(Section):
    """How interactions are held out for test and validation."""

    kind: Literal["temporal_user", "temporal_global", "leave_one_out", "random", "given"] = "temporal_user"
    """The last of each user; everything after one moment; the last one of each user; at random; or as the data says."""
    test_share: Share = 0.2
    """Share of test; per user it is ceil(share x n)."""
    validation_share: Share = 0.1
    """Share of the rest that validates (the last part of train)."""


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
    """Added to the output: nothing; a linear map of the input; or the embedding of the id feature (the history
    on the query side where there is one), scaled by a learned number. ``id`` needs that feature to be
    ``embedding_dim`` wide."""


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
                f"min_temperature ({self.min_temperature}) is above temperature ({self.temperature}); lower it"
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
    """What the published model is fitted on: the train split, or every interaction for the best number of epochs."""
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


class IndexConfig(Section):
    """The FAISS index of the catalogue."""

    factory: str = "Flat"
    """FAISS index factory string of each shard, such as Flat, HNSW32 or IVF256,SQ8."""
    num_shards: PositiveInt = 2
    """Shards; an item's shard is a stable hash of its id."""
    target_index_recall: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Smallest share of the exact top k that the index must find; below it publishing is refused."""
    recall_k: PositiveInt = 100
    """k of that measurement."""
    num_recall_queries: PositiveInt = 256
    """Real queries of that measurement."""


class EvaluationConfig(Section):
    """The final evaluation on the test split."""

    ks: Annotated[list[PositiveInt], Field(min_length=1)] = [10, 20, 100]
    """Cut-offs of the metrics."""
    max_users: PositiveInt = 1_000_000
    """Test users measured, drawn once; all where there are fewer."""
    latency_requests: PositiveInt = 1_000
    """Single requests timed for the latency histogram."""
    map_items: Annotated[int, Field(ge=10)] = 2_000
    """Most popular items drawn in the t-SNE map."""


class RecommendConfig(Section):
    """Offline top k for every user."""

    k: PositiveInt = 100
    """Items for each user."""
    exclude_seen: bool = True
    """Leave out what the user has already had."""


class ServeConfig(Section):
    """The HTTP service."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on."""
    num_replicas: PositiveInt = 1
    """Replicas of the fused deployment."""
    cpus_per_replica: Annotated[float, Field(gt=0)] = 0.25
    """Logical CPUs that Ray reserves for a replica."""
    threads: PositiveInt = 1
    """Threads of the query tower and of a search."""
    max_k: PositiveInt = 1_000
    """Largest k of a request."""


class ClusterConfig(Section):
    """What each kind of Ray worker reserves."""

    local_num_cpus: PositiveInt = 4
    """Logical CPUs of the Ray that a job starts where there is no cluster."""
    use_gpu: Literal["auto", "yes", "no"] = "auto"
    """GPUs for training and encoding: auto takes them where the cluster has them."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    """Logical CPUs of a training worker."""
    num_encoders: PositiveInt = 2
    """Actors that encode the catalogue, rank users or recommend."""
    cpus_per_encoder: Annotated[float, Field(gt=0)] = 0.5
    """Logical CPUs of such an actor."""
    encode_batch_size: PositiveInt = 8_192
    """Rows that an actor takes at once."""
    cpus_per_reader: Annotated[float, Field(gt=0)] = 0.25
    """Logical CPUs of a task that reads files."""


class Config(Section):
    """Everything a pipeline needs to know."""

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
        if "batch" in norms and self.train.num_workers > 1:
            raise ValueError(
                f"norm: batch needs train.num_workers: 1 (it is {self.train.num_workers}), since statistics of "
                "a worker's share of the batch change the model with the number of workers; use norm: layer"
            )
        if self.split.kind == "given" and isinstance(self.data.source, FilesSource):
            if self.data.source.columns.split is None:
                raise ValueError("split.kind: given needs data.source.columns.split, the column that says so")
        self._check_residual("query", self.model.query_tower)
        self._check_residual("item", self.model.item_tower)
        timeless = isinstance(self.data.source, LightGCNSource) or (
            isinstance(self.data.source, FilesSource) and self.data.source.columns.time is None
        )
        if timeless and self.split.kind in ("temporal_user", "temporal_global", "leave_one_out"):
            raise ValueError(
                f"split.kind: {self.split.kind} needs times, and the source has none; use random or given"
            )
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
                f"model.{side}_tower.residual: id needs feature {feature.name!r} (dim {feature.dim}) to be as wide as "
                f"model.embedding_dim ({self.model.embedding_dim}); make them equal or use linear"
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
        """Folder of generations and pointers."""
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


def load_config(path: Path | str | None = None, overrides: list[str] | None = None) -> Config:
    """Return the configuration of a YAML file with ``a.b=value`` overrides, each value read as YAML.

    Raises:
        ConfigError: the file is not there or not YAML, or a key or value is not allowed.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text())
        except FileNotFoundError:
            raise ConfigError(f"config file {path} does not exist") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"config file {path} is not YAML: {error}") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(
                f"config file {path} holds a {type(loaded).__name__}; it must hold keys and values"
            )
        values = loaded or {}
    for override in overrides or []:
        _apply(values, override)
    return parse_config(values)


def parse_config(values: dict[str, Any]) -> Config:
    """Return the configuration of plain values.

    Raises:
        ConfigError: a key or value is not allowed; the message lists each with the remedy.
    """
    try:
        return Config.model_validate(copy.deepcopy(values))
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors()]
        raise ConfigError("the configuration is not valid:\n  " + "\n  ".join(lines)) from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r} must have the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of --set {override!r} is not YAML: {error}") from None
    *parents, last = key.split(".")
    node: Any = values
    for part in parents:
        node = _child(node, part, override, create=True)
    if isinstance(node, list):
        node[_position(node, last, override)] = value
    else:
        node[last] = value


def _child(node: Any, part: str, override: str, create: bool) -> Any:
    if isinstance(node, list):
        return node[_position(node, part, override)]
    child = node.get(part)
    if child is None and create:
        child = node[part] = {}
    if not isinstance(child, (dict, list)):
        raise ConfigError(f"--set {override!r}: {part!r} is the value {child!r}, it has no keys below it")
    return child


def _position(node: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"--set {override!r}: {part!r} is not a position in a list of {len(node)}")
    return int(part)


def _explain(error: Any) -> str:
    # pydantic puts the tag of a union into the location; it is no key that a person wrote.
    tags = {"movielens", "files", "lightgcn", "generated"}
    location = [str(p) for p in error["loc"] if str(p) not in tags]
    where = ".".join(location) or "config"
    if error["type"] == "extra_forbidden":
        known = _fields_at(error["loc"][:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(sorted(known))}"
        return f"{where}: there is no such key; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], (str, int, float, bool)) or error["input"] is None:
        return f"{where}: {message} (got {error['input']!r})"
    return f"{where}: {message}"


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    model: Any = Config
    for part in location:
        model = _step(model, part)
    models = [m for m in _members(model) if isinstance(m, type) and issubclass(m, BaseModel)]
    return [name for m in models for name in m.model_fields]


def _step(model: Any, part: Any) -> Any:
    if isinstance(part, int):
        return next((a for m in _members(model) for a in getattr(m, "__args__", ())), model)
    for member in _members(model):
        if isinstance(member, type) and issubclass(member, BaseModel):
            if part in member.model_fields:
                return member.model_fields[part].annotation
            kind = member.model_fields.get("kind") or member.model_fields.get("type")
            if kind is not None and part in getattr(kind.annotation, "__args__", ()):
                return member
    return model


def _members(model: Any) -> list[Any]:
    """The alternatives of a union (through Annotated), or the type itself."""
    if hasattr(model, "__metadata__"):
        return _members(model.__origin__)
    if (
        hasattr(model, "__args__")
        and not isinstance(model, type)
        and getattr(model, "__origin__", None) is not list
    ):
        return [m for a in model.__args__ for m in _members(a)]
    return [model]


__all__ = [name for name in list(globals()) if name.endswith(("Config", "Source"))] + [
    "Section",
    "VectorFeature",
    "load_config",
    "parse_config",
]
