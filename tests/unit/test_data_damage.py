"""Damaged text: a quote that is not closed, bytes that are no UTF-8, files that end too soon."""

from __future__ import annotations

import bz2
import gzip
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.datasets import files_config, grid, write_csv
from twotower import progress
from twotower.data.item_files import read_item_ids, read_items, read_user_ids
from twotower.data.prepare import prepare
from twotower.data.sources import csv_records
from twotower.errors import ConfigError, DataError

HEADER = ["who", "what", "when"]


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "log.csv", HEADER, grid())


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(progress, "say", lines.append)
    return lines


def items_of(
    tmp_path: Path, csv: Path, text: str | bytes, encoding: str | None = None, **changes: Any
) -> Any:
    path = tmp_path / "items.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    table = {"path": str(path), "id": "id", "title": "name", "encoding": encoding}
    return prepare(files_config(tmp_path, csv, data__source__items=table, **changes))


# ---- quotes


def titled(count: int = 300) -> list[str]:
    return [f"i{n},Title {n}" for n in range(count)]


DAMAGE = {
    # What stands in line 5 (i3) and maybe later, and the reason; no other row is lost.
    "never closed": ({3: 'i3,"Weird title 3'}, "with a quote that opens a cell and is not closed"),
    "closed by the next quoted cell": (
        {3: 'i3,"Weird title 3', 9: 'i9,"Title, 9"'},
        "with text behind a closing quote",
    ),
    "closed by a stray quote at the end of a later line": (
        {3: 'i3,"Weird title 3', 90: 'i90,Title 90"'},
        "closed only behind lines that look like rows",
    ),
    "closed by a stray quote at the end of the next line": (
        {3: 'i3,"Weird title 3', 4: 'i4,Title 4"'},
        "closed only behind lines that look like rows",
    ),
    "closed far away, behind a few lines that are no rows": (
        {3: 'i3,"Weird title 3', 7: "i7,Title, 7", 90: 'i90,Title 90"'},
        "closed only behind lines that look like rows",
    ),
    "closed by a stray quote, of a title that was quoted for its comma": (
        {3: 'i3,"Weird title, 3', 90: 'i90,Title 90"'},
        "closed only behind lines that look like rows",
    ),
    "an empty quoted cell is a doubled quote to it": (
        {3: 'i3,"Weird title 3', 5: 'i5,""'},
        "with a quote that opens a cell and is not closed",
    ),
    "opens the line": ({3: '"i3,Weird title 3'}, "with a quote that opens a cell and is not closed"),
    "a quote inside is not doubled": ({3: 'i3,"A 5" screen"'}, "with text behind a closing quote"),
    "a quote inside is escaped": ({3: 'i3,"A 5\\" screen"'}, "with a quote escaped by a backslash"),
}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("case", list(DAMAGE))
def test_a_damaged_quote_costs_its_own_line_and_no_other(
    tmp_path: Path, csv: Path, case: str, end: str
) -> None:
    changed, reason = DAMAGE[case]
    lines = titled()
    for at, line in changed.items():
        lines[at] = line
    text = end.join(["id,name", *lines]) + end
    with pytest.raises(DataError, match="items.csv row 5: ") as error:
        items_of(tmp_path, csv, text)
    assert reason in str(error.value)
    dataset = items_of(tmp_path, csv, text, data__on_bad_rows="drop")
    titles = dict(zip(*dataset.item_table(["item_id", "title"]).to_pydict().values(), strict=True))
    odd = sum(line.count(",") > 1 and '"' not in line for line in changed.values())
    assert dataset.counts["bad_rows"] == 1 + odd
    assert len(titles) == 300 - 1 - odd
    assert "i3" not in titles
    assert titles["i4"] == ('Title 4"' if 4 in changed else "Title 4")
    assert titles["i299"] == "Title 299"


