"""The baselines that are fitted: item-kNN, EASE^R and iALS as ``Baseline``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twotower.config.evaluation import EvaluationConfig
from twotower.data.knowledge import Rules, holdout
from twotower.evaluation.baselines.ease import fit_ease, needed_bytes, size
from twotower.evaluation.baselines.ials import fit_ials
from twotower.evaluation.baselines.matrix import Ints, fit_matrix, query_matrix
from twotower.evaluation.baselines.memory import available_bytes
from twotower.evaluation.baselines.neighbours import item_similarity, products
from twotower.evaluation.baselines.protocol import Fitting, Settings
from twotower.evaluation.baselines.rankers import (
    SIMILARITY,
    MatrixRanker,
    NeighbourScores,
    regularised_ranker,
)
from twotower.evaluation.comparison import Ranker
from twotower.evaluation.matrix import Csr, open_matrix, write_matrix
from twotower.evaluation.metrics import ndcg_at_k

_CHOICE_K = 10
_CHOICE_USERS = 2_000


@dataclass(frozen=True)
class ItemKnn:
    """Sums of the similarities of the nearest items."""

    tfidf: bool
    """Whether users with many items count less."""

    def against(self, matrix: Csr, config: EvaluationConfig) -> str | None:
        """Return why it is not fitted: the products it takes."""
        count, most = products(matrix), config.item_knn.max_products
        if count > most:
            return f"{count:,} products are more than evaluation.item_knn.max_products ({most:,})"
        return None

    def fit(self, folder: Path, given: Fitting) -> Settings:
        """Write the similarities."""
        neighbours = given.config.item_knn.neighbours
        write_matrix(folder / SIMILARITY, item_similarity(given.matrix, neighbours, tfidf=self.tfidf))
        return {"neighbours": neighbours}

    def ranker(self, folder: Path, known: Csr, order: Ints) -> Ranker:
        """Return the ranker of the similarities."""
        return MatrixRanker(NeighbourScores(open_matrix(folder / SIMILARITY), order), known, order)


class Regularised:
    """EASE^R or iALS, with the regularisation that is the best on validation, where that is cheap."""

    name: str

    def against(self, matrix: Csr, config: EvaluationConfig) -> str | None:
        """Return why it is not fitted."""
        raise NotImplementedError

    def cost(self, matrix: Csr) -> int:
        """Return what ``choose_up_to`` limits."""
        raise NotImplementedError

    def section(self, config: EvaluationConfig) -> Any:
        """Return its settings."""
        return getattr(config, self.name)

    def fit_with(self, folder: Path, given: Fitting, positives: Csr, queries: Csr, l2: float) -> None:
        """Fit one regularisation."""
        raise NotImplementedError

    def settings(self, config: EvaluationConfig) -> Settings:
        """Return what else it is fitted with."""
        return {}

    def fit(self, folder: Path, given: Fitting) -> Settings:
        """Write the weights or factors."""
        section, dataset, matrix = self.section(given.config), given.dataset, given.matrix
        scores: list[float] = []
        if len(section.l2) > 1 and self.cost(matrix) <= section.choose_up_to:
            rules = Rules.of(dataset, given.config.repeats)
            held = holdout(dataset.interactions, "validation", rules, max_users=_CHOICE_USERS)
            train = fit_matrix(dataset, "validation")
            queries = query_matrix(dataset, "validation", held.user_rows)
            # Nothing to choose by where no user has a relevant item there.
            for l2 in section.l2 if len(held) and train.nnz else []:
                self.fit_with(folder, given, train, queries, l2)
                ranker = regularised_ranker(self.name, folder, queries, np.arange(matrix.shape[1]))
                ranked = ranker(0, held, _CHOICE_K)
                values = ndcg_at_k(ranked, held.relevant_offsets, held.relevant_rows, _CHOICE_K)
                scores.append(float(values.mean()))
        chosen = section.l2[int(np.argmax(scores))] if scores else section.l2[0]
        self.fit_with(folder, given, matrix, given.known, chosen)
        by = "validation" if scores else "configuration"
        return {"l2": chosen, "l2_chosen_by": by, **self.settings(given.config)}

    def ranker(self, folder: Path, known: Csr, order: Ints) -> Ranker:
        """Return the ranker of the weights or factors."""
        return regularised_ranker(self.name, folder, known, order)


class Ease(Regularised):
    """EASE^R."""

    name = "ease"

    def against(self, matrix: Csr, config: EvaluationConfig) -> str | None:
        """Return why it is not fitted: the square of its weights, and the memory it takes."""
        width, largest = size(matrix), config.ease.max_size
        if width > largest:
            return f"its weights take a square of {width:,}; evaluation.ease.max_size is {largest:,}"
        free, needed = available_bytes(), needed_bytes(matrix)
        if free is not None and needed > free:
            return f"it takes about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
        return None

    def cost(self, matrix: Csr) -> int:
        """Return the width of the matrix to invert."""
        return size(matrix)

    def fit_with(self, folder: Path, given: Fitting, positives: Csr, queries: Csr, l2: float) -> None:
        """Fit one regularisation."""
        fit_ease(folder, positives, l2)


class Ials(Regularised):
    """iALS."""

    name = "ials"

    def against(self, matrix: Csr, config: EvaluationConfig) -> str | None:
        """Return why it is not fitted: the number of positives."""
        most = config.ials.max_positives
        if matrix.nnz > most:
            return f"{matrix.nnz:,} positives are more than evaluation.ials.max_positives ({most:,})"
        return None

    def cost(self, matrix: Csr) -> int:
        """Return the number of positives."""
        return int(matrix.nnz)

    def fit_with(self, folder: Path, given: Fitting, positives: Csr, queries: Csr, l2: float) -> None:
        """Fit one regularisation."""
        fit_ials(folder, positives, queries, given.config.ials, l2, given.threads, given.seed)

    def settings(self, config: EvaluationConfig) -> Settings:
        """Return the sizes."""
        return {key: getattr(config.ials, key) for key in ("factors", "alpha", "iterations")}


COSINE, TFIDF, EASE, IALS = ItemKnn(tfidf=False), ItemKnn(tfidf=True), Ease(), Ials()
