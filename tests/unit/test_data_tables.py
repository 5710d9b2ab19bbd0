"""Tables of every form: folders and their partitions, packings, delimiters, headers, names, and sizes."""

from __future__ import annotations

import bz2
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.datasets import files_config, grid, write_csv
from twotower import cells, progress
from twotower.config import parse_config
from twotower.data.interning import IdColumn, IdForm, Interner
from twotower.data.prepare import prepare
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


# ---- folders and packings


@pytest.mark.parametrize("packing", [".bz2", ".xz", ".zst", ".lz4"])
def test_packed_text_is_read_in_a_folder_and_by_name(tmp_path: Path, csv: Path, packing: str) -> None:
    expected = prepare(files_config(tmp_path, csv)).fingerprint
    header, *rows = csv.read_text().splitlines(keepends=True)
    folder = tmp_path / "ev"
    folder.mkdir()
    (folder / "a.csv").write_text(header + "".join(rows[:30]))
    rest = (header + "".join(rows[30:])).encode()
    packed = {".bz2": bz2.compress, ".xz": lzma.compress}
    path = folder / f"b.csv{packing}"
    if packing in packed:
        path.write_bytes(packed[packing](rest))
    else:
        with pa.CompressedOutputStream(str(path), {".zst": "zstd", ".lz4": "lz4"}[packing]) as out:
            out.write(rest)
    for named in (folder, folder / "*"):
        assert prepare(files_config(tmp_path, named)).fingerprint == expected


def test_a_folder_with_files_of_unknown_kind_is_refused(tmp_path: Path, csv: Path) -> None:
    folder = tmp_path / "ev"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.csv").write_bytes(csv.read_bytes())
    for name in ("_SUCCESS", ".a.csv.crc", "_temporary"):
        (folder / name).write_text("x")
    expected = prepare(files_config(tmp_path, csv)).fingerprint
    assert prepare(files_config(tmp_path, folder)).fingerprint == expected
    assert prepare(files_config(tmp_path, folder / "*.csv")).fingerprint == expected
    (folder / "sub" / "b.csv.Z").write_text("x")
    with pytest.raises(
        DataError, match=r"also holds sub/b\.csv\.Z, of no kind that can be read .*a glob such"
    ):
        prepare(files_config(tmp_path, folder))
    with pytest.raises(DataError, match=r"b\.csv\.Z is of no kind that can be read"):
        prepare(files_config(tmp_path, folder / "**"))


def test_folders_of_a_glob_are_tables_as_spark_writes_them(tmp_path: Path, csv: Path) -> None:
    frame = pd.read_csv(csv)
    for name, part in (("one.parquet", frame[:30]), ("two.parquet", frame[30:])):
        (tmp_path / "ev" / name).mkdir(parents=True)
        part.to_parquet(tmp_path / "ev" / name / "part-0.snappy.parquet")
        (tmp_path / "ev" / name / "_SUCCESS").write_text("")
    expected = prepare(files_config(tmp_path, csv)).fingerprint
    assert prepare(files_config(tmp_path, tmp_path / "ev" / "*.parquet")).fingerprint == expected


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_partitions_of_folders_are_columns(tmp_path: Path, kind: str) -> None:
    frame = pd.DataFrame(grid(), columns=HEADER)
    frame["day"] = [f"2024-01-{1 + n % 9:02}" for n in range(len(frame))]
    frame["kind"] = [("buy", "a/b")[n % 2] for n in range(len(frame))]
    frame = frame.sort_values(["day", "kind"], kind="stable")
    for (day, event), part in frame.groupby(["day", "kind"]):
        folder = tmp_path / "ev" / f"day={day}" / f"kind={event.replace('/', '%2F')}"
        folder.mkdir(parents=True)
        part = part[["who", "what"]]
        if kind == "csv":
            part.to_csv(folder / "part-0.csv", index=False)
        else:
            part.to_parquet(folder / "part-0.parquet", index=False)
    frame.to_csv(tmp_path / "whole.csv", index=False)
    columns = {"user": "who", "item": "what", "time": "day", "event": "kind"}
    rules = {"data__source__columns": columns, "data__source__events": {"buy": 1.0, "a/b": 0.5}}
    expected = prepare(files_config(tmp_path, tmp_path / "whole.csv", **rules))
    for path in ("ev", "ev/*", "ev/day=*/kind=*/*"):
        dataset = prepare(files_config(tmp_path, tmp_path / path, **rules))
        found, wanted = dataset.interactions, expected.interactions
        assert sorted(found.time.tolist()) == sorted(wanted.time.tolist())
        assert sorted(found.weight.tolist()) == sorted(wanted.weight.tolist())
    with pytest.raises(DataError, match=r"has no column 'hour'.*its columns are who, what, day, kind"):
        prepare(files_config(tmp_path, tmp_path / "ev", data__source__columns={**columns, "time": "hour"}))


