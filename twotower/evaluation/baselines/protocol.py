"""What a fitted baseline is: reasons against it, a fit to files, and a ranker that reads them.

Legend: Q test queries, N catalogue items, U users.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from twotower.config.evaluation import BASELINES, EvaluationConfig
from twotower.data.dataset import Dataset
from twotower.evaluation.baselines.matrix import Ints
from twotower.evaluation.comparison import Ranker
from twotower.evaluation.matrix import Csr
from twotower.registry import imported

Settings = dict[str, float | int | str]


@dataclass(frozen=True)
class Fitting:
    """What a baseline is fitted to."""

    dataset: Dataset
    """With the splits."""
    matrix: Csr
    """[U, N], the positives of train and validation."""
    known: Csr
    """[Q, N], what the test queries know."""
    config: EvaluationConfig
    """Sizes that are allowed, and settings."""
    threads: int
    """CPU threads."""
    seed: int
    """Of what is drawn."""


class Baseline(Protocol):
    """A ranker that is fitted, an entry of ``BASELINES``."""

    def against(self, matrix: Csr, config: EvaluationConfig) -> str | None:
        """Return why it is not fitted, such as its size; None where nothing is against it."""

    def fit(self, folder: Path, given: Fitting) -> Settings:
        """Write what the ranker reads into its folder, and return what it was fitted with."""

    def ranker(self, folder: Path, known: Csr, order: Ints) -> Ranker:
        """Return the ranker of what was written.

        Args:
            folder: of the baseline.
            known: [Q, N], what all queries know.
            order: [N] catalogue items, the most popular first.
        """


def fitted_names() -> tuple[str, ...]:
    """Return the baselines that are fitted, in the order of a report."""
    return tuple(name for name in BASELINES.names if BASELINES[name] is not None)


def baseline(name: str) -> Baseline:
    """Return a baseline that is fitted."""
    found: Baseline = imported(BASELINES[name])
    return found
