"""CSV text: what is well formed is read as it stands; what is damaged is counted, never read as values."""

from __future__ import annotations

import csv
import io
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.datasets import files_config
from twotower.data.chunks import BadRows
from twotower.data.interning import Interner
from twotower.data.reading import read_interactions
from twotower.data.sources import csv_files, open_source
from twotower.data.sources.csv_records import Scanner

FILES = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
CELL = st.text(st.sampled_from('ab,;" \n\r\té1'), max_size=8)
TABLE = st.lists(st.lists(CELL, min_size=3, max_size=3), min_size=1, max_size=12)


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def read(data: bytes, delimiter: str = ",", width: int = 3) -> tuple[list[list[str]], list[int], BadRows]:
    """All rows, the line of each, and what was no row."""
    dialect = csv_files.Dialect(delimiter, [str(n) for n in range(width)], has_header=False)
    bad = BadRows("drop")
    rows: list[list[str]] = []
    lines: list[int] = []
    text = csv_files.Text(lambda: io.BytesIO(data), "x.csv")
    for batch, numbers in csv_files.csv_batches(text, dialect, range(width), bad):
        rows += [[(v or b"").decode() for v in row.values()] for row in batch.to_pylist()]
        lines += numbers.tolist()
    return rows, lines, bad


@FILES
@given(TABLE, st.sampled_from([",", ";", "\t"]), st.sampled_from(["\n", "\r\n"]), st.integers(1, 40))
def test_well_formed_records_are_found_whatever_the_blocks(
    table: list[list[str]], delimiter: str, line_end: str, size: int
) -> None:
    # Rows that look like no other row, so that no cell seems to have swallowed one.
    table = [[f"id {n} {'x' * n}", *row[1:]] for n, row in enumerate(table)]
    cells = "".join(cell for row in table for cell in row)
    assume(delimiter not in cells or not ("\n" in cells or "\r" in cells))
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, lineterminator=line_end, quoting=csv.QUOTE_ALL).writerows(table)
    data = out.getvalue().encode()
    scanner = Scanner(delimiter, 3)
    found = list(scanner.records(cut(data, size)))
    texts = [r.data[a:b] for r in found for a, b in pairwise([*r.starts.tolist(), len(r.data)])]
    expected = [next(csv.reader(io.StringIO(t.decode(), newline=""), delimiter=delimiter)) for t in texts]
    assert not [d for r in found for d in r.damages]
    assert expected == table
    begins = [b for r in found for b in r.begins.tolist()]
    assert [data[b : b + len(t)] for b, t in zip(begins, texts, strict=True)] == texts
    lines = [line for r in found for line in r.lines.tolist()]
    ends = io.StringIO(out.getvalue(), newline=None)  # line ends of every kind are one character here
    normal = ends.read()
    at = 0
    for text, line in zip(texts, lines, strict=True):
        assert normal.count("\n", 0, at) + 1 == line
        at += len(text.decode().replace("\r\n", "\n"))
    rows, _, bad = read(data, delimiter)
    assert not bad.count
    assert rows == [[cell for cell in row] for row in table]


@FILES
@given(
    TABLE, st.lists(st.tuples(st.integers(0, 400), st.sampled_from('",\n\r')), max_size=3), st.integers(1, 50)
)
def test_damage_does_not_depend_on_blocks_and_loses_no_line(
    table: list[list[str]], strokes: list[tuple[int, str]], size: int
) -> None:
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows(table)
    text = out.getvalue()
    for at, stroke in strokes:
        at %= len(text) + 1
        text = text[:at] + stroke + text[at:]
    data = text.encode()

    def scan(size: int) -> tuple[list[Any], ...]:
        found = list(Scanner(",", 3).records(cut(data, size)))
        return (
            [n for r in found for n in r.lines.tolist()],
            [n for r in found for n in r.begins.tolist()],
            [(d.lines, d.reason, d.begin) for r in found for d in r.damages],
            [b"".join(r.data for r in found)],
        )

    whole = scan(len(data) + 1)
    assert scan(size) == whole
    lines, _, damages, (kept,) = whole
    assert len(kept) + sum(
        len(b"".join(data.splitlines(keepends=True)[n - 1] for n in numbers)) for numbers, _, _ in damages
    ) == len(data)
    assert not set(lines) & {n for numbers, _, _ in damages for n in numbers}


ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 500)), min_size=6, max_size=40)
STROKES = st.lists(
    st.tuples(st.integers(0, 10_000), st.sampled_from(['"', ",", '"\n', "\xff", ' "', '""', "\n", ",,"])),
    max_size=4,
)


@FILES
@given(ROWS, STROKES, st.booleans())
def test_every_row_that_is_read_is_used_or_counted(
    rows: list[tuple[int, int, int]], strokes: list[tuple[int, str]], quoted: bool
) -> None:
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL)
    writer.writerows([f"u{u}", f"i{i}", time] for u, i, time in rows)
    body = out.getvalue().encode("latin-1")
    for at, stroke in strokes:
        at %= len(body) + 1
        body = body[:at] + stroke.encode("latin-1") + body[at:]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.csv"
        path.write_bytes(b"who,what,when\n" + body)
        window = {"start": "1970-01-01T00:01:00"}
        config = files_config(Path(folder), path, data__window=window)
        bad = BadRows("drop")
        raw = read_interactions(open_source(config), config.data, Interner(), bad)
    lines = [line for line in body.replace(b"\r", b"\n").split(b"\n") if line]
    assert raw.rows_read == len(lines) - spanned(body)
    assert raw.rows_read == len(raw.columns["user_row"]) + bad.count + raw.outside_window
    assert sum(bad.reasons.values()) == bad.count
    assert len(bad.examples) == len(bad.reasons)


def spanned(body: bytes) -> int:
    """Lines that are the further lines of a cell which is well formed: its record counts once."""
    found = list(Scanner(",", 3).records([body]))
    text = b"".join(r.data for r in found)
    records = sum(len(r.starts) for r in found)
    return len([line for line in text.split(b"\n") if line]) - records