# ---- delimiters, headers, names


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_a_delimiter_is_taken_from_the_header(tmp_path: Path, csv: Path, delimiter: str) -> None:
    expected = prepare(files_config(tmp_path, csv)).fingerprint
    path = tmp_path / "other.csv"
    path.write_text("\ufeff" + csv.read_text().replace(",", delimiter))
    assert prepare(files_config(tmp_path, path)).fingerprint == expected
    declared = files_config(tmp_path, path, data__source__delimiter=delimiter)
    assert prepare(declared).fingerprint == expected


def test_a_delimiter_that_is_not_sure_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("who;what|when\n")
    with pytest.raises(DataError, match=r"may be delimited by ';' or '\|'; set data\.source\.delimiter"):
        prepare(files_config(tmp_path, path))
    path.write_text("who;what;when;name, given\n")
    with pytest.raises(DataError, match="has no column 'who'.* set data.source.delimiter: ';' to find all"):
        prepare(files_config(tmp_path, path))


def test_blanks_around_names_and_cells_are_none_of_them(tmp_path: Path, csv: Path) -> None:
    expected = prepare(files_config(tmp_path, csv)).fingerprint
    path = tmp_path / "spaced.csv"
    path.write_text(csv.read_text().replace(",", ", "))
    assert prepare(files_config(tmp_path, path)).fingerprint == expected
    items = tmp_path / "items.csv"
    items.write_text('sku , name\n i0, "One, or  two"\ni1 , "He said ""no"", \nand went"\n')
    table = {"path": str(items), "id": "sku", "title": "name"}
    dataset = prepare(files_config(tmp_path, path, data__source__items=table))
    found = dataset.item_table(["item_id", "title"]).to_pydict()
    assert found["item_id"][:2] == ["i0", "i1"]
    assert found["title"][:2] == ["One, or  two", 'He said "no", \nand went']


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_repeated_column_is_refused_where_it_is_used(tmp_path: Path, csv: Path, kind: str) -> None:
    path = tmp_path / f"twice.{kind}"

    def write(names: list[str]) -> None:
        columns = [list(c) for c in zip(*grid(), strict=True)]
        table = pa.Table.from_arrays([pa.array(columns[n % 3]) for n in range(len(names))], names=names)
        if kind == "csv":
            lines = [names, *zip(*(columns[n % 3] for n in range(len(names))), strict=True)]
            path.write_text("\n".join(",".join(map(str, line)) for line in lines) + "\n")
        else:
            pq.write_table(table, path)

    write(["who", "what", "when", "note", "note"])
    assert (
        prepare(files_config(tmp_path, path)).fingerprint == prepare(files_config(tmp_path, csv)).fingerprint
    )
    write(["who", "what", "when", "who", "what"])
    with pytest.raises(DataError, match="has more than one column 'what', 'who'; rename them") as error:
        prepare(files_config(tmp_path, path))
    assert "\n" not in str(error.value)


def own_columns(
    tmp_path: Path, csv: Path, features: list[dict[str, Any]] | None = None, **changes: Any
) -> Any:
    rows = [[f"family{n % 3}", f"i{n}", f"T{n}", f"own{n}", n] for n in range(23)]
    items = write_csv(tmp_path / "items.csv", ["item_id", "sku", "name", "title", "item_row"], rows)
    table = {"path": str(items), "id": "sku", "title": "name"}
    if features is not None:
        changes["features__item"] = [{"name": "item_id", "type": "id"}, *features]
    return prepare(files_config(tmp_path, csv, data__source__items=table, **changes))


@pytest.mark.parametrize("column", ["item_id", "title", "item_row"])
def test_a_files_own_column_is_never_another_one_under_its_name(
    tmp_path: Path, csv: Path, column: str, said: list[str]
) -> None:
    dataset = own_columns(tmp_path, csv)
    first = {"item_id": "i0", "title": "T0", "name": "T0"}
    assert dataset.item_table().slice(0, 1).to_pylist() == [first]
    assert any(f"its own column '{column}' is not kept" in line for line in said)
    message = f"asks for column '{column}' of items.csv, but that name stands for .*; rename the column"
    with pytest.raises(ConfigError, match=f"features.item 'family' {message}"):
        own_columns(tmp_path, csv, [{"name": "family", "type": "categorical", "column": column}])
    with pytest.raises(ConfigError, match=f"index.attributes.family {message}"):
        own_columns(tmp_path, csv, index__attributes={"family": {"column": column}})