def test_an_open_quote_in_a_log_costs_one_row(tmp_path: Path, csv: Path) -> None:
    lines = csv.read_text().splitlines()
    lines[12] = '"' + lines[12]
    lines[40] = lines[40].replace(",", '",', 1)
    csv.write_text("\n".join(lines) + "\n")
    with pytest.raises(
        DataError, match=r"log\.csv row 13: with a quote that opens a cell and is closed only"
    ):
        prepare(files_config(tmp_path, csv))
    dataset = prepare(files_config(tmp_path, csv, data__on_bad_rows="drop"))
    counts = dataset.counts
    assert (counts["rows_read"], counts["bad_rows"], counts["interactions"]) == (70, 1, 69)
    assert dataset.user_ids.row('u3"') is not None  # the other stray quote is in the middle of a cell: text


def test_line_breaks_in_quoted_cells_are_text(tmp_path: Path, csv: Path) -> None:
    titles = {
        "i0": "Big, bright\nand warm, as ever",
        "i1": 'A 5" screen\n\n"quoted", here',
        "i2": "Size:\n12,5 cm\n20,5 cm",
        "i3": "one\r\ntwo",
        "i4": "Ingredients:\n- salt\n- sugar, brown",
        "i5": 'ends with a quote"',
        "i6": "",
    }
    rows = ['{},"{}"'.format(i, t.replace('"', '""')) for i, t in titles.items()]
    text = "\n".join(["id,name", *rows, 'i7,a 5" screen', 'i8,"a"" b"']) + "\n"
    dataset = items_of(tmp_path, csv, text)
    assert dataset.counts["bad_rows"] == 0
    found = dict(zip(*dataset.item_table(["item_id", "title"]).to_pydict().values(), strict=True))
    assert found == titles | {"i6": found["i6"], "i7": 'a 5" screen', "i8": 'a" b'}
    assert not found["i6"]


def test_what_stood_in_a_damaged_cell_is_no_row(tmp_path: Path, csv: Path) -> None:
    text = 'id,name\ni0,T\ni1,"a 5" screen\nbig and bright,really\nwarm,"\ni2,T\n'
    dataset = items_of(tmp_path, csv, text, data__on_bad_rows="drop")
    ids = dataset.item_table(["item_id"]).column("item_id").to_pylist()
    assert [i for i in ids if i in ("i0", "i1", "i2")] == ["i0", "i2"]
    assert "big and bright" not in ids
    reasons = dataset.counts["bad_rows_by_reason"]
    assert reasons["that look like a part of a quoted cell that is not closed"] >= 1


def test_no_more_than_a_bounded_text_is_held_to_find_a_closing_quote(
    tmp_path: Path, csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_records, "LONGEST_CELL", 1_000)
    lines = titled()
    lines[3] = 'i3,"Weird title 3'
    lines[250] = 'i250,"an end"'
    dataset = items_of(tmp_path, csv, "\n".join(["id,name", *lines]), data__on_bad_rows="drop")
    assert dataset.counts["bad_rows_by_reason"] == {"with a quote that opens a cell and is not closed": 1}
    assert dataset.item_table().num_rows == 299


def test_lists_of_ids_are_read_by_the_same_rules(tmp_path: Path, csv: Path) -> None:
    config = files_config(tmp_path, csv).data
    path = tmp_path / "gone.csv"
    path.write_text('who,what\nu1,"i1\nu2,i2\nu3,i3\n')
    with pytest.raises(DataError, match=r"gone\.csv row 2: with a quote that opens a cell and is not closed"):
        read_item_ids(config, str(path), "--remove")
    with pytest.raises(DataError, match=r"gone\.csv row 2: with a quote"):
        read_user_ids(config, str(path))
    path.write_bytes(b"who;what\nu1;caf\xe9\n")
    with pytest.raises(DataError, match="with a 'what' that is not UTF-8"):
        read_items(config, str(path))
    latin = config.model_copy(update={"source": config.source.model_copy(update={"encoding": "latin-1"})})
    assert read_item_ids(latin, str(path), "--remove") == ["café"]


# ---- text that is no UTF-8, or no text


