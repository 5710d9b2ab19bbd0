"""Users by items: what baselines are fitted on, and what their queries know.

Both hold 1 where a user has a positive interaction with a catalogue item, however often, and 0 elsewhere.
``data.knowledge`` says what a query knows; a fit knows all of the earlier splits, as popularity does.

Legend: U users, Q queries, N catalogue items.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from twotower.data.dataset import Dataset
from twotower.data.interactions import Interactions
from twotower.data.knowledge import Part, Rules, known
from twotower.schema import KINDS, SPLITS

Ints = NDArray[np.int64]
Csr: TypeAlias = Any
"""A ``scipy.sparse.csr_matrix``; scipy has no types of its own."""

_ARRAYS = ("indptr", "indices", "data")


def fit_matrix(dataset: Dataset, part: Part) -> Csr:
    """Return the positives of the splits before ``part``, [U, N] float32."""
    log = dataset.interactions
    # The codes of splits are in the order of time.
    return _matrix(dataset, log.select(log.split < SPLITS[part]))


def query_matrix(dataset: Dataset, part: Part, users: Ints) -> Csr:
    """Return the positives that the queries of users [Q] know, [Q, N] float32."""
    log = dataset.interactions
    return _matrix(dataset, log.select(known(log, part, Rules.of(dataset, "include"))))[users]


def _matrix(dataset: Dataset, log: Interactions) -> Csr:
    num_items = dataset.num_catalogue_items
    positive = (log.kind == KINDS["positive"]) & (log.item_row < num_items)
    users, items = log.user_row[positive], log.item_row[positive]
    ones = np.ones(len(users), dtype=np.float32)
    matrix = sparse.csr_matrix((ones, (users, items)), shape=(dataset.num_users, num_items))
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix


def write_matrix(path: Path, matrix: Csr) -> None:
    """Write a sparse matrix as a folder of arrays that workers can memory-map."""
    path.mkdir(parents=True, exist_ok=True)
    matrix.sort_indices()
    for name in _ARRAYS:
        np.save(path / f"{name}.npy", getattr(matrix, name))
    np.save(path / "shape.npy", np.array(matrix.shape, dtype=np.int64))


def open_matrix(path: Path) -> Csr:
    """Return what ``write_matrix`` wrote, memory-mapped."""
    arrays: dict[str, NDArray[Any]] = {n: np.load(path / f"{n}.npy", mmap_mode="r") for n in _ARRAYS}
    rows, columns = np.load(path / "shape.npy").tolist()
    parts = (arrays["data"], arrays["indices"], arrays["indptr"])
    return sparse.csr_matrix(parts, shape=(rows, columns), copy=False)
