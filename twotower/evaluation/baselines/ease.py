"""EASE^R: every item predicts every other by one linear model with a closed form.

With the positives X [U, N] and P = (X'X + l2 I)^-1 the weights are B = I - P diag(P)^-1, whose diagonal is
0; the scores of a query x are x B. Where there are fewer users than items, the same scores come from the
smaller inverse M = (XX' + l2 I)^-1 by Woodbury's identity: l2 P = I - X'MX.

Source: Steck (2019), "Embarrassingly shallow autoencoders for sparse data", equation 8.
Legend: U users with a positive, N items, A items with a positive, n the fewer of A and U.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from twotower.errors import ConfigError
from twotower.evaluation.matrix import Csr, open_matrix, write_matrix

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_ROWS_AT_ONCE = 1024


def size(matrix: Csr) -> int:
    """Return the width of a square as large as the weights: A x A, or U x A where that is less."""
    items = np.unique(matrix.indices).size
    return math.isqrt(items * min(items, int(np.count_nonzero(np.diff(matrix.indptr)))))


def needed_bytes(matrix: Csr) -> int:
    """Return about how much memory a fit takes at once."""
    items = np.unique(matrix.indices).size
    users = int(np.count_nonzero(np.diff(matrix.indptr)))
    # The matrix to invert in 64 bits, and the weights on their way to 32 bits.
    square = 12 * min(items, users) ** 2 + (12 * users * items if users < items else 0)
    return square + 64 * matrix.nnz


def fit_ease(folder: Path, matrix: Csr, l2: float) -> None:
    """Fit the weights of positives [U, N] and write them into a folder of their own.

    Raises:
        ConfigError: ``l2`` is so small that the positives have no inverse in 64 bits.
    """
    # Weights of another fit may be mapped, and be of the other form.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    items = np.unique(matrix.indices).astype(np.int64)
    active = matrix[:, items][np.diff(matrix.indptr) > 0]
    np.save(folder / "items.npy", items)
    if active.shape[0] >= len(items):
        _fit_primal(folder, active, l2)
    else:
        _fit_dual(folder, active, l2)


class EaseScores:
    """Scores of fitted weights, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        """Open what ``fit_ease`` wrote."""
        self._items = np.load(folder / "items.npy")
        self._weights = np.load(folder / "weights.npy", mmap_mode="r")
        dual = (folder / "users").is_dir()
        self._by_item = open_matrix(folder / "users") if dual else None
        self._scale = np.load(folder / "scale.npy") if dual else None

    def __call__(self, known: Csr) -> NDArray[np.float32]:
        """Return the scores [Q, N] float32 of queries that know [Q, N]; 0 for items without a positive."""
        scores = np.zeros(known.shape, dtype=np.float32)
        mine = known[:, self._items]
        if self._by_item is None:
            scores[:, self._items] = mine @ self._weights
        else:
            dense = mine.toarray()
            reached = np.asarray((mine @ self._by_item).toarray() @ self._weights)
            scores[:, self._items] = dense - (dense - reached) * self._scale
        return scores


def _fit_primal(folder: Path, active: Csr, l2: float) -> None:
    inverse = _inverse(sparse.csr_matrix(active.T), l2)
    diagonal = inverse.diagonal().copy()
    count = len(diagonal)
    weights = np.lib.format.open_memmap(
        folder / "weights.npy", mode="w+", dtype=np.float32, shape=(count, count)
    )
    for first in range(0, count, _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        weights[rows] = -inverse[rows] / diagonal
    np.einsum("ii->i", weights)[:] = 0.0
    weights.flush()


def _fit_dual(folder: Path, active: Csr, l2: float) -> None:
    inverse = _inverse(active, l2)
    weights = np.asarray((active.T @ inverse).T)
    # 1 / (l2 * diagonal of P)
    scale = 1.0 / (1.0 - np.asarray(active.multiply(weights).sum(axis=0)).ravel())
    np.save(folder / "weights.npy", weights.astype(np.float32))
    np.save(folder / "scale.npy", scale.astype(np.float32))
    write_matrix(folder / "users", sparse.csr_matrix(active.T))


def _inverse(rows: Csr, l2: float) -> Floats:
    """The inverse of the inner products of rows [n, m] plus l2 on the diagonal: [n, n] float64.

    By blocks and in place, with products of matrices only: OpenBLAS 0.3's own Cholesky decomposition ends the
    process at n = 22,000 on two threads. Of the matrix the blocks up to the diagonal are kept up to date.

    Source: Goodnight (1979), "A tutorial on the SWEEP operator": swept on every block, A becomes -A^-1.
    """
    count = rows.shape[0]
    dense = np.zeros((count, count), dtype=np.float64)
    columns = sparse.csr_matrix(rows.T, dtype=np.float64)
    spans = [slice(first, min(first + _ROWS_AT_ONCE, count)) for first in range(0, count, _ROWS_AT_ONCE)]
    for span in spans:
        dense[span] = (rows[span] @ columns).toarray()
    np.einsum("ii->i", dense)[:] += l2
    for span in spans:
        pivot = _small_inverse(dense[span, span], l2)
        panel = np.zeros((count, span.stop - span.start))
        panel[: span.start] = dense[span, : span.start].T
        panel[span.stop :] = dense[span.stop :, span]
        swept = panel @ pivot
        for other in spans:
            # Rows and columns of the block itself are 0 in both.
            dense[other, : other.stop] -= swept[other] @ panel[: other.stop].T
        dense[span, : span.start] = swept[: span.start].T
        dense[span.stop :, span] = swept[span.stop :]
        dense[span, span] = -pivot
    np.negative(dense, out=dense)
    for span in spans:
        dense[span, span.stop :] = dense[span.stop :, span].T
    return dense


def _small_inverse(block: Floats, l2: float) -> Floats:
    try:
        np.linalg.cholesky(block)
        inverse: Floats = np.asarray(np.linalg.inv(block), dtype=np.float64)
    except np.linalg.LinAlgError:
        raise ConfigError(
            f"evaluation.ease.l2 ({l2:g}) is too small: the matrix it is added to has no inverse in 64 bits; "
            "raise it, 100 to 1000 is usual"
        ) from None
    return inverse
