"""What must be right before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.errors import TrainingError

if TYPE_CHECKING:
    # Sizes are checked where nothing is trained yet.
    import torch

    from twotower.model.towers import TwoTower


def require_same_model(model: TwoTower, weights: dict[str, torch.Tensor], what: str) -> None:
    """Check that weights are those of a model of the same shape.

    Raises:
        TrainingError: a tensor is missing, is one too many, or has another shape.
    """
    expected = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    found = {n: tuple(t.shape) for n, t in weights.items()}
    wrong = [n for n in sorted(expected.keys() | found.keys()) if expected.get(n) != found.get(n)]
    if wrong:
        name = wrong[0]
        raise TrainingError(
            f"{what} is of another model: tensor {name} has shape {found.get(name, 'nothing')} there and "
            f"{expected.get(name, 'nothing')} in this configuration ({len(wrong)} tensors differ). Use the "
            "configuration that it was trained with, or train anew"
        )


def check_times(dataset: Dataset) -> None:
    """Check that there are times where a feature reads them.

    Raises:
        TrainingError: there are none.
    """
    if dataset.schema.time_gaps and not dataset.has_times:
        raise TrainingError(
            f"a history feature has transformer.time_gaps, and dataset {dataset.path} has no times; "
            "set it to false"
        )


def check_sizes(config: Config, dataset: Dataset, num_examples: int) -> None:
    """Check that batch, ages, explicit negatives and the mined window are to be had.

    Raises:
        TrainingError: there are fewer examples than a batch, no times, no negatives, or fewer items than the
            window.
    """
    num_items = dataset.num_catalogue_items
    batch, workers = config.train.batch_size(dataset.train_positives), config.train.num_workers
    if batch > num_examples:
        most = num_examples // workers * workers
        remedy = f"use at most {most}" if most else f"use at most {num_examples} and as few train.num_workers"
        if not num_examples:
            remedy = "there is nothing to train on: look at data and split"
        raise TrainingError(
            f"train.global_batch_size ({batch}) is above the {num_examples} training interactions; {remedy}"
        )
    try:
        config.train.check_negatives(batch)
    except ValueError as error:
        raise TrainingError(f"train.{error}") from None
    half_life = config.train.loss.recency_half_life_days
    if half_life is not None and not dataset.has_times:
        raise TrainingError(
            f"train.loss.recency_half_life_days is {half_life:g}, and dataset {dataset.path} has no times; "
            "declare them (data.source.columns.time), or set it to null"
        )
    explicit = config.train.negatives.explicit
    if explicit and not dataset.counts["kinds"]["negative"]:
        raise TrainingError(
            f"train.negatives.explicit is {explicit}, and dataset {dataset.path} has no negative "
            "interaction; declare some (data.source.events, data.source.columns.impressions or "
            "data.positives.min_value), or set it to 0"
        )
    mined = config.train.negatives.mined
    if mined.per_query and mined.skip + mined.window > num_items:
        fits = max(num_items - mined.skip, 0)
        remedy = f"use a window of at most {fits}" if fits else f"use a skip below {num_items}"
        raise TrainingError(
            f"train.negatives.mined looks at ranks up to skip + window ({mined.skip} + {mined.window}), and "
            f"the catalogue has {num_items} items; {remedy}"
        )