LATIN = "id,name,shelf\n" + "".join(f"i{n},Café {n},{'Bar' if n % 2 else 'Café'}\n" for n in range(23))


def test_text_in_another_encoding_is_refused_until_it_is_declared(tmp_path: Path, csv: Path) -> None:
    with pytest.raises(DataError, match=r"23 with a 'name' that is not UTF-8 \(data\.source\.encoding"):
        items_of(tmp_path, csv, LATIN.encode("latin-1"))
    dropped = LATIN.replace("Café 3", "Cafe 3").encode("latin-1")
    dataset = items_of(tmp_path, csv, dropped, data__on_bad_rows="drop")
    assert sum(dataset.counts["bad_rows_by_reason"].values()) == dataset.counts["bad_rows"] == 22
    expected = items_of(tmp_path, csv, LATIN).fingerprint
    for encoding in ("latin-1", "cp1252"):
        data = LATIN.encode(encoding)
        assert items_of(tmp_path, csv, data, encoding=encoding).fingerprint == expected
    for encoding in ("utf-8-sig", "utf-16"):
        assert items_of(tmp_path, csv, LATIN.encode(encoding)).fingerprint == expected, encoding
    data = LATIN.encode("utf-16-le")
    with pytest.raises(DataError, match=r"zero bytes, so it is no UTF-8 text; .*encoding: utf-16-le"):
        items_of(tmp_path, csv, data)
    assert items_of(tmp_path, csv, data, encoding="utf-16-le").fingerprint == expected
    assert (
        items_of(tmp_path, csv, LATIN.encode("latin-1"), data__source__encoding="latin-1").fingerprint
        == expected
    )
    with pytest.raises(DataError, match=r"is not ascii text.*set data\.source\.encoding"):
        items_of(tmp_path, csv, LATIN, encoding="ascii")
    with pytest.raises(ConfigError, match="'klingon' is no text encoding"):
        items_of(tmp_path, csv, LATIN, encoding="klingon")


def test_a_row_of_a_wrong_width_and_another_encoding_is_counted(tmp_path: Path, csv: Path) -> None:
    text = LATIN.encode().replace(b"i3,Caf\xc3\xa9", b"i3,Caf\xe9,more").replace(b"i5,", b"i5,more,")
    dataset = items_of(tmp_path, csv, text, data__on_bad_rows="drop")
    assert dataset.counts["bad_rows_by_reason"] == {"with 4 columns instead of 3": 2}


def parquet(tmp_path: Path, csv: Path, features: list[Any] | None = None, **columns: Any) -> Any:
    ids = [f"i{n}" for n in range(23)]
    path = tmp_path / "items.parquet"
    pq.write_table(pa.table({"id": ids} | columns), path)
    table = {"path": str(path), "id": "id", **({"title": "name"} if "name" in columns else {})}
    changes = {} if features is None else {"features__item": features}
    return prepare(files_config(tmp_path, csv, data__source__items=table, **changes))


def test_bytes_of_parquet_are_text_everywhere(tmp_path: Path, csv: Path) -> None:
    names = [f"Café {n}" for n in range(23)]
    encoded = [name.encode() for name in names]
    features = [{"name": "item_id", "type": "id"}, {"name": "shelf", "type": "categorical"}]
    expected = parquet(tmp_path, csv, features, name=names, shelf=names).fingerprint
    for kind in (pa.binary(), pa.large_binary(), pa.binary_view(), pa.large_string(), pa.string_view()):
        value = pa.array(encoded).cast(pa.string()).cast(kind)
        assert parquet(tmp_path, csv, features, name=value, shelf=value).fingerprint == expected, kind
    frame = pd.read_csv(csv)
    frame["who"], frame["what"] = (frame[c].map(str.encode) for c in ("who", "what"))
    frame.to_parquet(tmp_path / "bytes.parquet")
    assert (
        prepare(files_config(tmp_path, tmp_path / "bytes.parquet")).fingerprint
        == prepare(files_config(tmp_path, csv)).fingerprint
    )


