"""What people read about an item: its id, title and the columns that its features come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.errors import ArtefactError, RequestError


class ItemTables:
    """The memory-mapped item tables of all shards, looked up by item row."""

    def __init__(self, shards: Sequence[tuple[Path, npt.NDArray[np.int64]]]) -> None:
        """Open the tables.

        Args:
            shards: of each its Arrow file and the item row of each of its rows, ascending.

        Raises:
            ArtefactError: a file can not be read or has another number of rows.
        """
        self._shards: list[tuple[pa.Table, npt.NDArray[np.int64]]] = []
        self.fields: list[str] = []
        for path, item_rows in shards:
            try:
                with pa.memory_map(str(path), "r") as source:
                    table = pa.ipc.open_file(source).read_all()
            except (OSError, pa.ArrowInvalid) as error:
                raise ArtefactError(f"{path} can not be read ({error}); build the generation again") from None
            if len(table) != len(item_rows):
                raise ArtefactError(
                    f"{path} has {len(table)} rows, its shard has {len(item_rows)}; build it again"
                )
            self.fields = table.column_names
            if len(item_rows):
                self._shards.append((table, item_rows))

    def take(self, item_rows: npt.ArrayLike, columns: Sequence[str]) -> dict[str, list[Any]]:
        """Return the values of columns, for each item row in the order given.

        Raises:
            RequestError: a column is not there, or an item row is in no shard.
        """
        unknown = [c for c in columns if c not in self.fields]
        if unknown:
            raise RequestError(
                f"items have no field {', '.join(map(repr, unknown))}; there are {', '.join(self.fields)}"
            )
        rows = np.asarray(item_rows, dtype=np.int64).reshape(-1)
        place = np.full(len(rows), -1)
        pieces: dict[str, list[Any]] = {c: [] for c in columns}
        count = 0
        for table, own in self._shards:
            at = np.minimum(np.searchsorted(own, rows), len(own) - 1)
            there = np.flatnonzero(own[at] == rows)
            place[there] = count + np.arange(len(there))
            count += len(there)
            picked = pa.array(at[there])
            for c in columns:
                pieces[c] += table.column(c).take(picked).to_pylist()
        if (place < 0).any():
            raise RequestError(f"item row {rows[np.argmin(place)]} is not in the index; use an indexed one")
        order = place.tolist()
        return {c: [values[p] for p in order] for c, values in pieces.items()}
