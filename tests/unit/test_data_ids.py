"""Ids that pandas made floats, and those that a spreadsheet shortened, wherever ids enter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.datasets import files_config, grid, write_csv
from twotower.data.item_files import read_item_ids, read_items, read_user_ids
from twotower.data.prepare import prepare
from twotower.data.query_files import read_rows, scan
from twotower.errors import DataError

HEADER = ["who", "what", "when"]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("twotower.progress.say", lines.append)
    return lines


def customers() -> pd.DataFrame:
    """Customers 17850 to 17856, integers with gaps, as pandas holds them."""
    frame = pd.DataFrame(grid(), columns=HEADER)
    frame["who"] = 17850.0 + np.arange(len(frame)) // 10
    frame.loc[::10, "who"] = np.nan
    return frame


@pytest.mark.parametrize("form", ["csv", "parquet", "text", "decimal"])
def test_whole_floats_are_the_integers_that_they_were(tmp_path: Path, form: str, said: list[str]) -> None:
    frame = customers()
    path = tmp_path / ("log.csv" if form == "csv" else "log.parquet")
    if form == "csv":
        frame.to_csv(path, index=False)
    else:
        table = pa.Table.from_pandas(frame, preserve_index=False)
        kind = {"parquet": pa.float64(), "text": pa.string(), "decimal": pa.decimal128(12, 2)}[form]
        texts = pa.array([None if np.isnan(v) else str(v) for v in frame["who"]])
        who = texts if form == "text" else table["who"].cast(kind)
        pq.write_table(table.set_column(0, "who", who), path)
    dataset = prepare(files_config(tmp_path, path, data__on_bad_rows="drop"))
    assert dataset.user_ids.ids(range(7)) == [str(17850 + n) for n in range(7)]
    assert dataset.counts["bad_rows_by_reason"] == {"without a user id": 7}
    line = next(line for line in said if "floats" in line)
    assert "the user ids are whole numbers written as floats, such as 17850.0" in line
    assert line.endswith("such as 17850")


def test_nothing_is_said_where_ids_are_as_they_should_be(tmp_path: Path, said: list[str]) -> None:
    prepare(files_config(tmp_path, write_csv(tmp_path / "log.csv", HEADER, grid())))
    assert not any("floats" in line for line in said)


@pytest.mark.parametrize("last", [True, False])
def test_a_column_with_other_ids_has_no_floats(tmp_path: Path, last: bool, said: list[str]) -> None:
    # In several files: what is known of the first chunk changes with a later one.
    folder = tmp_path / "log"
    folder.mkdir()
    for part in range(3):
        rows = [[f"{u[1:]}.0", i, t] for u, i, t in grid()]
        if part == (2 if last else 0):
            rows[7:10] = [["A7", *row[1:]] for row in rows[7:10]]
        write_csv(folder / f"{part}.csv", HEADER, rows)
    with pytest.raises(DataError) as error:
        prepare(files_config(tmp_path, folder))
    assert "207 rows can not be read (207 with a user id that is a float, not text or an integer)" in str(
        error.value
    )
    assert "0.csv row 2: " in str(error.value)
    dropped = prepare(files_config(tmp_path, folder, data__on_bad_rows="drop"))
    assert dataset_users(dropped) == ["A7"]
    assert not any("written as floats" in line for line in said)


def dataset_users(dataset: Any) -> list[str]:
    return list(dataset.user_ids.ids(range(dataset.num_users)))


def test_integers_and_floats_of_them_are_the_same_ids(tmp_path: Path) -> None:
    # One part has gaps, and pandas wrote floats; the other has none.
    folder = tmp_path / "log"
    folder.mkdir()
    for part, ending in enumerate(("", ".0")):
        write_csv(folder / f"{part}.csv", HEADER, [[f"{u[1:]}{ending}", i, t + part] for u, i, t in grid()])
    dataset = prepare(files_config(tmp_path, folder))
    assert dataset_users(dataset) == [str(n) for n in range(7)]


def test_a_fraction_is_no_id_and_neither_are_floats_beside_it(tmp_path: Path) -> None:
    frame = customers().dropna()
    frame.loc[frame.index[3], "who"] = 17850.5
    frame.to_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError) as error:
        prepare(files_config(tmp_path, tmp_path / "log.parquet"))
    assert "1 with a user id that is a fraction" in str(error.value)
    assert "62 with a user id that is a float, not text or an integer" in str(error.value)
    assert "log.parquet row 4: with a user id that is a fraction: 17850.5" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "value"),
    [(np.float64, 2.0**53), (np.float64, 9.5e18), (np.float32, 2.0**24), (None, f"{2**53}.0")],
)
def test_floats_that_can_not_tell_integers_apart_are_refused(tmp_path: Path, kind: Any, value: Any) -> None:
    frame = pd.DataFrame(grid(), columns=HEADER)
    ids = ["1.0"] * 69 + [value] if kind is None else np.array([1.0] * 69 + [value], kind)
    frame["what"] = ids
    frame.to_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match=r"1 with an item id that is a float too large .*export the column"):
        prepare(files_config(tmp_path, tmp_path / "log.parquet"))


@pytest.mark.parametrize("written", ["9.50E+12", "9.5e+12", "1E+15", "4,7102E+12"])
def test_scientific_notation_is_refused_with_the_remedy(tmp_path: Path, written: str) -> None:
    frame = pd.DataFrame(grid(), columns=HEADER)
    frame.loc[5:, "what"] = written
    frame.to_csv(tmp_path / "log.csv", index=False)
    message = (
        rf"65 with an item id in scientific notation.*export the column as text(?s:.*)row 7: .*{written[:3]}"
    )
    with pytest.raises(DataError, match=message):
        prepare(files_config(tmp_path, tmp_path / "log.csv"))


def test_codes_that_look_a_little_like_numbers_are_ids(tmp_path: Path) -> None:
    codes = ["12E4", "1E-05", "E+12", "1.5", "007", "3E5", "+7", "0x10", "1_000"]
    rows = [["u", code, n] for n, code in enumerate(codes)]
    dataset = prepare(files_config(tmp_path, write_csv(tmp_path / "log.csv", HEADER, rows)))
    assert dataset.item_ids.ids(range(len(codes))) == codes


def test_tables_and_lists_of_ids_are_read_alike(tmp_path: Path) -> None:
    frame = pd.DataFrame(grid(), columns=HEADER)
    frame["what"] = frame["what"].str[1:].astype(float)
    frame["shown"] = [[1.0, 2.0]] * len(frame)
    frame.to_parquet(tmp_path / "log.parquet")
    pd.DataFrame({"sku": np.arange(23.0)}).to_csv(tmp_path / "items.csv", index=False)
    pd.DataFrame({"id": ["u0", "u1"]}).to_csv(tmp_path / "users.csv", index=False)
    config = files_config(
        tmp_path,
        tmp_path / "log.parquet",
        data__source__items={"path": str(tmp_path / "items.csv"), "id": "sku"},
        data__source__columns={
            "user": "who", "item": "what", "time": "when", "time_unit": "s", "impressions": "shown"
        },
    )  # fmt: skip
    dataset = prepare(config)
    assert dataset.num_items == dataset.num_catalogue_items == 23
    assert dataset.item_ids.ids([0, 22]) == ["0", "22"]
    assert dataset.counts["impressions"] > 0
    # Files that come later.
    items = str(tmp_path / "items.csv")
    assert read_items(config.data, items)["item_id"].to_pylist()[:2] == ["0", "1"]
    assert read_item_ids(config.data, items, "--items")[:2] == ["0", "1"]
    pd.DataFrame({"who": [17850.0, np.nan, 3.0]}).dropna().to_csv(tmp_path / "forget.csv", index=False)
    assert read_user_ids(config.data, str(tmp_path / "forget.csv")) == ["17850", "3"]


def test_files_of_queries_have_the_same_ids(tmp_path: Path) -> None:
    frame = pd.DataFrame({"user_id": [17850.0, np.nan], "history": [[1.0, 2.0], None]})
    frame.to_parquet(tmp_path / "q.parquet")
    (tmp_path / "q.csv").write_text('user_id,history\n17850.0,"[1.0, {""item_id"": 2.0}]"\n9.5E+12,\n')
    rows = [list(read_rows(scan(tmp_path / name, 1).ranges(0, 9)[0])) for name in ("q.parquet", "q.csv")]
    assert rows[0][0][1] == {"user_id": 17850, "history": [1, 2]}
    assert rows[1][0][1] == {"user_id": "17850", "history": [1, {"item_id": 2}]}
    assert "'9.5E+12' is no id: export the column as text" in str(rows[1][1][1])
    # JSON has integers: a fraction there is what the client wrote.
    (tmp_path / "q.jsonl").write_bytes(orjson.dumps({"user_id": 42.0}))
    assert next(read_rows(scan(tmp_path / "q.jsonl", 1).ranges(0, 9)[0]))[1] == {"user_id": 42.0}
