"""The interactions of a dataset as arrays, 22 bytes a row, and their Parquet file.

Invariant: rows are sorted by user_row, then time, then their order in the source. ``n`` is the number of
interactions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.schema import KINDS

COLUMNS: dict[str, Any] = {
    "user_row": np.int32,
    "item_row": np.int32,
    "time": np.int64,
    "weight": np.float32,
    "kind": np.int8,
    "split": np.int8,
}
_ROW_GROUP = 1 << 19


@dataclasses.dataclass(frozen=True)
class Interactions:
    """Interactions sorted by user, time and source order; all arrays have the same length n."""

    user_row: npt.NDArray[np.int32]
    """[n] int32, never decreasing."""
    item_row: npt.NDArray[np.int32]
    """[n] int32."""
    time: npt.NDArray[np.int64]
    """[n] int64, microseconds since 1970 UTC; zeros in a source without times."""
    weight: npt.NDArray[np.float32]
    """[n] float32, at least 0; 1 for a negative that a person gave, 0 for an impression."""
    kind: npt.NDArray[np.int8]
    """[n] int8, a code of ``schema.KINDS``."""
    split: npt.NDArray[np.int8]
    """[n] int8, a code of ``schema.SPLITS``."""
    user_offsets: npt.NDArray[np.int64]
    """[num_users + 1] int64; user u owns rows user_offsets[u] to user_offsets[u + 1]."""

    def __len__(self) -> int:
        return len(self.user_row)

    @property
    def num_users(self) -> int:
        """Users that the offsets know, those without interactions included."""
        return len(self.user_offsets) - 1

    @property
    def is_impression(self) -> npt.NDArray[np.bool_]:
        """[n] bool, items that were shown and not chosen: not had, unlike those of all other interactions."""
        mask: npt.NDArray[np.bool_] = (self.kind == KINDS["negative"]) & (self.weight == 0)
        return mask

    @classmethod
    def of(cls, num_users: int, **columns: npt.NDArray[Any]) -> Interactions:
        """Return interactions of sorted columns, with the offsets of ``num_users`` users."""
        return cls(**columns, user_offsets=offsets(columns["user_row"], num_users))

    def select(self, mask: npt.NDArray[np.bool_]) -> Interactions:
        """Return the interactions where ``mask`` [n] is true, for the same users."""
        if mask.shape != (len(self),) or mask.dtype != np.bool_:
            raise ValueError(f"mask must be [{len(self)}] bool, got {list(mask.shape)} {mask.dtype}")
        return Interactions.of(self.num_users, **{name: getattr(self, name)[mask] for name in COLUMNS})

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Return the columns by name, without the offsets."""
        return {name: getattr(self, name) for name in COLUMNS}

    def write(self, path: Path) -> None:
        """Write the columns as one Parquet file with bounded row groups."""
        schema = pa.schema([(name, pa.from_numpy_dtype(kind)) for name, kind in COLUMNS.items()])
        with pq.ParquetWriter(path, schema, compression="zstd", compression_level=1) as writer:
            for start in range(0, len(self), _ROW_GROUP):
                part = slice(start, start + _ROW_GROUP)
                arrays = [pa.array(getattr(self, name)[part]) for name in COLUMNS]
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))

    @classmethod
    def read(cls, path: Path, num_users: int) -> Interactions:
        """Read what ``write`` wrote, one row group at a time into arrays of the final size."""
        with pq.ParquetFile(path) as file:
            n = file.metadata.num_rows
            columns = {name: np.empty(n, dtype=kind) for name, kind in COLUMNS.items()}
            start = 0
            for group in range(file.metadata.num_row_groups):
                table = file.read_row_group(group, columns=list(COLUMNS))
                for name, column in columns.items():
                    column[start : start + table.num_rows] = table.column(name).to_numpy()
                start += table.num_rows
        return cls.of(num_users, **columns)


def user_blocks(user_row: npt.NDArray[np.int32], num_rows: int = 1 << 20) -> Iterator[slice]:
    """Yield slices of about ``num_rows`` rows that never part a user, over a sorted ``user_row`` [n].

    What is done user by user is done block by block, so that it needs no further arrays of length n.
    """
    start, n = 0, len(user_row)
    while start < n:
        end = min(start + num_rows, n)
        if end < n:
            end = int(np.searchsorted(user_row, user_row[end], side="left"))
            if end == start:
                end = int(np.searchsorted(user_row, user_row[start], side="right"))
        yield slice(start, end)
        start = end


def offsets(user_row: npt.NDArray[np.int32], num_users: int) -> npt.NDArray[np.int64]:
    """Return [num_users + 1] int64: where each user's rows start in a sorted ``user_row``."""
    return np.searchsorted(user_row, np.arange(num_users + 1, dtype=user_row.dtype)).astype(np.int64)


def count_rows(rows: npt.NDArray[np.int32], num_rows: int) -> npt.NDArray[np.int64]:
    """Return [num_rows] int64: how often each row is in ``rows`` [n], which are not copied as int64."""
    counts = np.zeros(num_rows, dtype=np.int64)
    for start in range(0, len(rows), 1 << 20):
        counts += np.bincount(rows[start : start + (1 << 20)], minlength=num_rows)
    return counts