def test_a_users_own_column_is_never_another_one_under_its_name(tmp_path: Path, csv: Path) -> None:
    users = write_csv(
        tmp_path / "users.csv", ["user_id", "key"], [[f"team{n % 2}", f"u{n}"] for n in range(7)]
    )
    features = [{"name": "history", "type": "history"}, {"name": "user_id", "type": "categorical"}]
    table = {"path": str(users), "id": "key"}
    with pytest.raises(ConfigError, match="features.query 'user_id' asks for column 'user_id' of users.csv"):
        prepare(files_config(tmp_path, csv, data__source__users=table, features__query=features))


# ---- event types that are numbers


@pytest.mark.parametrize("kind", ["int8", "int64", "float64", "csv", "text"])
def test_event_types_may_be_whole_numbers(tmp_path: Path, kind: str) -> None:
    frame = pd.DataFrame(grid(), columns=HEADER)
    frame["e"] = [n % 3 for n in range(len(frame))]
    columns = {"user": "who", "item": "what", "time": "when", "time_unit": "s", "event": "e"}
    path = tmp_path / ("log.csv" if kind == "csv" else "log.parquet")
    if kind == "csv":
        frame.to_csv(path, index=False)
    else:
        frame["e"] = frame["e"].astype(str if kind == "text" else kind)
        frame.to_parquet(path)
    text = "data: {source: {events: {0: 0.25, 1: seen_only, '2': 1.0}}}"
    events = yaml.safe_load(text)["data"]["source"]["events"]
    changes = {"data__source__columns": columns, "data__source__events": events}
    dataset = prepare(files_config(tmp_path, path, **changes))
    assert dataset.counts["bad_rows"] == 0
    assert sorted(dataset.interactions.weight.tolist()) == sorted([0.25] * 24 + [1.0] * 46)
    assert dataset.counts["kinds"]["seen_only"] == 23


def test_an_event_type_that_yaml_reads_otherwise_is_told_to_be_quoted(tmp_path: Path) -> None:
    events = yaml.safe_load("{on: 1.0, view: seen_only}")
    config = {"data": {"source": {"kind": "files", "interactions": "x.csv", "events": events}}}
    with pytest.raises(
        ConfigError, match="event type True is a word that YAML reads otherwise; put it in quotes"
    ):
        parse_config(config)


# ---- more text than a column can hold


def test_more_text_than_a_column_can_hold_is_refused_while_it_is_read(
    tmp_path: Path, csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = write_csv(tmp_path / "items.csv", ["sku", "note"], [[f"i{n}", "x" * 50] for n in range(23)])
    parts = tmp_path / "parts"
    parts.mkdir()
    for n in range(23):
        frame = pd.DataFrame({"sku": [f"i{n}"], "note": pd.Categorical(["x" * 50])})
        frame.to_parquet(parts / f"{n:02}.parquet")
    monkeypatch.setattr(cells, "MAX_BYTES", 400)
    for path in (items, parts):
        with pytest.raises(DataError, match=r"column 'note' of .* holds .* bytes of text") as error:
            prepare(files_config(tmp_path, csv, data__source__items={"path": str(path), "id": "sku"}))
        assert "\n" not in str(error.value)
    monkeypatch.setattr(cells, "MAX_BYTES", 30)
    ids, every = Interner(), np.ones(4, np.bool_)
    ids.intern(IdColumn(pa.array(["aaaaaaaaaa", "b", "aaaaaaaaaa", "b"]), IdForm("item")), every)
    ids.intern(
        IdColumn(pa.array(["aaaaaaaaaa", "b", "c", "c"]), IdForm("item")), every
    )  # known ones take no room
    assert len(ids) == 3
    with pytest.raises(DataError, match=r"a column of 7 different ids holds 52 bytes of text and maybe more"):
        ids.intern(IdColumn(pa.array([c * 10 for c in "defg"]), IdForm("item")), every)
    with pytest.raises(DataError, match=r"different ids holds"):
        Interner().add([c * 10 for c in "defg"])


def test_the_size_of_a_column_counts_what_its_rows_hold() -> None:
    wide = pa.array(["ab", None, "cde", "é"])
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()):
        assert cells.text_bytes(wide.cast(kind)) == 7, kind
    assert cells.text_bytes(wide.slice(2)) == 5
    repeated = pa.array(["ab"] * 1_000).dictionary_encode()
    assert cells.text_bytes(repeated) == 2_000
    assert cells.text_bytes(pa.array([b"abcd"] * 3, pa.binary(4))) == 12
    assert cells.text_bytes(pa.array([1, 2])) == 0
