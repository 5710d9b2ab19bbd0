"""Sections of training: loss, negatives, optimisers, validation, metrics."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from twotower.config.losses import LOSSES, LossConfig
from twotower.config.section import NonNegativeInt, PositiveInt, Section

_STEPS = 64
_SMALLEST_BATCH, _LARGEST_BATCH = 32, 1_024
"""Of a batch size that follows from the data, which is at most 1 / ``_STEPS`` of it."""


class MinedConfig(Section):
    """Hard negatives mined with the current towers: items that a query ranks high and has not had."""

    per_query: NonNegativeInt = 0
    """Mined items that join each query's negatives; 0 is off."""
    start_epoch: Annotated[int, Field(ge=2)] = 2
    """First epoch (from 1) that trains on mined items."""
    every_epochs: PositiveInt = 1
    """Number of epochs from one mining to the next."""
    every_steps: PositiveInt | None = None
    """Number of steps inside an epoch after which mining is repeated; null: only before epochs."""
    skip: NonNegativeInt = 10
    """Best ranks left out, which hold most false negatives; known positives take no rank."""
    window: PositiveInt = 100
    """Ranks behind those that the items are drawn from."""
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """An item is taken where score <= positive score - margin x |positive score|."""


class NegativesConfig(Section):
    """Negatives beside those of the global batch."""

    uniform: NonNegativeInt = 0
    """Candidates drawn uniformly from the catalogue for each step, shared by all queries."""
    unchosen: Literal["negative", "new"] = "negative"
    """Whether a catalogue item without an example may be a negative, drawn, explicit or mined, so that the
    model learns to leave it out of lists, or is as new as an item that comes after the training."""
    popular: NonNegativeInt = 0
    """Candidates drawn in proportion to popularity for each step, shared by all queries."""
    memory: NonNegativeInt = 0
    """Candidates of the latest steps that are kept as negatives, without gradient (cross-batch memory)."""
    memory_start: NonNegativeInt = 1000
    """Step at which the memory begins to be used; early embeddings move too fast."""
    explicit: NonNegativeInt = 0
    """The user's own latest negative interactions (such as impressions) before the query that join it."""
    mined: MinedConfig = MinedConfig()
    """Mined hard negatives."""
    own_weight: Annotated[float, Field(gt=0)] = 1.0
    """How often an explicit or mined negative counts in its query's softmax: with 1 as often as every other
    item does on average, so that the sum over the catalogue stays unbiased; more makes it harder."""


class EarlyStoppingConfig(Section):
    """Ends a training that no longer improves on validation."""

    patience: PositiveInt | None = 3
    """Epochs without improvement after which training ends; never when null."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Smallest gain of the validation metric that counts as improvement."""


class MlflowConfig(Section):
    """Where MLflow keeps the metrics; needs the extra ``mlflow``."""

    tracking_uri: str
    """Tracking server or folder. A password in its URL is used, and kept in no file beside artefacts."""
    experiment: str = "twotower"
    """Name of the experiment."""


class MetricsConfig(Section):
    """Metrics of a training, in the folder ``logs/ID`` of its checkpoint's ID, always as metrics.jsonl."""

    every_steps: PositiveInt = 20
    """Steps between two lines."""
    tensorboard: bool = True
    """Write TensorBoard events too."""
    mlflow: MlflowConfig | None = None
    """Send them to MLflow too."""


class OptimizerConfig(Section):
    """AdamW for the towers, a row-wise optimiser for embedding tables."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate of the towers, and of the temperature where ``loss`` gives it none of its own."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Decoupled weight decay of the towers."""
    table_kind: Literal["lazy_adam", "rowwise_adagrad"] = "lazy_adam"
    """Optimiser of embedding rows; only the rows of a batch are touched."""
    table_learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    """Peak learning rate of embedding rows."""
    table_weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of embedding rows: a row of a batch shrinks by this times the learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rates after warm-up, down to 0 for linear and cosine."""
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of all steps in which learning rates rise from 0."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the whole gradient, table rows included; a larger one is scaled down."""


