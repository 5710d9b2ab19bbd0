"""Tables that a program gives: Parquet files for as long as they are read, by the rules for files."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from twotower.artefacts import locked
from twotower.errors import ConfigError, DataError
from twotower.hashing import sha256_file

_WRITTEN_NS = 946_684_800 * 10**9
"""Time of change of every such file, which a dataset is recognised by: the same for the same content."""
_REFUSED = (
    pa.ArrowInvalid,
    pa.ArrowTypeError,
    pa.ArrowNotImplementedError,
    OverflowError,
    TypeError,
    ValueError,
)


def arrow_table(given: Any, name: str) -> pa.Table:
    """Return a table that a program gives as an Arrow table; missing values become nulls.

    Args:
        given: a pandas DataFrame (its index is no column), an Arrow table or record batch, what Arrow can
            read without a copy (polars, DuckDB and others), or a mapping of column names to values.
        name: of the table, for messages.

    Raises:
        ConfigError: it is none of these.
        DataError: a column holds values of several kinds, or of one that files have not.
    """
    if isinstance(given, pa.Table):
        return given
    if isinstance(given, pa.RecordBatch):
        return pa.Table.from_batches([given])
    if isinstance(given, Mapping):
        return _of_columns(list(given.items()), name)
    if hasattr(given, "iloc") and hasattr(given, "columns"):
        # By place: a DataFrame may have a name twice, which is refused where the column is asked for.
        return _of_columns([(c, given.iloc[:, at]) for at, c in enumerate(given.columns)], name)
    if hasattr(given, "__arrow_c_stream__"):
        try:
            return pa.table(given)
        except _REFUSED as error:
            raise DataError(f"{name} can not be read as an Arrow table ({_line(error)})") from None
    raise ConfigError(
        f"{name} is a {type(given).__name__}; give a pandas DataFrame, an Arrow table, a mapping of column "
        "names to values, or the path of a file"
    )


def _of_columns(columns: list[tuple[Any, Any]], name: str) -> pa.Table:
    arrays = []
    for column, values in columns:
        try:
            arrays.append(pa.array(values, from_pandas=True))
        except _REFUSED as error:
            raise DataError(
                f"column {str(column)!r} of {name} is of no type that a file can have ({_line(error)}); make "
                "all its values numbers, texts or times"
            ) from None
    try:
        return pa.Table.from_arrays(arrays, names=[str(column) for column, _ in columns])
    except _REFUSED as error:
        raise DataError(f"the columns of {name} do not make a table ({_line(error)})") from None


@contextlib.contextmanager
def as_file(table: pa.Table, folder: Path, name: str) -> Iterator[Path]:
    """Have a table as a Parquet file inside the block.

    The path is a function of the content alone, and so is the file's time of change: a dataset that was
    prepared from the same table is found again. The file is removed behind the block, since a copy of the
    raw data would keep users who are to be forgotten.

    Args:
        table: the rows.
        folder: for such files; one process at a time works there.
        name: of the file without its ending.

    Raises:
        DataError: a column is of a type that Parquet does not have.
    """
    with locked(folder / f".{name}.lock"):
        partial = folder / f".{name}.tmp"
        try:
            try:
                pq.write_table(table.combine_chunks(), partial)
            except _REFUSED as error:
                raise DataError(f"{name} can not be written as a Parquet file ({_line(error)})") from None
            place = folder / sha256_file(partial)[:16]
            place.mkdir(exist_ok=True)
            path = place / f"{name}.parquet"
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        try:
            os.utime(path, ns=(_WRITTEN_NS, _WRITTEN_NS))
            yield path
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
