"""CSV and Parquet files: which ones a path names, their columns, and bounded batches of their rows."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from twotower.data.chunks import CHUNK_ROWS, BadRows, IntArray
from twotower.errors import DataError

_DELIMITERS = {".csv": ",", ".csv.gz": ",", ".tsv": "\t", ".tsv.gz": "\t"}
_PARQUET = (".parquet", ".pq")
SUFFIXES = (*_DELIMITERS, *_PARQUET)
"""Of tables."""
_BLOCK_BYTES = 8 << 20
Opener = Callable[[], BinaryIO]


def find_files(path: str, setting: str, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """Return the files that a path names, sorted by name: a file, a folder, or a glob.

    Args:
        path: the path.
        setting: what it was given by, for messages.
        suffixes: of the files wanted: CSV and Parquet.

    Raises:
        DataError: there are none, or a named file is of another type.
    """
    expanded = os.path.expanduser(path)
    root = Path(expanded)
    if root.is_file():
        _require(root, setting, suffixes)
        return [root]
    if root.is_dir():
        inside = [p for p in root.rglob("*") if p.is_file() and not _hidden(p.relative_to(root))]
        found = sorted(p for p in inside if _suffix(p, suffixes) is not None)
        if not found:
            raise DataError(f"{setting}: folder {root} holds no file of {', '.join(suffixes)}")
        return found
    found = sorted(Path(p) for p in glob.glob(expanded, recursive=True) if os.path.isfile(p))
    if not found:
        raise DataError(
            f"{setting}: {path!r} names no file (from {os.getcwd()}); give a CSV or Parquet file, a "
            "folder or a glob"
        )
    for file in found:
        _require(file, setting, suffixes)
    return found


def is_parquet(path: Path) -> bool:
    """Return whether a file is Parquet by its name."""
    return _suffix(path) in _PARQUET


def stamp(path: Path) -> list[Any]:
    """Return what changes when a file is written again: absolute path, size and time of change."""
    status = path.stat()
    return [str(path.absolute()), status.st_size, status.st_mtime_ns]


def columns_of(path: Path) -> list[str]:
    """Return the column names of a CSV or Parquet file.

    Raises:
        DataError: the file is empty or damaged.
    """
    if is_parquet(path):
        try:
            return list(pq.read_schema(path).names)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path} is not a readable Parquet file: {error}") from None
    return csv_header(opener(path), str(path), _DELIMITERS[_require(path, "file", SUFFIXES)])


def require_columns(path: Path, wanted: dict[str, str]) -> list[str]:
    """Check that a file has the columns that settings name, and return all its columns.

    Args:
        path: The file.
        wanted: Column name by the setting that names it.

    Raises:
        DataError: a column is not there.
    """
    there = columns_of(path)
    missing = {setting: name for setting, name in wanted.items() if name not in there}
    if missing:
        asked = ", ".join(f"{name!r} ({setting})" for setting, name in missing.items())
        raise DataError(f"{path} has no column {asked}; its columns are {', '.join(there)}")
    return there


def read_batches(path: Path, columns: list[str], bad: BadRows) -> Iterator[tuple[pa.RecordBatch, IntArray]]:
    """Yield bounded batches of the named columns and each row's number; CSV columns are binary text."""
    if is_parquet(path):
        yield from _parquet_batches(path, columns)
    else:
        yield from csv_batches(
            opener(path), str(path), columns, bad, _DELIMITERS[_require(path, "file", SUFFIXES)]
        )


def read_table(path: Path, bad: BadRows) -> tuple[pa.Table, IntArray]:
    """Return a whole file as a table, CSV columns as text, with the row number of each row."""
    names = columns_of(path)
    batches, rows = [], []
    for batch, numbers in read_batches(path, names, bad):
        batches.append(batch)
        rows.append(numbers)
    if not batches:
        empty = {name: pa.array([], pa.string()) for name in names}
        return pa.table(empty), np.empty(0, dtype=np.int64)
    table = pa.Table.from_batches(batches).combine_chunks()
    for at, name in enumerate(table.column_names):
        if pa.types.is_binary(table.column(name).type) and not is_parquet(path):
            text = decode(table.column(name).combine_chunks())
            table = table.set_column(at, name, text)
    return table, np.concatenate(rows)


def decode(array: pa.Array) -> pa.Array:
    """Return binary text as strings, null where it is no UTF-8; other types are returned as they are."""
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if not pa.types.is_binary(array.type):
        return array
    try:
        return array.cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array([_utf8(b) for b in array.to_pylist()], pa.string())


def csv_header(open_file: Opener, name: str, delimiter: str) -> list[str]:
    """Return the column names in the first line of a CSV file.

    Raises:
        DataError: the file is empty, or a name is there twice.
    """
    with (
        open_file() as raw,
        io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace", newline="") as text,
    ):
        header = next(csv.reader(text, delimiter=delimiter), [])
    if not header:
        raise DataError(f"{name} is empty; a CSV file starts with a line of column names")
    twice = sorted({c for c in header if header.count(c) > 1})
    if twice:
        raise DataError(f"{name} has more than one column {', '.join(map(repr, twice))}; rename them")
    return header


