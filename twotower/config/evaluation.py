"""Section of the final evaluation: cut-offs, slices, and the baselines beside the model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from twotower.config.section import NonNegativeInt, PositiveInt, Section
from twotower.registry import NameIn, Registry

BASELINES: Registry[Any] = Registry("a baseline")
"""The rankers of ``evaluation.baselines``, in the order of a report: what fits each, a ``Baseline`` of
``twotower.evaluation.baselines.protocol`` or a text "module:name" that is imported when it is fitted; None
for the two that rest on counts alone."""
BASELINES.add("popularity", None)
BASELINES.add("recent_popularity", None)
BASELINES.add("item_knn_cosine", "twotower.evaluation.baselines.fitted:COSINE")
BASELINES.add("item_knn_tfidf", "twotower.evaluation.baselines.fitted:TFIDF")
BASELINES.add("ease", "twotower.evaluation.baselines.fitted:EASE")
BASELINES.add("ials", "twotower.evaluation.baselines.fitted:IALS")
BaselineName = Annotated[str, NameIn(BASELINES, also=("auto",))]
PositiveFloat = Annotated[float, Field(gt=0)]


class ItemKnnConfig(Section):
    """Item-to-item neighbours."""

    neighbours: PositiveInt = 200
    """K: the most similar items that count of each item."""
    max_products: PositiveInt = 20_000_000_000
    """Left out where the squares of the users' numbers of items add up to more, the products it takes."""


class EaseConfig(Section):
    """EASE^R, the linear model of all items' weights for each other."""

    l2: Annotated[list[PositiveFloat], Field(min_length=1)] = [300.0, 100.0, 1000.0]
    """Regularisations; of several the best in NDCG on validation, or the first one where that is dear."""
    max_size: PositiveInt = 20_000
    """Left out where items with positives, and users with them, are both more: the matrix to invert."""
    choose_up_to: PositiveInt = 4_000
    """Largest such matrix with which ``l2`` is chosen on validation."""


class IalsConfig(Section):
    """iALS, the matrix factorisation of implicit feedback (the library implicit)."""

    factors: PositiveInt = 64
    """Width of the factors."""
    iterations: PositiveInt = 15
    """Sweeps over users and items."""
    alpha: PositiveFloat = 3.0
    """Confidence in a positive; that in every other pair is 1."""
    l2: Annotated[list[PositiveFloat], Field(min_length=1)] = [10.0, 1.0, 30.0, 100.0]
    """Regularisations of the factors; of several one is chosen as that of ``ease`` is."""
    max_positives: PositiveInt = 100_000_000
    """Left out where there are more positives."""
    choose_up_to: PositiveInt = 1_000_000
    """Most positives with which ``l2`` is chosen on validation."""


@BASELINES.model
class EvaluationConfig(Section):
    """The final evaluation on the test split."""

    ks: Annotated[list[PositiveInt], Field(min_length=1)] = [10, 20, 100]
    """Cut-offs of the metrics."""
    repeats: Literal["exclude", "include"] = "exclude"
    """What a user has had already: masked and never relevant, in validation too; or ranked like any other
    item and relevant when it is taken again, as where ``exclude_seen: false`` serves it."""
    max_users: PositiveInt = 1_000_000
    """Test users measured, drawn once; all where there are fewer."""
    baselines: list[BaselineName] = ["auto"]
    """Rankers measured beside the model; auto is all that the data's size and memory allow. Popularity is
    always there."""
    item_knn: ItemKnnConfig = ItemKnnConfig()
    """Both kinds of item-kNN."""
    ease: EaseConfig = EaseConfig()
    """EASE^R."""
    ials: IalsConfig = IalsConfig()
    """iALS."""
    slices: list[str] = []
    """Attributes whose values are measured one by one, beside activity and popularity: categorical,
    multi_hot and numeric features of users and items, and index.attributes."""
    latency_requests: PositiveInt = 1_000
    """Single requests timed for the latency histogram."""
    map_items: Annotated[int, Field(ge=10)] = 2_000
    """Most popular items drawn in the t-SNE map."""
    examples: NonNegativeInt = 4
    """Test users shown with ids, histories and recommendations; 0 keeps users out of the report."""
