"""Files of queries: Parquet, CSV and JSON lines, scanned once and then read by ranges of their queries.

A row is a mapping of keys to plain JSON values, the same whichever kind of file it comes from. In CSV, and
where a Parquet column holds text, values that are no text are written as JSON; what is empty or null there is
not given.
"""

from __future__ import annotations

import codecs
import csv
import datetime
import hashlib
import io
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from twotower import cells
from twotower.data.interning import as_id
from twotower.data.sources import csv_files, finding, tables
from twotower.data.sources.csv_records import LONGEST_CELL, Scanner
from twotower.errors import DataError
from twotower.hashing import sha256_file

Kind = Literal["parquet", "csv", "tsv", "jsonl"]
SUFFIXES: dict[str, Kind] = {
    ".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".tsv": "tsv",
    ".jsonl": "jsonl", ".ndjson": "jsonl",
}  # fmt: skip
_DELIMITERS = {"csv": ",", "tsv": "\t"}
_TEXTS = ("query_id", "user_id", "at")
"""Keys whose text is the value itself."""
_IDS = {"user_id", "history", "exclude_items", "allow_items"}
"""Keys of ids; pandas makes integers with gaps floats."""
_STAMP = ("path", "size", "changed")
_BLOCK_BYTES = 8 << 20
_BATCH_ROWS = 2_048


@dataclass(frozen=True)
class QueryFile:
    """A file of queries as it was scanned."""

    path: Path
    kind: Kind
    sha256: str
    num_queries: int
    marks: tuple[Sequence[int], Sequence[int]]
    """Of every ``stride``-th query and of the end: where it begins, and its number in the file."""
    stride: int
    stamp: list[Any]
    """Path, size and time of change."""

    def ranges(self, first: int, step: int) -> list[dict[str, Any]]:
        """Return ranges of queries, each as ``read_rows`` takes it.

        Args:
            first: number of the file's first query among those of all files.
            step: most queries of a range; a multiple of ``stride``.
        """
        places, numbers = self.marks
        found = []
        for start in range(0, self.num_queries, step):
            stop = min(start + step, self.num_queries)
            mark, end = start // self.stride, -(-stop // self.stride)
            found.append(
                {
                    "start": first + start,
                    "stop": first + stop,
                    **dict(zip(_STAMP, self.stamp, strict=True)),
                    "kind": self.kind,
                    "begin": places[mark],
                    "end": places[end],
                    "number": numbers[mark],
                }
            )
        return found


def find_query_files(path: str, setting: str) -> list[Path]:
    """Return the files of queries that a path names: a file, a folder, or a glob.

    Raises:
        DataError: there are none, or a named file is of another kind.
    """
    return finding.find_files(path, setting, tuple(SUFFIXES))


def scan(path: Path, stride: int) -> QueryFile:
    """Read a file once, in bounded memory, for its content's hash and the places of its queries.

    Args:
        path: of a kind of ``SUFFIXES``.
        stride: queries between places that are kept.

    Raises:
        DataError: the file can not be read.
    """
    stamp = finding.stamp(path)
    kind = next(kind for suffix, kind in SUFFIXES.items() if path.name.lower().endswith(suffix))
    with finding.readable(path, "file of queries"):
        if kind == "parquet":
            count = pq.read_metadata(path).num_rows
            places = [*range(0, count, stride), count]
            numbers = [place + 1 for place in places]
            return QueryFile(path, kind, sha256_file(path), count, (places, numbers), stride, stamp)
        blocks = _Blocks(path)
        place, number = array("q"), array("q")
        count, last = 0, 1
        if kind == "jsonl":
            records: Iterator[tuple[int, int, Any]] = _lines(blocks, blocks.begin)
        else:
            dialect = _dialect(path, kind)
            scanner = Scanner(dialect.delimiter, len(dialect.names), judges_inside=False)
            records = _records(scanner, blocks, blocks.begin)
            next(records, None)  # the header
        for begin, last, _ in records:
            if count % stride == 0:
                place.append(begin)
                number.append(last)
            count += 1
        place.append(blocks.end)
        number.append(last + 1)
        return QueryFile(path, kind, blocks.digest.hexdigest(), count, (place, number), stride, stamp)


def columns_of(path: Path, kind: Kind) -> list[str]:
    """Return the names of the columns, none for JSON lines.

    Raises:
        DataError: the file can not be read, or a name is there twice.
    """
    if kind == "parquet":
        file = tables.TableFile(path)
        file.refuse_repeated(file.columns)
        return file.columns
    return [] if kind == "jsonl" else _dialect(path, kind).names