class ValidationConfig(Section):
    """The measurement after each epoch that picks the best checkpoint."""

    k: PositiveInt = 100
    """k of recall@k and ndcg@k."""
    metric: Literal["recall", "ndcg"] = "ndcg"
    """Which of the two picks the best epoch; ndcg goes on rising where recall at a large k does no more."""
    max_users: PositiveInt = 5_000
    """Users measured, drawn once; fewer where there are fewer."""


@LOSSES.model
class TrainConfig(Section):
    """Training."""

    epochs: PositiveInt = 10
    """Passes over the training interactions."""
    global_batch_size: PositiveInt | None = None
    """Pairs of an optimiser step, over all workers; every other candidate in it is a negative. When null it
    is 1,024, and for less data the largest power of two up to 1/64 of the train split's positives."""
    num_workers: PositiveInt = 2
    """Ray Train workers; must divide the global batch size."""
    threads_per_worker: PositiveInt = 1
    """CPU threads of a worker."""
    fit: Literal["train", "all"] = "all"
    """The model is fitted on the train split alone; or for the best number of epochs of that on train and
    validation too, which is measured, and on everything, which is published."""
    tower_chunk_size: PositiveInt | None = None
    """Rows that go through a tower at once on a worker; the whole share when not given. Smaller chunks take
    less memory, the result is the same (GradCache)."""
    ingest: Literal["auto", "memory", "stream"] = "auto"
    """Hold the interactions in each worker's memory, stream them through Ray Data, or choose by size."""
    stream_buffer_rows: PositiveInt = 2_000_000
    """Interactions that a worker holds and shuffles at a time when they are streamed."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the towers; auto is bfloat16 on a GPU that has it and float32 elsewhere."""
    compile: bool = False
    """Compile the towers with torch.compile."""
    init_from: str | None = None
    """Checkpoint whose weights the training starts from; of the same features, vocabulary and towers."""
    loss: LossConfig = LossConfig()
    """The loss."""
    negatives: NegativesConfig = NegativesConfig()
    """Further negatives."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimisers."""
    validation: ValidationConfig = ValidationConfig()
    """Validation after each epoch."""
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    """Early stopping."""
    checkpoint_every_steps: PositiveInt | None = 1000
    """Steps between two checkpoints inside an epoch; only at its end when null."""
    metrics: MetricsConfig = MetricsConfig()
    """Metrics."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Worker failures after which training gives up; each restarts from the last checkpoint."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        batch, workers = self.global_batch_size, self.num_workers
        if batch is None:
            return self
        if batch % workers:
            lower, upper = batch - batch % workers, batch - batch % workers + workers
            fix = f"{lower} or {upper}" if lower else f"{upper}"
            raise ValueError(
                f"global_batch_size ({batch}) must be divisible by num_workers ({workers}); use {fix}"
            )
        self.check_negatives(batch)
        return self

    def batch_size(self, train_positives: int) -> int:
        """Return ``global_batch_size``, or the one that suits the data where it is null.

        An epoch wants steps more than it wants negatives: with 14,000 examples 128 ends 10 to 30% above
        1,024 (``docs/choosing.md``). A refit has more examples, and the batch of what it refits.

        Args:
            train_positives: positive interactions of the train split.
        """
        if self.global_batch_size is not None:
            return self.global_batch_size
        size = 1 << max(train_positives // _STEPS, 1).bit_length() - 1
        size = min(max(size, _SMALLEST_BATCH), _LARGEST_BATCH, max(train_positives, 1))
        return max(size // self.num_workers, 1) * self.num_workers

    def check_negatives(self, batch: int) -> None:
        """Refuse a loss that the candidates of a step leave nothing to do.

        Raises:
            ValueError: there are none, or too few.
        """
        own = self.negatives
        others = batch - 1 + own.uniform + own.popular + own.memory
        per_query = own.explicit + own.mined.per_query
        self.loss.settings.check_negatives(self.loss.kind, others + per_query)
