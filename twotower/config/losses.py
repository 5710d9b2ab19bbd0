"""Section of the loss: the kinds of losses, their settings, and what each asks of the other settings.

A kind is one class here, and one in ``twotower.model.losses``; ``docs/extending.md`` walks through one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from twotower.config.section import PositiveInt, Section
from twotower.registry import NameIn, Registry


class LossSection(Section):
    """Settings of one kind of loss, and what it asks of the other settings.

    A kind is a subclass in ``LOSSES``. Where it has keys it is also a field of ``LossConfig`` of its name.
    """

    implementation: ClassVar[str | Callable[[LossConfig], Any]]
    """What makes the ``Loss`` (``twotower.model.losses.protocol``) of a ``LossConfig``; a text "module:name"
    is imported when a training begins, since a configuration does not load torch."""
    symmetric: ClassVar[bool] = False
    """Whether it can be added up with the loss of items that look for queries."""
    bounded: ClassVar[bool] = True
    """Whether it has a least value: otherwise it needs unit vectors and a temperature that is not learned."""
    needs_negatives: ClassVar[bool] = True
    """Whether it is an error that a query has no negative."""

    def check_negatives(self, kind: str, count: int) -> None:
        """Refuse what the candidates of a step leave nothing to do for.

        Args:
            kind: of the loss.
            count: negatives of a query.

        Raises:
            ValueError: there are too few.
        """
        if self.needs_negatives and not count:
            raise ValueError(
                f"loss.kind: {kind} needs negatives, and global_batch_size is 1 with none drawn; use a "
                "larger batch, or negatives.uniform"
            )


class SoftmaxSection(LossSection):
    """The in-batch softmax, which has no settings of its own."""

    implementation: ClassVar[str | Callable[[LossConfig], Any]] = "twotower.model.losses.softmax:of_settings"
    symmetric: ClassVar[bool] = True
    needs_negatives: ClassVar[bool] = False


class BilateralConfig(LossSection):
    """Settings of ``kind: bsl``: loss = -r log E[exp(positive / (r t))] + p log sum of exp(negative / t)."""

    implementation: ClassVar[str | Callable[[LossConfig], Any]] = (
        "twotower.model.losses.bilateral:BilateralSoftmax.of_settings"
    )
    bounded: ClassVar[bool] = False

    positive_temperature: Annotated[float, Field(gt=0)] = 100.0
    """r: temperature of the positive side over ``temperature``. The expectation runs over the user's examples
    in the batch: a high one weighs them alike, with a low one only the likeliest of them is learned."""
    negative_power: Annotated[float, Field(gt=0)] = 1.1
    """p: power of the negative side; published with 1.06 to 1.32."""


class BinaryConfig(LossSection):
    """Settings of ``kind: bce``."""

    implementation: ClassVar[str | Callable[[LossConfig], Any]] = (
        "twotower.model.losses.binary:BinaryCrossEntropy.of_settings"
    )

    calibration: Annotated[float, Field(ge=0, le=1)] = 0.75
    """t of gSASRec: 1 gives the probabilities of training on the whole catalogue, 0 does not calibrate."""
    offset: float = 0.0
    """Added to scores / temperature. Scores of unit vectors want about minus the logarithm of the number of
    items, since hardly any item is a positive and a score of 0 would be one in two."""


class TopKConfig(LossSection):
    """Settings of ``kind: slatk``: an example weighs sigmoid((positive - k-th best score) / width)."""

    implementation: ClassVar[str | Callable[[LossConfig], Any]] = (
        "twotower.model.losses.top_k:TopKSoftmax.of_settings"
    )

    k: PositiveInt = 20
    """Rank among a query's candidates in the batch; k of C candidates is about rank k N / C of N items."""
    width: Annotated[float, Field(gt=0)] = 1.0
    """Width of the sigmoid, in scores; a very large one weighs every example alike."""

    def check_negatives(self, kind: str, count: int) -> None:
        """Refuse a rank above the number of candidates that a query has.

        Raises:
            ValueError: there are too few.
        """
        if self.k > count:
            raise ValueError(
                f"loss.{kind}.k ({self.k}) must be below the {count + 1} candidates of a query "
                "(global_batch_size and negatives); use a smaller k or a larger batch"
            )


