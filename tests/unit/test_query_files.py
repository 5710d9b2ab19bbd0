"""Files of queries: what is read of any range, and of each kind of file."""

from __future__ import annotations

import datetime
import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.data.query_files import find_query_files, read_rows, scan
from twotower.errors import DataError


def read(path: Path, stride: int = 1, step: int = 1, first: int = 0) -> list[tuple[int, Any]]:
    """All rows, range by range."""
    ranges = scan(path, stride).ranges(first, step)
    assert [r["start"] for r in ranges] == list(range(first, ranges[-1]["stop"] if ranges else first, step))
    return [row for part in ranges for row in read_rows(part)]


def test_lines_of_json_keep_their_numbers(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"user_id": "\xc3\xa9"}\r\n\n{"history": ["1", 2]}\n  \n{}\n{"at": null}'
    path = tmp_path / "q.jsonl"
    path.write_bytes(content)
    expected = [(1, {"user_id": "é"}), (3, {"history": ["1", 2]}), (5, {}), (6, {"at": None})]
    for stride, step in ((1, 1), (1, 2), (1, 3), (2, 2), (2, 4), (3, 3), (64, 64)):
        assert read(path, stride, step) == expected, (stride, step)
    assert scan(path, 1).sha256 == hashlib.sha256(content).hexdigest()


def test_cells_of_csv_hold_json_and_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_bytes(
        b"\xef\xbb\xbfquery_id,history,k,exclude_seen,at\r\n"
        b'7,"[""1"",\n {""item_id"": ""a,\xc3\xa9\n\n""}]",3,false,2026-01-31\r\n'
        b"\r\n"
        b'"a ""b""\n",,,,\r\n'
        b"5 inch\",[],,,\r\n"
        b"last,,9,,\r\n"
    )  # fmt: skip
    history = ["1", {"item_id": "a,é\n\n"}]
    # JSON has no line ends inside of a text.
    with_line_end = read(path)[0][1]
    assert isinstance(with_line_end, DataError)
    assert "history: " in str(with_line_end)
    path.write_bytes(path.read_bytes().replace(b"\xa9\n\n", b"\xa9\\n\\n"))
    expected = [
        (2, {"query_id": "7", "history": history, "k": 3, "exclude_seen": False, "at": "2026-01-31"}),
        (5, {"query_id": 'a "b"\n'}),
        (7, {"query_id": '5 inch"', "history": []}),
        (8, {"query_id": "last", "k": 9}),
    ]
    for stride, step in ((1, 1), (1, 3), (2, 2), (64, 64)):
        assert read(path, stride, step) == expected, (stride, step)


def test_columns_of_parquet_become_json_values(tmp_path: Path) -> None:
    time = datetime.datetime(2026, 1, 31, 10, tzinfo=datetime.UTC)
    history = pa.list_(
        pa.struct([("item_id", pa.int64()), ("time", pa.timestamp("ns", "UTC")), ("weight", pa.float32())])
    )
    table = pa.table(
        {
            "user_id": pa.array([5, None, 7], pa.int32()),
            "history": pa.array(
                [[{"item_id": 1, "time": time, "weight": 0.5}], None, [{"item_id": 2}]], history
            ),
            "at": pa.array([time.replace(tzinfo=None), None, None], pa.timestamp("ms")),
            "features": pa.array([[("age", 3)], None, []], pa.map_(pa.string(), pa.int64())),
            "filter": pa.array(['{"year": {"gte": 3}}', None, "{}"], pa.large_string()),
            "exclude_items": pa.array([["a"], [], None], pa.list_(pa.string()))
        }
    )  # fmt: skip
    path = tmp_path / "q.parquet"
    pq.write_table(table, path, row_group_size=2)
    expected = [
        (
            1,
            {
                "user_id": 5,
                "history": [{"item_id": 1, "time": "2026-01-31T10:00:00+00:00", "weight": 0.5}],
                "at": "2026-01-31T10:00:00",
                "features": {"age": 3},
                "filter": {"year": {"gte": 3}},
                "exclude_items": ["a"],
            },
        ),
        (2, {"exclude_items": []}),
        (3, {"user_id": 7, "history": [{"item_id": 2}], "features": {}, "filter": {}}),
    ]
    for step in (1, 2, 3):
        assert read(path, 1, step) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.jsonl", b'{"a": 1\n', "is not JSON"),
        ("q.jsonl", b'"text"\n', "is not a JSON object"),
        ("q.jsonl", b'{"user_id": "\xff"}\n', "is not JSON"),
        ("q.csv", b"user_id,k\n1\n", "has 1 columns instead of 2"),
        ("q.csv", b"user_id,k\n1,2,3\n", "has 3 columns instead of 2"),
        ("q.csv", b"user_id,k\n\xff,2\n", "is not UTF-8"),
        ("q.csv", b"user_id,history\n1,a|b\n", r"history: a\|b is not JSON"),
        ("q.tsv", b"user_id\texclude_seen\n1\tTrue\n", "exclude_seen: True is not JSON"),
    ],
)
def test_a_bad_row_does_not_hide_the_next(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    good = {"q.jsonl": b"{}\n", "q.csv": b"7,\n", "q.tsv": b"7\t\n"}[name]
    path.write_bytes(content + good)
    (_, bad), (_, values) = read(path)
    assert isinstance(bad, DataError)
    with pytest.raises(DataError, match=message):
        raise bad
    assert values == ({} if name == "q.jsonl" else {"user_id": "7"})


def test_a_quote_that_is_not_closed_is_no_row_without_end(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_bytes(b'user_id\n1\n"2\n' + b"3\n" * 1_000)
    for stride, step in ((1, 1), (1, 7), (64, 128), (2_000, 2_000)):
        rows = read(path, stride, step)
        assert [number for number, _ in rows] == list(range(2, 1_004)), (stride, step)
        (bad,) = [(number, values) for number, values in rows if isinstance(values, DataError)]
        assert bad[0] == 3
        assert "quote that opens a cell and is not closed" in str(bad[1])
        assert rows[-1][1] == {"user_id": "3"}


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("{}\n{}\n")
    (part,) = scan(path, 64).ranges(0, 64)
    path.write_text('{}\n{"a": 1}\n')
    with pytest.raises(DataError, match="was changed while the job ran; run it again"):
        list(read_rows(part))


def test_files_are_found_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.csv", "c.parquet", ".hidden.csv"):
        (tmp_path / name).write_text("x")
    assert [p.name for p in find_query_files(str(tmp_path), "--queries")] == ["a.csv", "b.jsonl", "c.parquet"]
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"--queries: folder .* also holds notes\.txt, of no kind"):
        find_query_files(str(tmp_path), "--queries")
    with pytest.raises(DataError, match=r"--queries: .*notes\.txt is of no kind that can be read; use "):
        find_query_files(str(tmp_path / "notes.txt"), "--queries")
