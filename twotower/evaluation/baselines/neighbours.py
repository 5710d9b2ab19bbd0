"""Item-kNN: the items that the same people take, each with its K nearest.

Source: Sarwar, Karypis, Konstan and Riedl (2001), "Item-based collaborative filtering recommendation
algorithms"; weights, truncation and scores as in the library implicit (``CosineRecommender``,
``TFIDFRecommender``): a query's score of an item is the sum over the items it knows of that item's
similarity, where it is among the K nearest of the known one.

Legend: U users, N items, K neighbours.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from twotower.evaluation.matrix import Csr

_CELLS_AT_ONCE = 1 << 24
"""Similarities held at once, at most, dense: 64 MiB of float32."""


def products(matrix: Csr) -> int:
    """Return the multiplications that all similarities of the items of [U, N] take."""
    return int((np.diff(matrix.indptr).astype(np.int64) ** 2).sum())


def item_similarity(matrix: Csr, neighbours: int, tfidf: bool) -> Csr:
    """Return the similarities of each item to its nearest items, itself among them: [N, N] float32.

    Args:
        matrix: positives of users, [U, N], with 1 where there is one.
        neighbours: K of each item; of equal ones those of smaller rows.
        tfidf: weigh a user by log(N) - log(1 + his items) before the cosine: who takes everything says little
            of what belongs together.
    """
    num_items = matrix.shape[1]
    by_item = sparse.csr_matrix(matrix.T, dtype=np.float64)
    if tfidf:
        weights = np.log(max(num_items, 1)) - np.log1p(np.diff(matrix.indptr))
        by_item = by_item @ sparse.diags(weights)
    norms = np.sqrt(np.asarray(by_item.multiply(by_item).sum(axis=1)).ravel())
    unit = sparse.csr_matrix(sparse.diags(1.0 / np.where(norms > 0, norms, 1.0)) @ by_item, dtype=np.float32)
    others = sparse.csr_matrix(unit.T)
    step = max(1, _CELLS_AT_ONCE // max(num_items, 1))
    blocks = [
        _nearest(unit[first : first + step] @ others, neighbours) for first in range(0, num_items, step)
    ]
    return sparse.csr_matrix(sparse.vstack(blocks) if blocks else (0, 0), dtype=np.float32)


def _nearest(block: Csr, neighbours: int) -> Csr:
    """The largest cells of each row."""
    block.sort_indices()
    keep = np.ones(block.nnz, dtype=bool)
    for row in np.flatnonzero(np.diff(block.indptr) > neighbours):
        cells = slice(block.indptr[row], block.indptr[row + 1])
        order = np.argsort(-block.data[cells], kind="stable")
        keep[block.indptr[row] + order[neighbours:]] = False
    indptr = np.concatenate([[0], np.cumsum(keep)])[block.indptr]
    return sparse.csr_matrix((block.data[keep], block.indices[keep], indptr), shape=block.shape)
