"""CSV text: its encoding, its header, and bounded batches of its columns."""

from __future__ import annotations

import codecs
import csv
import dataclasses
import io
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from twotower.data.chunks import BadRows, IntArray
from twotower.data.sources.csv_records import Records, Scanner
from twotower.data.sources.finding import Opener, refuse_other_kind
from twotower.errors import DataError

_BLOCK_BYTES = 8 << 20
_HEAD_BYTES = 1 << 20
_CANDIDATES = (",", ";", "\t", "|")
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@dataclasses.dataclass(frozen=True)
class Text:
    """Bytes of a file and how they are to be read."""

    open: Opener
    """Opens the bytes, unpacked."""
    name: str
    """Of the file, for messages."""
    encoding: str = "utf-8"
    """A mark of the byte order at the beginning stands above it."""

    def blocks(self, size: int | None = None) -> Iterator[bytes]:
        """Yield the text in UTF-8, without a mark of the byte order.

        Text that is UTF-8 by declaration is passed on as it is.

        Raises:
            DataError: the file is of another kind, or not in its declared encoding.
            OSError: it is damaged, as every other error of its compression.
        """
        size = size or _BLOCK_BYTES
        with self.open() as file:
            head = file.read(size)
            encoding = next((e for mark, e in _MARKS.items() if head.startswith(mark)), self.encoding)
            plain = codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")
            if plain or not encoding.lower().startswith(("utf-16", "utf-32")):
                refuse_other_kind(self.name, head)
            if plain:
                head = head.removeprefix(codecs.BOM_UTF8)
            decoder = codecs.getincrementaldecoder(encoding)()
            block = head
            while block:
                try:
                    yield block if plain else decoder.decode(block).encode()
                except UnicodeDecodeError as error:
                    raise self._not_in(encoding, error) from None
                block = file.read(size)
            try:
                yield b"" if plain else decoder.decode(b"", final=True).encode()
            except UnicodeDecodeError as error:
                raise self._not_in(encoding, error) from None

    def head(self) -> str:
        """Return the beginning of the text, for its header; characters that are no UTF-8 are replaced."""
        found = b""
        for block in self.blocks(1 << 16):
            found += block
            if b"\n" in block or len(found) > _HEAD_BYTES:
                break
        return found.decode("utf-8", "replace")

    def _not_in(self, encoding: str, error: UnicodeDecodeError) -> DataError:
        return DataError(
            f"{self.name} is not {encoding} text: {error.reason}; set data.source.encoding to what it is"
        )


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How the columns of a CSV file are told from each other."""

    delimiter: str
    names: list[str]
    """Of the columns, without blanks around them."""
    has_header: bool = True
    spaced: bool = False
    """Whether blanks stand behind the delimiters, and so around the cells."""


def dialect_of(text: Text, usual: str, declared: str | None = None) -> Dialect:
    """Return the dialect that the header of a file shows.

    Args:
        text: the file.
        usual: delimiter by the kind of the file: taken where the header has it.
        declared: delimiter by the configuration, which decides.

    Raises:
        DataError: the file is empty, or several delimiters could be meant.
    """
    head = text.head()
    if declared is not None:
        return _dialect(text, head, declared)
    first = _dialect(text, head, usual)
    if len(first.names) > 1:
        return first
    others = [_dialect(text, head, d) for d in _CANDIDATES if d != usual and d in _first_line(head)]
    others = [d for d in others if len(d.names) > 1]
    if len(others) > 1:
        shown = " or ".join(repr(d.delimiter) for d in others)
        raise DataError(
            f"{text.name}: the header {_first_line(head)[:80]!r} may be delimited by {shown}; set "
            "data.source.delimiter"
        )
    return others[0] if others else first


def delimiter_with(text: Text, wanted: Sequence[str]) -> str | None:
    """Return a delimiter with which the header has all wanted columns."""
    head = text.head()
    for delimiter in _CANDIDATES:
        try:
            if set(wanted) <= set(_dialect(text, head, delimiter).names):
                return delimiter
        except DataError:
            continue
    return None


def csv_batches(
    text: Text, dialect: Dialect, columns: Sequence[int], bad: BadRows
) -> Iterator[tuple[pa.RecordBatch, IntArray]]:
    """Yield bounded batches of CSV columns as binary text, named by their places, with the line of each row.

    Args:
        text: the file.
        dialect: of the file.
        columns: places of the columns wanted, from 0.
        bad: receives lines that are no rows, and rows with a wrong number of columns.

    Raises:
        DataError: the file is no CSV.
    """
    blocks = text.blocks()
    if dialect.spaced:
        blocks = _without_blanks(blocks, dialect.delimiter)
    header = dialect.has_header
    for records in Scanner(dialect.delimiter, len(dialect.names)).records(blocks):
        for damage in records.damages:
            bad.add(
                os.path.basename(text.name), damage.lines, damage.reason, [damage.text] * len(damage.lines)
            )
        if header and len(records.starts):
            records, header = _behind_first(records), False
        if len(records.starts):
            yield from _parse(text.name, dialect, records, columns, bad)


def _parse(
    name: str, dialect: Dialect, records: Records, columns: Sequence[int], bad: BadRows
) -> Iterator[tuple[pa.RecordBatch, IntArray]]:
    file = os.path.basename(name)
    try:
        records.data.decode()
        table, odd = _read(name, dialect, records, columns)
    except UnicodeDecodeError:
        # Arrow tells of a row that it leaves out only where it is UTF-8; of other bytes each is a character.
        latin = dataclasses.replace(records, data=records.data.decode("latin-1").encode())
        _, odd = _read(name, dialect, latin, [])
        odd = [
            (at, reason, text.encode("latin-1", "replace").decode("utf-8", "replace"))
            for at, reason, text in odd
        ]
        table, _ = _read(name, dialect, _without(records, [at for at, _, _ in odd]), columns)
    for at, reason, text in odd:
        bad.add(file, [records.lines[at]], reason, [text])
    rows = np.delete(records.lines, [at for at, _, _ in odd])
    if len(rows) != table.num_rows:
        raise DataError(
            f"{name} can not be read as CSV: lines {records.lines[0]} to {records.lines[-1]} are "
            f"{len(rows)} rows by their line ends and {table.num_rows} by their quotes; correct the quotes"
        )
    if table.num_rows:
        yield table.combine_chunks().to_batches()[0], rows


def _read(
    name: str, dialect: Dialect, records: Records, columns: Sequence[int]
) -> tuple[pa.Table, list[tuple[int, str, str]]]:
    """Return columns of records, and of those with a wrong number of columns place, reason and text."""
    odd: list[tuple[int, str, str]] = []

    def on_invalid(row: Any) -> str:
        # The number is known, from 1, when one thread reads.
        reason = f"with {row.actual_columns} columns instead of {row.expected_columns}"
        odd.append((row.number - 1, reason, row.text[:80]))
        return "skip"

    places = [str(at) for at in columns]
    if not len(records.starts):
        return pa.table({place: pa.array([], pa.binary()) for place in places}), odd
    try:
        table = pa_csv.read_csv(
            pa.py_buffer(records.data),
            read_options=pa_csv.ReadOptions(
                use_threads=False,
                block_size=len(records.data) + 1,
                column_names=[str(at) for at in range(len(dialect.names))],
            ),
            parse_options=pa_csv.ParseOptions(
                delimiter=dialect.delimiter, newlines_in_values=True, invalid_row_handler=on_invalid
            ),
            convert_options=pa_csv.ConvertOptions(
                include_columns=places,
                column_types={place: pa.binary() for place in places},
                strings_can_be_null=True,
                null_values=[""],
                quoted_strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid as error:
        raise DataError(f"{name} can not be read as CSV near line {records.lines[0]}: {error}") from None
    return table, odd


def _without(records: Records, places: list[int]) -> Records:
    stops = np.append(records.starts[1:], len(records.data))
    kept = np.delete(np.arange(len(stops)), places)
    pairs = zip(records.starts[kept].tolist(), stops[kept].tolist(), strict=True)
    data = b"".join(records.data[a:b] for a, b in pairs)
    sizes = (stops - records.starts)[kept]
    return Records(data, np.cumsum(sizes) - sizes, records.lines[kept], records.begins[kept], [])


def _behind_first(records: Records) -> Records:
    cut = int(records.starts[1]) if len(records.starts) > 1 else len(records.data)
    return dataclasses.replace(
        records,
        data=records.data[cut:],
        starts=records.starts[1:] - cut,
        lines=records.lines[1:],
        begins=records.begins[1:],
    )


def _without_blanks(blocks: Iterator[bytes], delimiter: str) -> Iterator[bytes]:
    """Yield the lines of text without the blanks between a delimiter and a quote that opens a cell."""
    d = re.escape(delimiter.encode())
    pattern = re.compile(rb'("(?:[^"]|"")*+")|(' + d + rb')[ \t]++(?=")')
    rest = b""
    for block in blocks:
        data = rest + block
        end = data.rfind(b"\n") + 1
        rest = data[end:]
        yield pattern.sub(rb"\1\2", data[:end])
    yield pattern.sub(rb"\1\2", rest)


def _dialect(text: Text, head: str, delimiter: str) -> Dialect:
    records = csv.reader(
        io.StringIO(head, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    try:
        names = next((row for row in records if row), [])
    except csv.Error as error:
        raise DataError(
            f"{text.name}: the column names in its first line can not be read ({error}); correct the quotes"
        ) from None
    if not any(names):
        raise DataError(f"{text.name} is empty; a CSV file starts with a line of column names")
    raw = [line.split(delimiter) for line in head.splitlines() if line][:2]
    spaced = delimiter != "\t" and any(
        len(cells) > 1 and all(cell.startswith((" ", "\t")) for cell in cells[1:]) for cells in raw
    )
    return Dialect(delimiter, [name.strip() for name in names], spaced=spaced)


def _first_line(head: str) -> str:
    return next((line for line in head.splitlines() if line), "")
