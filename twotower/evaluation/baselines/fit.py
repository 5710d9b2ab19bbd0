"""Which baselines a dataset allows, and their fits: from a dataset to files.

A baseline is fitted on the positives of train and validation, as popularity is counted. What does not fit
the sizes that the configuration allows, or the memory there is, is left out with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from twotower.config.evaluation import EvaluationConfig
from twotower.data.dataset import Dataset
from twotower.data.knowledge import Rules, holdout
from twotower.evaluation.baselines.ease import fit_ease, needed_bytes, size
from twotower.evaluation.baselines.ials import fit_ials
from twotower.evaluation.baselines.matrix import Ints, fit_matrix, query_matrix
from twotower.evaluation.baselines.memory import available_bytes
from twotower.evaluation.baselines.neighbours import item_similarity, products
from twotower.evaluation.baselines.popularity import popular_order, recent_order
from twotower.evaluation.baselines.rankers import (
    KNOWN,
    POPULAR,
    RECENT,
    SIMILARITY,
    regularised_ranker,
)
from twotower.evaluation.matrix import Csr, open_matrix, write_matrix
from twotower.evaluation.metrics import ndcg_at_k

FITTED = ("item_knn_cosine", "item_knn_tfidf", "ease", "ials")
"""Baselines that are fitted, in the order of a report."""
BASELINES = ("popularity", "recent_popularity", *FITTED)

_CHOICE_K = 10
_CHOICE_USERS = 2_000
Settings = dict[str, float | int | str]


@dataclass(frozen=True)
class Fitted:
    """What became of a baseline."""

    left_out: str | None = None
    """Why it is not measured."""
    settings: Settings = field(default_factory=dict)
    """What it was fitted with."""


def wanted(names: Sequence[str]) -> list[str]:
    """Return the baselines that ``evaluation.baselines`` asks for, in the order of a report."""
    return [name for name in BASELINES if name in names or "auto" in names or name == "popularity"]


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
    """Fit a baseline of ``FITTED`` into its folder below ``folder``, where ``write_known`` was.

    Args:
        name: of the baseline.
        folder: of all baselines.
        dataset: with the splits.
        config: the sizes that are allowed, and the settings.
        threads: of iALS.
        seed: of iALS.
    """
    matrix = fit_matrix(dataset, "test")
    reason = _reason_against(name, matrix, config)
    if reason is not None:
        return Fitted(reason)
    target = folder / name
    if name in ("ease", "ials"):
        return _regularised(name, target, dataset, matrix, open_matrix(folder / KNOWN), config, threads, seed)
    neighbours = config.item_knn.neighbours
    similarity = item_similarity(matrix, neighbours, tfidf=name == "item_knn_tfidf")
    write_matrix(target / SIMILARITY, similarity)
    return Fitted(None, {"neighbours": neighbours})


def _reason_against(name: str, matrix: Csr, config: EvaluationConfig) -> str | None:
    if name == "ials":
        most = config.ials.max_positives
        if matrix.nnz > most:
            return f"{matrix.nnz:,} positives are more than evaluation.ials.max_positives ({most:,})"
        return None
    if name == "ease":
        width, largest = size(matrix), config.ease.max_size
        if width > largest:
            return f"its weights take a square of {width:,}; evaluation.ease.max_size is {largest:,}"
        free, needed = available_bytes(), needed_bytes(matrix)
        if free is not None and needed > free:
            return f"it takes about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
        return None
    count, most = products(matrix), config.item_knn.max_products
    if count > most:
        return f"{count:,} products are more than evaluation.item_knn.max_products ({most:,})"
    return None


def _regularised(
    name: str,
    target: Path,
    dataset: Dataset,
    matrix: Csr,
    known: Csr,
    config: EvaluationConfig,
    threads: int,
    seed: int,
) -> Fitted:
    """Fit EASE^R or iALS with the regularisation that is the best on validation, where that is cheap."""

    def fit_with(positives: Csr, queries: Csr, l2: float) -> None:
        if name == "ease":
            fit_ease(target, positives, l2)
        else:
            fit_ials(target, positives, queries, config.ials, l2, threads, seed)

    section = config.ease if name == "ease" else config.ials
    cheap = size(matrix) if name == "ease" else matrix.nnz
    scores: list[float] = []
    if len(section.l2) > 1 and cheap <= section.choose_up_to:
        held = holdout(
            dataset.interactions, "validation", Rules.of(dataset, config.repeats), max_users=_CHOICE_USERS
        )
        train = fit_matrix(dataset, "validation")
        queries = query_matrix(dataset, "validation", held.user_rows)
        # Nothing to choose by where no user has a relevant item there.
        for l2 in section.l2 if len(held) and train.nnz else []:
            fit_with(train, queries, l2)
            ranked = regularised_ranker(name, target, queries, np.arange(matrix.shape[1]))(0, held, _CHOICE_K)
            values = ndcg_at_k(ranked, held.relevant_offsets, held.relevant_rows, _CHOICE_K)
            scores.append(float(values.mean()))
    chosen = section.l2[int(np.argmax(scores))] if scores else section.l2[0]
    fit_with(matrix, known, chosen)
    settings: Settings = {"l2": chosen, "l2_chosen_by": "validation" if scores else "configuration"}
    if name == "ials":
        settings |= {key: getattr(config.ials, key) for key in ("factors", "alpha", "iterations")}
    return Fitted(None, settings)
