"""Files that come after the dataset was prepared: changes of the catalogue, ids of items and of users."""

from __future__ import annotations

import pyarrow as pa

from twotower.config import DataConfig, FilesSource, TableConfig
from twotower.data.chunks import BadRows, SideTable
from twotower.data.prepare import refuse_duplicates, with_title
from twotower.data.sources.files import find_side, read_side
from twotower.data.sources.tables import TableFile, find_tables


def read_items(config: DataConfig, path: str) -> pa.Table:
    """Return the items of CSV or Parquet files as item_id, title, and the files' other columns.

    The columns of the id and the title are those of ``data.source.items``; other sources, whose item tables
    are not files of this kind, take ``item_id`` and ``title``. Rows without a readable id are handled as
    ``data.on_bad_rows`` says.

    Args:
        config: the data section.
        path: a file, a folder of them, or a glob.

    Raises:
        DataError: nothing is there, a column is missing, or an id is there twice.
    """
    side = _read(config, path, "--items")
    refuse_duplicates(side, "item_id")
    return with_title(side.data)


def read_item_ids(config: DataConfig, path: str, setting: str) -> list[str]:
    """Return the ids in CSV or Parquet files of items, in their order.

    Args:
        config: the data section.
        path: a file, a folder of them, or a glob; only the column of the id is needed.
        setting: what the path was given by, for messages.

    Raises:
        DataError: nothing is there, or the column is missing.
    """
    return list(_read(config, path, setting).data.column("item_id").to_pylist())


def _read(config: DataConfig, path: str, setting: str) -> SideTable:
    columns = _columns(config, path)
    files = _find(config, columns, setting)
    for file in files:
        there = file.require({"the item's id": columns.id})
        if columns.title is not None and columns.title not in there:
            columns = columns.model_copy(update={"title": None})
    bad = BadRows(config.on_bad_rows)
    side = read_side("item", columns, files, bad)
    bad.settle()
    return side


def read_user_ids(config: DataConfig, path: str) -> list[str]:
    """Return the ids in CSV or Parquet files of users, in their order, each once.

    The column is that of the user table, of the interactions where there is none, else ``user_id``.

    Args:
        config: the data section.
        path: a file, a folder of them, or a glob.

    Raises:
        DataError: nothing is there, the column is missing, or a row has no readable id.
    """
    source, columns = config.source, TableConfig(path=path, id="user_id")
    if isinstance(source, FilesSource):
        users = source.users or TableConfig(path=path, id=source.columns.user)
        columns = users.model_copy(update={"path": path, "title": None})
    files = _find(config, columns, "--users")
    for file in files:
        file.require({"the user's id": columns.id})
    # A row that is passed over would be a user who is not forgotten.
    bad = BadRows("error")
    side = read_side("user", columns, files, bad)
    bad.settle()
    return list(side.data.column("user_id").unique().to_pylist())


def _find(config: DataConfig, table: TableConfig, setting: str) -> list[TableFile]:
    if isinstance(config.source, FilesSource):
        return find_side(config.source, table, setting)
    return find_tables(table.path, setting)


def _columns(config: DataConfig, path: str) -> TableConfig:
    source = config.source
    if isinstance(source, FilesSource):
        if source.items is not None:
            return source.items.model_copy(update={"path": path})
        return TableConfig(path=path, id=source.columns.item)
    return TableConfig(path=path, id="item_id", title="title")
