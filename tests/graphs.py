"""A CAGRA graph as it comes from a GPU, made without one."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np

from twotower.index.spec import CAGRA, CAGRA_DEGREE, empty_index


def cagra_graph(vectors: np.ndarray) -> Any:
    """The CPU form of a graph of more than 64 vectors: HNSW's upper levels, and the nearest of each below.

    FAISS copies a graph from a GPU in this order too; only which neighbours there are differs.
    """
    index: Any = empty_index(CAGRA, vectors.shape[1])
    index.init_level0 = False
    index.add(vectors)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    nearest = np.argpartition(-scores, CAGRA_DEGREE, axis=1)[:, :CAGRA_DEGREE]
    offsets = faiss.vector_to_array(index.hnsw.offsets)
    neighbours = faiss.vector_to_array(index.hnsw.neighbors)
    for row, chosen in enumerate(nearest):
        neighbours[offsets[row] : offsets[row] + CAGRA_DEGREE] = chosen
    faiss.copy_array_to_vector(neighbours, index.hnsw.neighbors)
    index.init_level0 = True
    return index
