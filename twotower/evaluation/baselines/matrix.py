"""Users by items: what baselines are fitted on, and what their queries know.

Both hold 1 where a user has a positive interaction with a catalogue item, however often, and 0 elsewhere.
``data.knowledge`` says what a query knows; a fit knows all of the earlier splits, as popularity does.

Legend: U users, Q queries, N catalogue items.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from twotower.data.dataset import Dataset
from twotower.data.interactions import Interactions
from twotower.data.knowledge import Part, Rules, known
from twotower.evaluation.matrix import Csr
from twotower.schema import KINDS, SPLITS

Ints = NDArray[np.int64]


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
