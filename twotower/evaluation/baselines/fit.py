"""Which baselines a dataset allows, and their fits: from a dataset to files.

A baseline is fitted on the positives of train and validation, as popularity is counted. What does not fit
the sizes that the configuration allows, or the memory there is, is left out with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from twotower.config.evaluation import BASELINES, EvaluationConfig
from twotower.data.dataset import Dataset
from twotower.evaluation.baselines.matrix import Ints, fit_matrix, query_matrix
from twotower.evaluation.baselines.popularity import popular_order, recent_order
from twotower.evaluation.baselines.protocol import Fitting, Settings, baseline
from twotower.evaluation.baselines.rankers import KNOWN, POPULAR, RECENT
from twotower.evaluation.matrix import open_matrix, write_matrix


@dataclass(frozen=True)
class Fitted:
    """What became of a baseline."""

    left_out: str | None = None
    """Why it is not measured."""
    settings: Settings = field(default_factory=dict)
    """What it was fitted with."""


def wanted(names: Sequence[str]) -> list[str]:
    """Return the baselines that ``evaluation.baselines`` asks for, in the order of a report."""
    return [name for name in BASELINES.names if name in names or "auto" in names or name == "popularity"]


def write_orders(folder: Path, dataset: Dataset, names: Sequence[str]) -> dict[str, Fitted]:
    """Write what rests on counts alone: popularity, which the others fall back to, and recent popularity."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / POPULAR, popular_order(dataset))
    found = {"popularity": Fitted()}
    if "recent_popularity" in names:
        recent = recent_order(dataset)
        if recent is None:
            found["recent_popularity"] = Fitted("the interactions have no times")
        else:
            np.save(folder / RECENT, recent)
            found["recent_popularity"] = Fitted()
    return found


def write_known(folder: Path, dataset: Dataset, users: Ints) -> None:
    """Write what the test queries of users [Q] know."""
    write_matrix(folder / KNOWN, query_matrix(dataset, "test", users))


def fit(
    name: str, folder: Path, dataset: Dataset, config: EvaluationConfig, threads: int, seed: int
) -> Fitted:
    """Fit a baseline of ``fitted_names`` into its folder below ``folder``, where ``write_known`` was.

    Args:
        name: of the baseline.
        folder: of all baselines.
        dataset: with the splits.
        config: the sizes that are allowed, and the settings.
        threads: of iALS.
        seed: of iALS.
    """
    matrix = fit_matrix(dataset, "test")
    chosen = baseline(name)
    reason = chosen.against(matrix, config)
    if reason is not None:
        return Fitted(reason)
    given = Fitting(dataset, matrix, open_matrix(folder / KNOWN), config, threads, seed)
    return Fitted(None, chosen.fit(folder / name, given))
