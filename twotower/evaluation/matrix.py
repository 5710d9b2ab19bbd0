"""Sparse matrices in folders of arrays, which workers memory-map."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Csr: TypeAlias = Any
"""A ``scipy.sparse.csr_matrix``; scipy has no types of its own."""

_ARRAYS = ("indptr", "indices", "data")


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
