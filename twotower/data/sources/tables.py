"""CSV and Parquet files as tables: their columns, and bounded batches of their rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twotower import cells, progress
from twotower.data.chunks import CHUNK_ROWS, BadRows, BoolArray, IntArray
from twotower.data.sources import csv_files, finding
from twotower.errors import DataError

_REMEDY = "data.source.encoding says what CSV files are in, such as latin-1 or cp1252"


@dataclasses.dataclass(frozen=True)
class TableFile:
    """A CSV or Parquet file, and how it is read."""

    path: Path
    delimiter: str | None = None
    """Between CSV columns; None takes it from the header."""
    encoding: str = "utf-8"
    """Of CSV text."""
    partitions: dict[str, str | None] = dataclasses.field(default_factory=dict)
    """Columns by the names of the folders that the file is in."""

    @property
    def name(self) -> str:
        """Name of the file, for messages."""
        return self.path.name

    @property
    def is_parquet(self) -> bool:
        """Whether the file is Parquet, by its name."""
        return finding.suffix_of(self.path) in finding.PARQUET

    @property
    def text(self) -> csv_files.Text:
        """The CSV file's text."""
        return csv_files.Text(finding.opener(self.path), str(self.path), self.encoding)

    @cached_property
    def dialect(self) -> csv_files.Dialect:
        """How the CSV file's columns are told apart.

        Raises:
            DataError: the file is empty, damaged or ambiguous.
        """
        kind = next(k for k in finding.DELIMITERS if k in (finding.suffix_of(self.path) or ""))
        with finding.readable(self.path):
            return csv_files.dialect_of(self.text, finding.DELIMITERS[kind], self.delimiter)

    @cached_property
    def columns(self) -> list[str]:
        """Names of the columns in the file, and then of those that only its folders stand for.

        Raises:
            DataError: the file is empty or damaged.
        """
        return self._own + [name for name in self.partitions if name not in self._own]

    def require(self, wanted: dict[str, str]) -> list[str]:
        """Check that the file has the columns that settings name, each once, and return all its columns.

        Args:
            wanted: column name by the setting that names it.

        Raises:
            DataError: a column is not there, or there twice.
        """
        self.refuse_repeated(list(wanted.values()))
        missing = {setting: name for setting, name in wanted.items() if name not in self.columns}
        if missing:
            asked = ", ".join(f"{name!r} ({setting})" for setting, name in missing.items())
            hint = ""
            if not self.is_parquet and self.delimiter is None:
                other = csv_files.delimiter_with(self.text, list(wanted.values()))
                hint = "" if other is None else f"; set data.source.delimiter: {other!r} to find all"
            raise DataError(
                f"{self.path} has no column {asked}; its columns are {', '.join(self.columns)}{hint}"
            )
        return self.columns

    def refuse_repeated(self, names: Sequence[str]) -> None:
        """Refuse a column of ``names`` that is there twice.

        Raises:
            DataError: with its name.
        """
        twice = sorted({name for name in names if self.columns.count(name) > 1})
        if twice:
            raise DataError(
                f"{self.path} has more than one column {', '.join(map(repr, twice))}; rename them"
            )

    def batches(self, columns: Sequence[str], bad: BadRows) -> Iterator[tuple[pa.RecordBatch, IntArray]]:
        """Yield bounded batches of the named columns and each row's number.

        CSV columns come as binary text, those of folders as text. Rows are numbered from 1 in Parquet, and by
        their line in CSV.

        Raises:
            DataError: the file is damaged.
        """
        own = [name for name in columns if name in self._own]
        batches = self._parquet(own) if self.is_parquet else self._csv(own, bad)
        for batch, rows in batches:
            arrays = {name: batch.column(at) for at, name in enumerate(own)}
            for name in set(columns) - set(own):
                value = pa.scalar(self.partitions[name], pa.string())
                arrays[name] = pa.repeat(value, batch.num_rows)
            yield pa.RecordBatch.from_pydict({name: arrays[name] for name in columns}), rows

    @cached_property
    def _own(self) -> list[str]:
        if not self.is_parquet:
            return self.dialect.names
        with finding.readable(self.path, "Parquet file"):
            return list(pq.read_schema(self.path).names)

    def _csv(self, columns: list[str], bad: BadRows) -> Iterator[tuple[pa.RecordBatch, IntArray]]:
        places = [self.dialect.names.index(name) for name in columns]
        with finding.readable(self.path):
            for batch, rows in csv_files.csv_batches(self.text, self.dialect, places, bad):
                arrays = batch.columns
                if self.dialect.spaced:
                    arrays = [pc.ascii_trim_whitespace(a.cast(pa.string(), safe=False)) for a in arrays]
                yield pa.RecordBatch.from_arrays(arrays, names=columns), rows

    def _parquet(self, columns: list[str]) -> Iterator[tuple[pa.RecordBatch, IntArray]]:
        start = 1
        with (
            finding.readable(self.path, "Parquet file"),
            # By itself Arrow reads times of 96 bits as nanoseconds, and those of other centuries wrap round.
            pq.ParquetFile(self.path, coerce_int96_timestamp_unit="us") as file,
        ):
            for batch in file.iter_batches(batch_size=CHUNK_ROWS, columns=columns):
                yield batch.select(columns), np.arange(start, start + batch.num_rows, dtype=np.int64)
                start += batch.num_rows