def csv_batches(
    open_file: Opener,
    name: str,
    columns: list[str],
    bad: BadRows,
    delimiter: str = ",",
    names: list[str] | None = None,
) -> Iterator[tuple[pa.RecordBatch, IntArray]]:
    """Yield bounded batches of CSV columns as binary text, with the row number of each row.

    Args:
        open_file: Opens the file's bytes.
        name: Name of the file, for messages.
        columns: Columns wanted, in this order.
        bad: Receives rows with a wrong number of columns.
        delimiter: Between columns.
        names: All column names of a file without a header line.

    Raises:
        DataError: the file is no CSV.
    """
    skipped: list[int] = []

    def on_invalid(row: Any) -> str:
        # Rows are numbered as in an editor: the header is row 1. ``number`` is known when one thread reads.
        skipped.append(row.number)
        reason = f"with {row.actual_columns} columns instead of {row.expected_columns}"
        bad.add(name, [row.number], reason, [row.text[:80]])
        return "skip"

    header_rows = 0 if names else 1
    emitted = 0
    with open_file() as raw:
        try:
            reader = pa_csv.open_csv(
                raw,
                read_options=pa_csv.ReadOptions(
                    use_threads=False, block_size=_BLOCK_BYTES, column_names=names
                ),
                parse_options=pa_csv.ParseOptions(
                    delimiter=delimiter, newlines_in_values=True, invalid_row_handler=on_invalid
                ),
                convert_options=pa_csv.ConvertOptions(
                    include_columns=columns,
                    column_types={c: pa.binary() for c in columns},
                    strings_can_be_null=True,
                    null_values=[""],
                    quoted_strings_can_be_null=False,
                ),
            )
            for batch in reader:
                if not batch.num_rows:
                    continue
                yield batch, _row_numbers(emitted, batch.num_rows, skipped, header_rows)
                emitted += batch.num_rows
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{name} can not be read as CSV after row {emitted + header_rows}: {error}"
            ) from None


def opener(path: Path) -> Opener:
    """Return a function that opens a file's bytes, unpacking .gz."""
    if path.name.lower().endswith(".gz"):
        return lambda: gzip.open(path, "rb")  # type: ignore[return-value]
    return lambda: open(path, "rb")


def _row_numbers(emitted: int, count: int, skipped: list[int], header_rows: int) -> IntArray:
    """Return the numbers in the file of rows ``emitted`` to ``emitted + count - 1`` of those not skipped."""
    good = np.arange(emitted, emitted + count, dtype=np.int64)
    gone = np.asarray(skipped, dtype=np.int64) - header_rows - 1
    before = gone - np.arange(len(gone))  # good rows in front of each skipped one
    return good + np.searchsorted(before, good, side="right") + header_rows + 1


def _parquet_batches(path: Path, columns: list[str]) -> Iterator[tuple[pa.RecordBatch, IntArray]]:
    start = 1
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=CHUNK_ROWS, columns=columns):
                yield batch.select(columns), np.arange(start, start + batch.num_rows, dtype=np.int64)
                start += batch.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from None


def parquet_rows(
    path: Path | str, start: int, stop: int, batch_rows: int, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """Yield rows [start, stop) of a Parquet file in bounded batches; only their row groups are read.

    Args:
        path: of the file.
        start: first row.
        stop: the row behind the last.
        batch_rows: most rows of a batch.
        columns: that are read; all when not given.
    """
    with pq.ParquetFile(path) as file:
        counts = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
        ends = np.cumsum(counts)
        begins = ends - counts
        groups = np.flatnonzero((begins < stop) & (ends > start)).tolist()
        at = int(begins[groups[0]]) if groups else stop
        for batch in file.iter_batches(batch_rows, row_groups=groups, columns=columns):
            first, last = max(start - at, 0), min(stop - at, len(batch))
            at += len(batch)
            if first < last:
                yield pa.Table.from_batches([batch.slice(first, last - first)])
            if at >= stop:
                break


def non_empty(array: pa.Array) -> pa.Array:
    """Return text with blank values as nulls; other types are returned as they are."""
    if not pa.types.is_string(array.type):
        return array
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(array), ""), None, array)


def _utf8(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def _suffix(path: Path, suffixes: Sequence[str] = SUFFIXES) -> str | None:
    name = path.name.lower()
    return next((s for s in suffixes if name.endswith(s)), None)


def _require(path: Path, setting: str, suffixes: Sequence[str]) -> str:
    suffix = _suffix(path, suffixes)
    if suffix is None:
        raise DataError(f"{setting}: {path} is of no kind that can be read; use {', '.join(suffixes)}")
    return suffix


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)