def test_bytes_that_are_no_text_are_refused_where_they_are_used(
    tmp_path: Path, csv: Path, said: list[str]
) -> None:
    blobs = [b"\xff\xfe" for _ in range(23)]
    with pytest.raises(DataError, match=r"23 with a 'name' that is not UTF-8"):
        parquet(tmp_path, csv, name=blobs)
    dataset = parquet(tmp_path, csv, picture=blobs)  # nobody asks for it
    assert dataset.counts["bad_rows"] == 0
    assert any("'picture' hold bytes that are no text" in line for line in said)
    features = [{"name": "item_id", "type": "id"}, {"name": "picture", "type": "categorical"}]
    with pytest.raises(DataError, match="column 'picture': a categorical feature holds text"):
        parquet(tmp_path, csv, features, picture=blobs)
    broken = pa.Array.from_buffers(pa.string(), 23, pa.array(blobs).buffers())
    with pytest.raises(DataError, match=r"23 with a 'shelf' that is not UTF-8"):
        parquet(tmp_path, csv, shelf=broken)
    table = pa.table({"who": ["u"] * 23, "what": broken, "when": range(23)})
    pq.write_table(table, tmp_path / "log.parquet")
    with pytest.raises(DataError, match=r"with a 'what' that is not UTF-8"):
        prepare(files_config(tmp_path, tmp_path / "log.parquet"))


def test_a_title_that_is_no_text_is_refused(tmp_path: Path, csv: Path, said: list[str]) -> None:
    lists = [["a", "b"]] * 23
    with pytest.raises(DataError, match=r"items\.title: column 'name' of items\.parquet is no title: .*list"):
        parquet(tmp_path, csv, name=lists)
    dataset = parquet(tmp_path, csv, title=lists)  # happens to be called so
    assert dataset.item_table().column("title").null_count == 23
    assert any("column 'title' of the item table is no title" in line for line in said)


# ---- files that are not what they seem


def broken_files(csv: Path) -> dict[str, tuple[bytes, str]]:
    text = csv.read_bytes() * 50
    packed = gzip.compress(text)
    parquet = csv.with_name("good.parquet")
    pd.read_csv(csv).to_parquet(parquet)
    return {
        "a.csv.gz": (packed[: len(packed) // 2], "truncated"),
        "b.csv.gz": (csv.read_bytes(), r"is not a readable file \(Not a gzipped file"),
        "c.csv.gz": (packed[:20] + b"\xff" * 20 + packed[40:], "is not a readable file"),
        "d.csv.bz2": (bz2.compress(text)[:40], "truncated"),
        "e.csv.zst": (b"hello", "is not a readable file"),
        "f.csv": (packed, "is compressed with gzip, not text; name it by its kind"),
        "g.csv": (parquet.read_bytes(), "is a Parquet file, not text"),
        "h.parquet": (parquet.read_bytes()[:-40], "is not a readable Parquet file"),
        "i.parquet": (b"", "is not a readable Parquet file"),
        "j.csv": (b"", "is empty; a CSV file starts with a line of column names"),
        "k.csv": (b"\n\n", "is empty"),
        "l.csv": (b'"who,what,when\n1,2,3\n', "column names in its first line can not be read"),
        "m.csv.gz": (b"", "is empty"),
    }  # fmt: skip


NAMES = [
    "a.csv.gz",
    "b.csv.gz",
    "c.csv.gz",
    "d.csv.bz2",
    "e.csv.zst",
    "f.csv",
    "g.csv",
    "h.parquet",
    "i.parquet",
    "j.csv",
    "k.csv",
    "l.csv",
    "m.csv.gz",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_not_what_it_seems_is_one_line(tmp_path: Path, csv: Path, name: str) -> None:
    content, message = broken_files(csv)[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        prepare(files_config(tmp_path, tmp_path / name))
    assert name in str(error.value)
    assert "\n" not in str(error.value)