def find_tables(
    path: str, setting: str, delimiter: str | None = None, encoding: str = "utf-8"
) -> list[TableFile]:
    """Return the CSV and Parquet files that a path names, sorted by name: a file, a folder, or a glob.

    Args:
        path: the path.
        setting: what it was given by, for messages.
        delimiter: of CSV files, or None.
        encoding: of CSV files.

    Raises:
        DataError: there are none, or one of them is of another kind.
    """
    return [
        TableFile(file, delimiter, encoding, finding.partitions(path, file))
        for file in finding.find_files(path, setting)
    ]


def read_table(file: TableFile, bad: BadRows, wanted: Sequence[str]) -> tuple[pa.Table, IntArray]:
    """Return a whole file as a table without dictionaries, with the number of each row.

    Text is string. A row with text that is no UTF-8 is bad; but a binary column of Parquet that is not among
    ``wanted`` may hold something else than text, and then stays as it is.

    Raises:
        DataError: the file is damaged, has a name twice, or more text than a column can hold.
    """
    names = [name for name in file.columns if name]
    file.refuse_repeated(names)
    batches, rows = [], []
    sizes = dict.fromkeys(names, 0)
    for batch, numbers in file.batches(names, bad):
        batches.append(batch)
        rows.append(numbers)
        for name, column in zip(names, batch.columns, strict=True):
            sizes[name] += cells.text_bytes(column)
            cells.refuse_long(sizes[name], f"column {name!r} of {file.name}")
    if not batches:
        return pa.table({name: pa.array([], pa.string()) for name in names}), np.empty(0, np.int64)
    table = pa.Table.from_batches(batches)
    columns = {}
    blobs = []
    for name in names:
        column = cells.joined(table.column(name), f"column {name!r} of {file.name}")
        array, broken = cells.text_of(column)
        if broken is not None and file.is_parquet and cells.is_bytes(column.type) and name not in wanted:
            blobs.append(name)
            array, broken = column, None
        columns[name] = (array, broken)
    if blobs:
        progress.say(f"{file.name}: {', '.join(map(repr, blobs))} hold bytes that are no text")
    return drop_undecoded(file.name, columns, np.concatenate(rows), bad)


def drop_undecoded(
    name: str, columns: dict[str, tuple[pa.Array, BoolArray | None]], rows: IntArray, bad: BadRows
) -> tuple[pa.Table, IntArray]:
    """Return columns as a table without the rows that hold something that is no UTF-8, and their numbers.

    Args:
        name: of the file.
        columns: by name what ``cells.text_of`` returned.
        rows: [n] int64, number of each row.
        bad: receives these rows, each for its first such column.
    """
    table = pa.table({name: array for name, (array, _) in columns.items()})
    gone = np.zeros(len(rows), np.bool_)
    for column, (_, broken) in columns.items():
        if broken is not None:
            bad.add(name, rows[broken & ~gone], f"with a {column!r} that is not UTF-8 ({_REMEDY})")
            gone |= broken
    if not gone.any():
        return table, rows
    return table.filter(pa.array(~gone)), rows[~gone]


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
