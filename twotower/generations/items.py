"""What people read about an item: its id, title and the columns that its features come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.errors import ArtefactError, RequestError


class ItemTables:
    """The memory-mapped item tables of all shards, looked up by item row."""

    def __init__(self, shards: Sequence[tuple[Path, npt.NDArray[np.int64], npt.NDArray[np.int64]]]) -> None:
        """Open the tables.

        Args:
            shards: of each its Arrow file, the item row of each of its rows, ascending, and the item rows,
                ascending, that are dead in it; an item row is alive in one of them at most.

        Raises:
            ArtefactError: a file can not be read or has another number of rows.
        """
        self._shards: list[tuple[pa.Table, npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
        self.schema = pa.schema([])
        for path, item_rows, dead in shards:
            table = mapped_table(path, len(item_rows))
            self.schema = table.schema.remove_metadata()
            if len(item_rows):
                self._shards.append((table, item_rows, dead))

    @property
    def fields(self) -> list[str]:
        """Names of the columns."""
        return list(self.schema.names)

    def table(self, item_rows: npt.ArrayLike, columns: Sequence[str] | None = None) -> pa.Table:
        """Return columns of items, in the order given; all columns when none are named.

        Raises:
            RequestError: a column is not there, or an item row is in no shard.
        """
        names = self.fields if columns is None else list(columns)
        self._require(names)
        pieces, order = self._pieces(item_rows)
        found = [table.select(names).take(pa.array(at)) for table, at in pieces]
        empty = self.schema.empty_table().select(names)
        return pa.concat_tables([empty, *found]).take(pa.array(order))

    def take(self, item_rows: npt.ArrayLike, columns: Sequence[str]) -> dict[str, list[Any]]:
        """Return the values of columns, for each item row in the order given.

        Raises:
            RequestError: a column is not there, or an item row is in no shard.
        """
        self._require(columns)
        pieces, order = self._pieces(item_rows)
        values: dict[str, list[Any]] = {}
        for name in columns:
            # To Python first: joining Arrow arrays costs more than a handful of values.
            found = [v for table, at in pieces for v in table.column(name).take(pa.array(at)).to_pylist()]
            values[name] = [found[p] for p in order.tolist()]
        return values

    def contains(self, item_rows: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return of each item row whether it is in a shard, [m] bool."""
        rows = np.asarray(item_rows, dtype=np.int64).reshape(-1)
        there = np.zeros(len(rows), np.bool_)
        for _, own, dead in self._shards:
            there |= _alive_places(own, dead, rows)[1]
        return there

    def matching(self, column: str, text: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return the items whose value in a text column contains a text, in no order.

        Upper and lower case are the same. Every value is looked at: 1M titles take some 60 ms.

        Returns:
            item rows [m] int64; [m] bool, whether the value begins with the text.

        Raises:
            RequestError: the column is not there.
        """
        self._require([column])
        rows, begins = [np.zeros(0, np.int64)], [np.zeros(0, np.bool_)]
        for table, own, dead in self._shards:
            values = table.column(column)
            at = np.flatnonzero(pc.match_substring(values, text, ignore_case=True).fill_null(False))
            at = at[~np.isin(own[at], dead)]
            rows.append(own[at])
            begins.append(np.asarray(pc.starts_with(values.take(pa.array(at)), text, ignore_case=True)))
        return np.concatenate(rows), np.concatenate(begins)

    def _require(self, columns: Sequence[str]) -> None:
        unknown = [c for c in columns if c not in self.fields]
        if unknown:
            raise RequestError(
                f"items have no field {', '.join(map(repr, unknown))}; there are {', '.join(self.fields)}"
            )

    def _pieces(
        self, item_rows: npt.ArrayLike
    ) -> tuple[list[tuple[pa.Table, npt.NDArray[np.int64]]], npt.NDArray[np.int64]]:
        """Return the tables and their rows that hold items, and each item's place in what they give."""
        rows = np.asarray(item_rows, dtype=np.int64).reshape(-1)
        place = np.full(len(rows), -1)
        pieces = []
        count = 0
        for table, own, dead in self._shards:
            at, mine = _alive_places(own, dead, rows)
            there = np.flatnonzero(mine)
            place[there] = count + np.arange(len(there))
            count += len(there)
            pieces.append((table, at[there]))
        if (place < 0).any():
            raise RequestError(f"item row {rows[np.argmin(place)]} is not in the index; use an indexed one")
        return pieces, place


def mapped_table(path: Path, num_rows: int) -> pa.Table:
    """Return the memory-mapped table of an Arrow file.

    Raises:
        ArtefactError: it can not be read or has another number of rows.
    """
    try:
        with pa.memory_map(str(path), "r") as source:
            table = pa.ipc.open_file(source).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise ArtefactError(f"{path} can not be read ({error}); build the generation again") from None
    if len(table) != num_rows:
        raise ArtefactError(f"{path} has {len(table)} rows, its shard has {num_rows}; build it again")
    return table


def _alive_places(
    own: npt.NDArray[np.int64], dead: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the place of each row in a shard, and whether it is alive there."""
    at, mine = _places(own, rows)
    if len(dead):
        mine &= ~_places(dead, rows)[1]
    return at, mine


def _places(
    ordered: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the place of each row in an ascending array that is not empty, and whether it is there."""
    at = np.minimum(np.searchsorted(ordered, rows), len(ordered) - 1)
    return at, ordered[at] == rows