def read_rows(part: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    """Yield the number in the file, and the values, of each query of a range.

    The values are a mapping, or a ``DataError`` that says what is wrong with the row.

    Args:
        part: one of ``QueryFile.ranges``.

    Raises:
        DataError: the file is not as it was scanned.
    """
    path, begin, end = Path(part["path"]), int(part["begin"]), int(part["end"])
    count = part["stop"] - part["start"]
    changed = DataError(f"{path} was changed while the job ran; run it again")
    with finding.readable(path, "file of queries"):
        if finding.stamp(path) != [part[name] for name in _STAMP]:
            raise changed
        if part["kind"] == "parquet":
            rows = _parquet_rows(path, begin, end)
        else:
            rows = _text_rows(path, part["kind"], begin, end, int(part["number"]))
        for number, values in rows:
            count -= 1
            yield number, values
    if count:
        raise changed


def _parquet_rows(path: Path, begin: int, end: int) -> Iterator[tuple[int, Any]]:
    number = begin
    for table in tables.parquet_rows(path, begin, end, _BATCH_ROWS):
        maps = [field.name for field in table.schema if pa.types.is_map(field.type)]
        wrong: dict[int, DataError] = {}
        for at, name in enumerate(table.column_names):
            text, broken = cells.text_of(cells.joined(table.column(name), f"column {name!r} of {path.name}"))
            table = table.set_column(at, name, text)
            for row in [] if broken is None else np.flatnonzero(broken).tolist():
                wrong[row] = DataError(f"{name} is not UTF-8")
        for at, row in enumerate(table.to_pylist()):
            number += 1
            for name in maps:
                row[name] = None if row[name] is None else dict(row[name])
            yield number, wrong.get(at) or _attempt(_of_columns, _plain(row))


def _text_rows(path: Path, kind: Kind, begin: int, end: int, number: int) -> Iterator[tuple[int, Any]]:
    blocks = _Blocks(path, begin, end)
    if kind == "jsonl":
        for _, line, text in _lines(blocks, begin, number):
            yield line, _attempt(_of_json, text)
        return
    dialect = _dialect(path, kind)
    scanner = Scanner(dialect.delimiter, len(dialect.names), judges_inside=False)
    for _, line, record in _records(scanner, blocks, begin, number):
        yield line, record if isinstance(record, DataError) else _attempt(_of_cells, dialect, record)


class _Blocks:
    """A range of the bytes of a file in blocks, behind a mark of UTF-8; hashes what it reads."""

    def __init__(self, path: Path, begin: int = 0, end: int | None = None) -> None:
        self._path = path
        with open(path, "rb") as file:
            head = file.read(len(codecs.BOM_UTF8))
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise DataError(f"{path} is UTF-16; files of queries are UTF-8, write it so")
        if begin == 0 and head == codecs.BOM_UTF8:
            begin = len(head)
        self.begin, self.end = begin, path.stat().st_size if end is None else end
        self.digest = hashlib.sha256(head[:begin] if end is None else b"")

    def __iter__(self) -> Iterator[bytes]:
        left = self.end - self.begin
        with open(self._path, "rb") as file:
            file.seek(self.begin)
            while left > 0 and (block := file.read(min(left, _BLOCK_BYTES))):
                left -= len(block)
                self.digest.update(block)
                yield block


def _dialect(path: Path, kind: Kind) -> csv_files.Dialect:
    text = csv_files.Text(finding.opener(path), str(path))
    with finding.readable(path):
        return csv_files.dialect_of(text, _DELIMITERS[kind])


def _lines(blocks: Iterable[bytes], place: int, number: int = 1) -> Iterator[tuple[int, int, bytes]]:
    """Yield place, number and text of each line that is not blank."""
    rest = b""
    for block in itertools.chain(blocks, [b"\n"]):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            if line.strip():
                yield place, number, line
            place += len(line) + 1
            number += 1


def _records(
    scanner: Scanner, blocks: Iterable[bytes], place: int, number: int = 1
) -> Iterator[tuple[int, int, bytes | DataError]]:
    """Yield place, line and text of each record, or what is wrong with the lines that are none."""
    for found in scanner.records(blocks, number):
        edges = [*found.starts.tolist(), len(found.data)]
        places = zip(found.begins.tolist(), found.lines.tolist(), pairwise(edges), strict=True)
        rows: list[tuple[int, int, bytes | DataError]]
        rows = [(begin, line, found.data[a:b]) for begin, line, (a, b) in places]
        for d in found.damages:
            rows.append((d.begin, d.lines[0], DataError(f"is a line {d.reason}: {d.text}")))
        for begin, line, record in sorted(rows, key=lambda row: row[0]):
            yield place + begin, line, record


def _attempt(function: Any, *arguments: Any) -> Any:
    """Return what a function does, or the error it raises."""
    try:
        return function(*arguments)
    except DataError as error:
        return error


def _of_json(line: bytes) -> dict[str, Any]:
    try:
        values = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DataError(f"is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError('is not a JSON object such as {"user_id": "1"}')
    return values


def _of_cells(dialect: csv_files.Dialect, record: bytes) -> dict[str, Any]:
    try:
        text = record.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8: {error}") from None
    csv.field_size_limit(LONGEST_CELL)
    lines = io.StringIO(text, newline="")
    values = next(csv.reader(lines, delimiter=dialect.delimiter, skipinitialspace=dialect.spaced))
    names = dialect.names
    if len(values) != len(names):
        raise DataError(f"has {len(values)} columns instead of {len(names)}")
    return _of_columns({name: value for name, value in zip(names, values, strict=True) if value})


def _of_columns(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the JSON of its texts read, and its ids as those of a column."""
    for name, value in row.items():
        if isinstance(value, str) and name not in _TEXTS:
            try:
                row[name] = orjson.loads(value)
            except orjson.JSONDecodeError as error:
                shown = value if len(value) <= 60 else value[:60] + "..."
                raise DataError(f"{name}: {shown} is not JSON: {error}") from None
    for name in _IDS & row.keys():
        try:
            row[name] = _ids_of(row[name])
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
    return row


def _ids_of(value: Any) -> Any:
    """Return an id, or those of a list, which may be in objects, as ids of a column are read."""
    if isinstance(value, list):
        return [_ids_of(one) for one in value]
    if isinstance(value, dict):
        return {name: as_id(one) if name == "item_id" else one for name, one in value.items()}
    return as_id(value)


def _plain(value: Any) -> Any:
    """Return a value of Arrow as JSON has it; what is null in a row or a struct is left out."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, datetime.date):
        return value.isoformat()
    return value
