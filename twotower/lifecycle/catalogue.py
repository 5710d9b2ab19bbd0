"""The items that an index is built from: Parquet files with item rows, ids and what features are read from.

A full build reads those of a dataset; the compaction of a generation writes its own.

Symbols: N items, R item rows that there may be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from twotower.data.dataset import ITEM_ROW, Dataset
from twotower.errors import ArtefactError

_AGAIN = "prepare the dataset again"


@dataclass(frozen=True)
class Catalogue:
    """Files of items, all with the same columns, in the order of ascending item rows."""

    paths: tuple[str, ...]
    """Parquet files; each has an int64 ``item_row`` and a text ``item_id``."""
    num_items: int
    """N."""
    num_rows: int
    """R: item rows are below it."""

    @classmethod
    def of(cls, dataset: Dataset) -> Catalogue:
        """Return the catalogue of a dataset, whose item rows are 0 to N - 1."""
        count = dataset.num_catalogue_items
        return cls(tuple(dataset.item_paths), count, count)

    @property
    def columns(self) -> list[str]:
        """Names of the columns.

        Raises:
            ArtefactError: there is no file.
        """
        if not self.paths:
            raise ArtefactError(f"the catalogue has no files; {_AGAIN}")
        return list(pq.read_schema(self.paths[0]).names)

    def held(self) -> npt.NDArray[np.bool_]:
        """Return of each item row whether it is an item of the catalogue, [R] bool.

        Raises:
            ArtefactError: the files do not hold N different rows below R.
        """
        if self.num_items == self.num_rows:
            return np.ones(self.num_rows, np.bool_)
        held = np.zeros(self.num_rows, np.bool_)
        for path in self.paths:
            rows = pq.read_table(path, columns=[ITEM_ROW])[ITEM_ROW].to_numpy()
            if len(rows) and (rows.min() < 0 or rows.max() >= self.num_rows):
                raise ArtefactError(f"{path} has item rows beyond {self.num_rows - 1}; {_AGAIN}")
            held[rows] = True
        if int(held.sum()) != self.num_items:
            raise ArtefactError(
                f"the catalogue's files hold {int(held.sum())} items, not {self.num_items}; {_AGAIN}"
            )
        return held
