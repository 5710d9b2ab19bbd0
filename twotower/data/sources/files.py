"""Your own CSV and Parquet files with mapped columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twotower import cells, progress
from twotower.config import FilesSource, TableConfig
from twotower.data.chunks import CHUNK_ROWS, BadRows, Chunk, IntArray, SideTable, TimeUnit
from twotower.data.dataset import ITEM_ROW
from twotower.data.interning import IdColumn, IdForm, MixedIdsError
from twotower.data.sources import tables
from twotower.data.sources.finding import stamp
from twotower.data.sources.tables import TableFile
from twotower.errors import ConfigError, DataError
from twotower.values import as_text, examples


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
        self._interactions = tables.find_tables(
            source.interactions, "data.source.interactions", source.delimiter, source.encoding
        )
        wanted = {f"data.source.columns.{role}": name for role, name in self._mapped.items()}
        for file in self._interactions:
            file.require(wanted)
        self._items = _table_files(source, source.items, "items")
        self._users = _table_files(source, source.users, "users")
        known = all(f.is_parquet for f in self._interactions)
        self.num_rows: int | None = (
            sum(pq.read_metadata(f.path).num_rows for f in self._interactions) if known else None
        )

    def signature(self) -> dict[str, Any]:
        """Return path, size and time of change of every file."""
        groups = {"interactions": self._interactions, "items": self._items, "users": self._users}
        return {name: [stamp(f.path) for f in files] for name, files in groups.items()}

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
            for batch, numbers in file.batches(distinct, bad):
                texts = {name: cells.text_of(batch.column(at)) for at, name in enumerate(distinct)}
                table, rows = tables.drop_undecoded(file.name, texts, numbers, bad)
                for start in range(0, table.num_rows, num_rows):
                    part = table.slice(start, num_rows).combine_chunks()
                    roles = {
                        role: tables.non_empty(cells.joined(part.column(name), f"column {name!r}"))
                        for role, name in self._mapped.items()
                    }
                    yield Chunk(file=file.name, rows=rows[start : start + num_rows], **roles)


def _table_files(source: FilesSource, table: TableConfig | None, name: str) -> list[TableFile]:
    if table is None:
        return []
    found = find_side(source, table, f"data.source.{name}.path")
    wanted = {f"data.source.{name}.id": table.id}
    if table.title is not None:
        wanted[f"data.source.{name}.title"] = table.title
    for file in found:
        file.require(wanted)
    return found


def find_side(source: FilesSource, table: TableConfig, setting: str) -> list[TableFile]:
    """Return the files of an item or user table.

    Args:
        source: says what form CSV files have where the table does not.
        table: names the path.
        setting: what the path was given by, for messages.

    Raises:
        DataError: there are none, or one of them is of another kind.
    """
    delimiter, encoding = table.delimiter or source.delimiter, table.encoding or source.encoding
    return tables.find_tables(table.path, setting, delimiter, encoding)


def read_side(side: str, config: TableConfig, files: list[TableFile], bad: BadRows) -> SideTable:
    """Return an item or user table: its id and title under our names, and its other columns.

    Args:
        side: item or user.
        config: names the columns of the id and of the title.
        files: CSV and Parquet files, whose rows are one table.
        bad: receives the rows without a readable id.

    Raises:
        DataError: a file can not be read, the title is no text, or the files have different columns.
    """
    own = _own_names(side, config)
    form, before = IdForm(side), bad.copy()
    try:
        parts = _parts(form, config, files, bad)
    except MixedIdsError:
        bad.restore(before)
        parts = _parts(form, config, files, bad)
    form.tell()
    there = {name for file in files for name in file.columns}
    replaced = {name for name, source in own.items() if name != source and name in there}
    for name in sorted(replaced):
        progress.say(
            f"{files[0].name}: its own column {name!r} is not kept, for that name stands for the "
            f"{side}'s {own[name] or 'row'}; rename it in the file to use it"
        )
    try:
        joined = pa.concat_tables(parts, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"the files of the {side} table do not have the same columns and types: {error}"
        ) from None
    name = files[0].name if len(files) == 1 else f"{config.path}"
    columns = {n: cells.joined(joined.column(n), f"column {n!r} of {name}") for n in joined.column_names}
    return SideTable(name, pa.table(columns), {n: own[n] for n in sorted(replaced)})


def _own_names(side: str, config: TableConfig) -> dict[str, str]:
    """Return the names that a dataset's table keeps for itself, each with the column that it comes from."""
    titled = {} if config.title is None else {"title": config.title}
    numbered = {ITEM_ROW: ""} if side == "item" else {}
    return {f"{side}_id": config.id} | numbered | titled


def _parts(form: IdForm, config: TableConfig, files: list[TableFile], bad: BadRows) -> list[pa.Table]:
    wanted = [name for name in (config.id, config.title) if name is not None]
    return [_clean(form, config, file, *tables.read_table(file, bad, wanted), bad) for file in files]


def _clean(
    form: IdForm, config: TableConfig, file: TableFile, table: pa.Table, rows: IntArray, bad: BadRows
) -> pa.Table:
    """Return the rows of a table that have an id, with the id and the title under the names we use."""
    array = {n: tables.non_empty(cells.joined(table.column(n), f"column {n!r}")) for n in table.column_names}
    ids = IdColumn(array[config.id], form)
    broken = np.zeros(table.num_rows, dtype=np.bool_)
    for mask, reason in ids.problems():
        new = np.flatnonzero(mask & ~broken)
        if len(new):
            bad.add(file.name, rows[new], reason, examples(ids.array, new[:1]))
            broken |= mask
    own = _own_names(form.side, config)
    columns = {f"{form.side}_id": ids.values.take(pa.array(ids.codes, mask=broken | (ids.codes < 0)))}
    if config.title is not None:
        try:
            columns["title"] = as_text(array[config.title])
        except DataError as error:
            raise DataError(
                f"data.source.{form.side}s.title: column {config.title!r} of {file.name} is no title: {error}"
            ) from None
    others = {n: column for n, column in array.items() if n not in own and n != config.id}
    return pa.table(columns | others).filter(pa.array(~broken))
