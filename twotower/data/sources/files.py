"""Your own CSV and Parquet files with mapped columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.config import FilesSource, TableConfig
from twotower.data.chunks import CHUNK_ROWS, BadRows, Chunk, SideTable, TimeUnit
from twotower.data.interning import IdColumn
from twotower.data.sources import tables
from twotower.errors import ConfigError, DataError


class Files:
    """Interactions, and an item and a user table if they are given."""

    value_range: tuple[float, float] | None = None
    notice: str | None = None

    def __init__(self, source: FilesSource) -> None:
        """Find the files and check that the mapped columns are there.

        Raises:
            DataError: a file or a column is missing.
            ConfigError: a unit is declared for a time column that is not mapped.
        """
        self.source = source
        columns = source.columns
        if columns.time_unit is not None and columns.time is None:
            raise ConfigError("data.source.columns.time_unit is given without data.source.columns.time")
        self.has_times = columns.time is not None
        self.time_unit: TimeUnit | None = columns.time_unit
        self._mapped: dict[str, str] = {
            role: name
            for role in ("user", "item", "time", "value", "event", "impressions", "split")
            if (name := getattr(columns, role)) is not None
        }
        self._interactions = tables.find_files(source.interactions, "data.source.interactions")
        wanted = {f"data.source.columns.{role}": name for role, name in self._mapped.items()}
        for file in self._interactions:
            tables.require_columns(file, wanted)
        self._items = _table_files(source.items, "items")
        self._users = _table_files(source.users, "users")
        known = all(tables.is_parquet(f) for f in self._interactions)
        self.num_rows: int | None = (
            sum(pq.read_metadata(f).num_rows for f in self._interactions) if known else None
        )

    def signature(self) -> dict[str, Any]:
        """Return path, size and time of change of every file."""
        groups = {"interactions": self._interactions, "items": self._items, "users": self._users}
        return {name: [tables.stamp(f) for f in files] for name, files in groups.items()}

    def facts(self) -> dict[str, Any]:
        """Return the number of files read."""
        return {"files": len(self._interactions) + len(self._items) + len(self._users)}

    def item_table(self, bad: BadRows) -> SideTable | None:
        """Return item_id, title, and the item table's other columns."""
        if self.source.items is None:
            return None
        return read_side("item", self.source.items, self._items, bad)

    def user_table(self, bad: BadRows) -> SideTable | None:
        """Return user_id and the user table's other columns."""
        if self.source.users is None:
            return None
        return read_side("user", self.source.users, self._users, bad)

    def chunks(self, bad: BadRows) -> Iterator[Chunk]:
        """Yield the interactions, file by file in the order of their names."""
        distinct = list(dict.fromkeys(self._mapped.values()))
        # A row with a list is worth many.
        num_rows = max(CHUNK_ROWS // 16, 1) if "impressions" in self._mapped else CHUNK_ROWS
        for file in self._interactions:
            for batch, rows in tables.read_batches(file, distinct, bad):
                for start in range(0, batch.num_rows, num_rows):
                    part = batch.slice(start, num_rows)
                    roles = {
                        role: tables.non_empty(tables.decode(part.column(distinct.index(name))))
                        for role, name in self._mapped.items()
                        if role != "impressions"
                    }
                    if "impressions" in self._mapped:
                        # Undecoded: a list that is no UTF-8 is a bad row, and none at all is not.
                        roles["impressions"] = part.column(distinct.index(self._mapped["impressions"]))
                    yield Chunk(file=file.name, rows=rows[start : start + num_rows], **roles)


def _table_files(table: TableConfig | None, name: str) -> list[Path]:
    if table is None:
        return []
    found = tables.find_files(table.path, f"data.source.{name}.path")
    wanted = {f"data.source.{name}.id": table.id}
    if table.title is not None:
        wanted[f"data.source.{name}.title"] = table.title
    for file in found:
        tables.require_columns(file, wanted)
    return found


def read_side(side: str, config: TableConfig, files: list[Path], bad: BadRows) -> SideTable:
    """Return an item or user table: its id and title under our names, and its other columns.

    Args:
        side: item or user.
        config: names the columns of the id and of the title.
        files: CSV and Parquet files, whose rows are one table.
        bad: receives the rows without a readable id.

    Raises:
        DataError: a file can not be read, or the files have different columns.
    """
    parts = []
    for file in files:
        table, rows = tables.read_table(file, bad)
        parts.append(_clean(side, config, file, table, rows, bad))
    try:
        joined = pa.concat_tables(parts, promote_options="permissive").combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"the files of the {side} table do not have the same columns and types: {error}"
        ) from None
    return SideTable(files[0].name if len(files) == 1 else f"{config.path}", joined)


def _clean(side: str, config: TableConfig, file: Path, table: pa.Table, rows: Any, bad: BadRows) -> pa.Table:
    """Return the rows of a table that have an id, with the id and the title under the names we use."""
    ids = IdColumn(tables.non_empty(_one(table.column(config.id))), side)
    broken = np.zeros(table.num_rows, dtype=np.bool_)
    for mask, reason in ids.problems():
        new = np.flatnonzero(mask & ~broken)
        if len(new):
            shown = new[: bad.wants_examples(len(new))]
            bad.add(file.name, rows[new], reason, ids.array.take(pa.array(shown)).to_pylist())
            broken |= mask
    id_name = f"{side}_id"
    reserved = {config.id, id_name, "item_row"} | ({"title"} if config.title is not None else set())
    others = [n for n in table.column_names if n not in reserved]
    columns = {id_name: ids.values.take(pa.array(ids.codes, mask=broken | (ids.codes < 0)))}
    if config.title is not None:
        columns["title"] = _one(table.column(config.title))
    result = pa.table(columns | {n: tables.non_empty(_one(table.column(n))) for n in others})
    return result.filter(pa.array(~broken))


def _one(column: pa.ChunkedArray) -> pa.Array:
    array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    wide = pa.types.is_large_string(array.type) or pa.types.is_string_view(array.type)
    return array.cast(pa.string()) if wide else array
