"""Rows of files of queries as queries: the keys of POST /v1/retrieve, and ``query_id``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from twotower.data.query_files import QueryFile, columns_of, read_rows
from twotower.errors import DataError, NotAllowedError
from twotower.retrieval.query import Query
from twotower.retrieval.request import QueryRow, parse, query_of, unknown_key

_KEYS = tuple(name for name in QueryRow.model_fields if name != "fields")


@dataclass(frozen=True)
class Row:
    """A row of a file of queries."""

    where: str
    """File and number of the row."""
    query_id: str
    """Its own, or its place in the files, counted from 0."""
    query: Query | NotAllowedError | DataError
    """The query, or what is wrong with the row."""


def check_columns(file: QueryFile) -> None:
    """Check the columns of a Parquet or CSV file.

    Raises:
        DataError: a column is no key of a query.
    """
    for name in columns_of(file.path, file.kind):
        if name == "fields":
            raise _no_fields(f"{file.path}: column ")
        if name not in _KEYS:
            wrong = unknown_key(name, _KEYS)
            raise DataError(f"{file.path}: column {name!r}: {wrong['message']}; allowed: {wrong['allowed']}")


def read_queries(part: dict[str, Any], k: int, exclude_seen: bool) -> Iterator[Row]:
    """Yield the rows of a range of a file.

    Args:
        part: one of ``QueryFile.ranges``.
        k: of queries that name none, and the most that one may name.
        exclude_seen: of queries that do not say.

    Raises:
        DataError: the file is not as it was scanned.
    """
    for place, (number, values) in enumerate(read_rows(part), start=part["start"]):
        where, query_id = f"{part['path']} row {number}", str(place)
        if isinstance(values, DataError):
            yield Row(where, query_id, values)
            continue
        try:
            if "fields" in values:
                raise _no_fields("")
            row = parse({"k": k, "exclude_seen": exclude_seen, **values}, k, QueryRow)
            yield Row(where, row.query_id or query_id, query_of(row))
        except (NotAllowedError, DataError) as error:
            yield Row(where, query_id, error)


def _no_fields(prefix: str) -> DataError:
    return DataError(
        f"{prefix}fields: columns of the output are the same for all; name them in recommend.fields"
    )