LOSSES: Registry[type[LossSection]] = Registry("a kind of loss")
"""The kinds of ``train.loss.kind``."""
LOSSES.add("softmax", SoftmaxSection)
LOSSES.add("bsl", BilateralConfig)
LOSSES.add("bce", BinaryConfig)
LOSSES.add("slatk", TopKConfig)


@LOSSES.model
class LossConfig(Section):
    """The loss of queries that look for their items among the candidates of the global batch."""

    kind: Annotated[str, NameIn(LOSSES)] = "softmax"
    """Softmax with logQ correction, bilateral softmax, binary cross-entropy, or top-k softmax (SL@K)."""
    bsl: BilateralConfig = BilateralConfig()
    """The bilateral softmax."""
    bce: BinaryConfig = BinaryConfig()
    """The binary cross-entropy."""
    slatk: TopKConfig = TopKConfig()
    """The top-k softmax."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Temperature, or the one that a learned one begins at; divides the scores."""
    learn_temperature: bool = False
    """Learn the temperature; it falls as the training set is fitted, with validation where that overfits."""
    min_temperature: Annotated[float, Field(gt=0)] = 0.01
    """Floor of the learned temperature."""
    temperature_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the temperature's logarithm; that of the towers where null."""
    final_temperature: Annotated[float, Field(gt=0)] | None = None
    """What a temperature that is not learned ends at, in equal steps of its logarithm; null leaves it."""
    log_q: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Strength of the logQ correction: 1 is the full one, 0 is off."""
    mask_accidental_hits: bool = True
    """Leave out candidates that are the positive item itself, as ``mask_known_positives`` does too."""
    mask_known_positives: bool = True
    """Leave out negatives that the user has interacted with elsewhere in the fitted data."""
    weights: Literal["none", "interaction"] = "interaction"
    """What an example weighs in the loss: as much as every other, or its interaction's weight (that of its
    event type times that of ``data.positives.weight``), where 0 is no example at all."""
    recency_half_life_days: Annotated[float, Field(gt=0)] | None = None
    """Age in days that halves what an example weighs beside that; null leaves its age out. Needs times."""
    activity_power: Annotated[float, Field(ge=0, le=1)] = 0.0
    """An example of a user with n examples also weighs n to minus this: 0 is off, 0.5 is 1 / sqrt(n), and
    with 1 every user weighs the same."""
    symmetric: bool = False
    """Add the loss of each item finding its query among the batch's queries; both count half. For softmax."""

    @property
    def settings(self) -> LossSection:
        """The settings of ``kind``."""
        section = getattr(self, self.kind, None)
        return section if isinstance(section, LossSection) else LOSSES[self.kind]()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_temperature > self.temperature:
            raise ValueError(
                f"min_temperature ({self.min_temperature}) is above temperature ({self.temperature}); "
                "lower it"
            )
        if self.learn_temperature and self.final_temperature is not None:
            raise ValueError(
                f"final_temperature ({self.final_temperature}) is a schedule, and the temperature is "
                "learned; use learn_temperature: false, or final_temperature: null"
            )
        if not self.learn_temperature and self.temperature_learning_rate is not None:
            raise ValueError(
                f"temperature_learning_rate ({self.temperature_learning_rate}) has no effect with "
                "learn_temperature: false; set it to null"
            )
        if self.symmetric and not self.settings.symmetric:
            raise ValueError(
                f"symmetric: true is a softmax over the batch's queries, and kind is {self.kind}; use "
                "symmetric: false, or kind: softmax"
            )
        if self.learn_temperature and not self.settings.bounded:
            raise ValueError(
                f"kind: {self.kind} falls without end as the temperature falls, so it can not be learned; "
                "use learn_temperature: false"
            )
        return self
