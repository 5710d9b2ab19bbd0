"""Files of queries: Parquet, CSV and JSON lines, scanned once and then read by ranges of their queries.

A row is a mapping of keys to plain JSON values, the same whichever kind of file it comes from. In CSV, and
where a Parquet column holds text, values that are no text are written as JSON; what is empty or null there is
not given.
"""

from __future__ import annotations

import csv
import datetime
import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.data.sources import tables
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
_STAMP = ("path", "size", "changed")
_BOM = b"\xef\xbb\xbf"
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
    return tables.find_files(path, setting, tuple(SUFFIXES))


def scan(path: Path, stride: int) -> QueryFile:
    """Read a file once, in bounded memory, for its content's hash and the places of its queries.

    Args:
        path: of a kind of ``SUFFIXES``.
        stride: queries between places that are kept.

    Raises:
        DataError: the file can not be read.
    """
    stamp = tables.stamp(path)
    kind = next(kind for suffix, kind in SUFFIXES.items() if path.name.lower().endswith(suffix))
    try:
        if kind == "parquet":
            count = pq.read_metadata(path).num_rows
            places = [*range(0, count, stride), count]
            numbers = [place + 1 for place in places]
            return QueryFile(path, kind, sha256_file(path), count, (places, numbers), stride, stamp)
        with open(path, "rb") as file:
            lines = _Lines(file)
            place, number = array("q"), array("q")
            count = row = 0
            begin = lines.skip_bom()
            if kind == "jsonl":
                records: Iterator[Any] = (line.strip() for line in lines)
            else:
                records = csv.reader(map(_latin, lines), delimiter=_DELIMITERS[kind])
                _header(records, path)
                begin, row = lines.place, 1
            for record in records:
                row += 1
                if record:
                    if count % stride == 0:
                        place.append(begin)
                        number.append(row)
                    count += 1
                begin = lines.place
            place.append(lines.place)
            number.append(row + 1)
            return QueryFile(path, kind, lines.digest.hexdigest(), count, (place, number), stride, stamp)
    except csv.Error as error:
        raise DataError(f"{path} can not be read as CSV after row {row}: {error}") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} can not be read: {error}") from None


def columns_of(path: Path, kind: Kind) -> list[str]:
    """Return the names of the columns, none for JSON lines.

    Raises:
        DataError: the file can not be read, or a name is there twice.
    """
    if kind == "parquet":
        names = list(tables.columns_of(path))
        if len(set(names)) < len(names):
            raise DataError(f"{path} has more than one column of a name: {', '.join(names)}; rename them")
        return names
    return tables.csv_header(tables.opener(path), str(path), _DELIMITERS[kind]) if kind != "jsonl" else []


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
    try:
        if tables.stamp(path) != [part[name] for name in _STAMP]:
            raise changed
        if part["kind"] == "parquet":
            rows = _parquet_rows(path, begin, end)
        else:
            rows = _text_rows(path, part["kind"], begin, end, int(part["number"]))
        for number, values in rows:
            count -= 1
            yield number, values
    except (OSError, pa.ArrowInvalid, csv.Error) as error:
        raise DataError(f"{path} can not be read: {error}") from None
    if count:
        raise changed


def _parquet_rows(path: Path, begin: int, end: int) -> Iterator[tuple[int, Any]]:
    number = begin
    for table in tables.parquet_rows(path, begin, end, _BATCH_ROWS):
        maps = [field.name for field in table.schema if pa.types.is_map(field.type)]
        for row in table.to_pylist():
            number += 1
            for name in maps:
                row[name] = None if row[name] is None else dict(row[name])
            yield number, _attempt(_of_columns, _plain(row))


def _text_rows(path: Path, kind: Kind, begin: int, end: int, number: int) -> Iterator[tuple[int, Any]]:
    names = columns_of(path, kind)
    with open(path, "rb") as file:
        file.seek(begin)
        lines = _Lines(file, end - begin)
        if kind == "jsonl":
            for line in lines:
                if line.strip():
                    yield number, _attempt(_of_json, line)
                number += 1
            return
        for record in csv.reader(map(_latin, lines), delimiter=_DELIMITERS[kind]):
            if record:
                yield number, _attempt(_of_cells, names, record)
            number += 1


class _Lines:
    """The lines of a file from where it stands, as bytes; counts and hashes them."""

    def __init__(self, file: BinaryIO, length: int | None = None) -> None:
        self._file = file
        self._length = length
        self.place = 0
        """Bytes of the lines so far."""
        self.digest = hashlib.sha256()

    def skip_bom(self) -> int:
        """Pass over a mark of the byte order, and return how long it is."""
        if self._file.read(len(_BOM)) == _BOM:
            self.digest.update(_BOM)
            self.place = len(_BOM)
        else:
            self._file.seek(0)
        return self.place

    def __iter__(self) -> Iterator[bytes]:
        for line in self._file:
            if self._length is not None and self.place >= self._length:
                return
            self.place += len(line)
            if self._length is None:
                self.digest.update(line)
            yield line


def _latin(line: bytes) -> str:
    """Return a character for each byte: quotes, commas and line ends are where they are in UTF-8."""
    return line.decode("latin-1")


def _header(records: Iterator[Any], path: Path) -> None:
    if not next(records, None):
        raise DataError(f"{path} is empty; a CSV file starts with a line of column names")


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


def _of_cells(names: list[str], record: list[str]) -> dict[str, Any]:
    if len(record) != len(names):
        raise DataError(f"has {len(record)} columns instead of {len(names)}")
    try:
        cells = [cell.encode("latin-1").decode() for cell in record]
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8: {error}") from None
    return _of_columns({name: cell for name, cell in zip(names, cells, strict=True) if cell})


def _of_columns(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the JSON of its texts read."""
    for name, value in row.items():
        if isinstance(value, str) and name not in _TEXTS:
            try:
                row[name] = orjson.loads(value)
            except orjson.JSONDecodeError as error:
                shown = value if len(value) <= 60 else value[:60] + "..."
                raise DataError(f"{name}: {shown} is not JSON: {error}") from None
    return row


def _plain(value: Any) -> Any:
    """Return a value of Arrow as JSON has it; what is null in a row or a struct is left out."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, datetime.date):
        return value.isoformat()
    return value
