"""iALS: matrix factorisation of implicit feedback, by the library implicit.

Source: Hu, Koren and Volinsky (2008), "Collaborative filtering for implicit feedback datasets".
Legend: U users, Q queries, N items, F factors.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from twotower.config.evaluation import IalsConfig
from twotower.evaluation.matrix import Csr

_QUERIES_AT_ONCE = 4_096


def fit_ials(
    folder: Path, matrix: Csr, known: Csr, config: IalsConfig, l2: float, threads: int, seed: int
) -> None:
    """Fit the factors of positives [U, N] and write those of items and of queries that know [Q, N].

    The factors of a query are those that its known items give with the items' factors fixed, as for any
    new user. The same seed gives the same factors for any number of threads.
    """
    from implicit.cpu.als import AlternatingLeastSquares

    # Factors of another fit may be mapped.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # implicit starts its own threads, and BLAS would start as many in each.
    with threadpool_limits(1):
        model = AlternatingLeastSquares(
            factors=config.factors,
            iterations=config.iterations,
            regularization=l2,
            alpha=config.alpha,
            num_threads=threads,
            random_state=seed,
        )
        model.fit(matrix, show_progress=False)
        queries: NDArray[np.float32] = np.zeros((known.shape[0], config.factors), dtype=np.float32)
        for first in range(0, len(queries), _QUERIES_AT_ONCE):
            rows = np.arange(first, min(first + _QUERIES_AT_ONCE, len(queries)))
            queries[rows] = model.recalculate_user(rows, known[rows])
    np.save(folder / "items.npy", np.asarray(model.item_factors, dtype=np.float32))
    np.save(folder / "queries.npy", queries)
