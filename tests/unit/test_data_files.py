from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.datasets import files_config, grid, write_csv
from twotower import progress
from twotower.data.prepare import prepare
from twotower.errors import ConfigError, DataError
from twotower.schema import KINDS

HEADER = ["who", "what", "when"]


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "log.csv", HEADER, grid())


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(progress, "say", lines.append)
    return lines


def test_every_file_form_of_the_same_rows_is_the_same_dataset(tmp_path: Path, csv: Path) -> None:
    expected = prepare(files_config(tmp_path, csv)).fingerprint
    frame = pd.DataFrame(grid(), columns=HEADER)
    frame.to_parquet(tmp_path / "one.parquet")
    with gzip.open(tmp_path / "log.csv.gz", "wb") as file:
        file.write(csv.read_bytes())
    (tmp_path / "log.tsv").write_text(csv.read_text().replace(",", "\t"))
    folder = tmp_path / "folder"
    folder.mkdir()
    frame[:31].to_parquet(folder / "a.parquet")
    frame[31:50].to_csv(folder / "b.csv", index=False)
    frame[50:].assign(more=1).to_csv(folder / "c.csv", index=False)
    (folder / "_SUCCESS").write_text("")
    (folder / ".b.csv.crc").write_text("x")
    for path in ("one.parquet", "log.csv.gz", "log.tsv", "folder", "fold*/[abc].*"):
        assert prepare(files_config(tmp_path, tmp_path / path)).fingerprint == expected, path


def test_integer_ids_are_decimal_text(tmp_path: Path) -> None:
    frame = pd.DataFrame({"who": [1, 1, 1, -7, -7, -7], "what": [10, 20, 30, 10, 20, 40], "when": range(6)})
    frame["who"] = frame["who"].astype("int16")
    frame["what"] = frame["what"].astype("uint64") + 2**63
    frame.to_parquet(tmp_path / "log.parquet")
    dataset = prepare(files_config(tmp_path, tmp_path / "log.parquet"))
    assert dataset.user_ids.ids(range(2)) == ["1", "-7"]
    assert dataset.item_ids.id(0) == str(2**63 + 10)


def test_text_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = [
        ["007", "1.5", 1],
        ["007", "7", 2],
        ["007", "07", 3],
        ["7", "a b", 4],
        ["7", "é", 5],
        ["7", "-", 6],
    ]
    dataset = prepare(files_config(tmp_path, write_csv(tmp_path / "log.csv", HEADER, rows)))
    assert dataset.user_ids.ids(range(2)) == ["007", "7"]
    assert dataset.item_ids.ids(range(6)) == ["1.5", "7", "07", "a b", "é", "-"]


def bad_rows(tmp_path: Path) -> Path:
    rows = grid()
    rows[3] = ["u0", None, 30]  # row 5 of the file: the header is row 1
    rows[10] = ["  ", "i1", 40]  # row 12
    rows[20] = ["u2", "i2", "noon"]  # row 22
    rows[30] = ["u3", "i3"]  # row 32
    rows[40] = ["u4", "i4", 50, "extra"]  # row 42
    rows[50] = ["u5", "42.0", 60]  # row 52
    rows[60] = ["u6", "i6", None]  # row 62
    return write_csv(tmp_path / "log.csv", HEADER, rows)


def test_bad_rows_are_counted_and_shown_with_their_place(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        prepare(files_config(tmp_path, bad_rows(tmp_path)))
    message = str(error.value)
    assert message.startswith("7 rows can not be read (")
    assert "set data.on_bad_rows: drop" in message
    assert len([line for line in message.splitlines() if "log.csv row" in line]) == 6
    for row in (32, 42):
        assert f"row {row}: with {2 if row == 32 else 4} columns instead of 3" in message
    assert "row 5: without an item id" in message
    assert "row 12: without a user id" in message
    assert "row 22" not in message or "without a readable time: 'noon'" in message
    assert not [p for p in (tmp_path / "twotower" / "datasets").glob("*") if not p.name.startswith(".")]


def test_bad_rows_are_dropped_and_counted_when_asked(tmp_path: Path, said: list[str]) -> None:
    dataset = prepare(files_config(tmp_path, bad_rows(tmp_path), data__on_bad_rows="drop"))
    assert dataset.counts["bad_rows"] == 7
    assert dataset.counts["interactions"] == 63
    assert sum(dataset.counts["bad_rows_by_reason"].values()) == 7
    assert any(line.startswith("left out 7 bad rows") for line in said)


def test_row_numbers_stay_right_behind_rows_that_were_skipped(tmp_path: Path) -> None:
    rows = grid()
    rows[2] = ["a", "b", 3, "extra"]
    rows[3] = ["a", "b", 3, "extra", "more"]
    rows[69] = ["u6", "42.0", 60]
    rows[4] = ["u0", "i9", "then"]
    with pytest.raises(DataError) as error:
        prepare(files_config(tmp_path, write_csv(tmp_path / "log.csv", HEADER, rows)))
    message = str(error.value)
    assert all(f"row {n}: " in message for n in (4, 5, 6, 71)), message


def test_bytes_that_are_no_utf8_are_a_bad_row(tmp_path: Path, csv: Path) -> None:
    csv.write_bytes(csv.read_bytes().replace(b"u3,", b"u\xff,", 1))
    with pytest.raises(
        DataError, match=r"1 row can not be read .*\n  log\.csv row 32: with a 'who' that is not UTF-8"
    ):
        prepare(files_config(tmp_path, csv))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_missing_columns_are_named_with_those_that_are_there(tmp_path: Path, csv: Path, kind: str) -> None:
    path = csv
    if kind == "parquet":
        path = tmp_path / "log.parquet"
        pd.read_csv(csv).to_parquet(path)
    config = files_config(
        tmp_path, path, data__source__columns={"user": "user", "item": "what", "time": "ts"}
    )
    with pytest.raises(
        DataError,
        match=r"no column 'user' \(data\.source\.columns\.user\), 'ts' \(data\.source\.columns\.time\); "
        r"its columns are who, what, when",
    ):
        prepare(config)


def test_a_later_file_without_a_column_is_named(tmp_path: Path, csv: Path) -> None:
    write_csv(tmp_path / "later.csv", ["who", "what"], [["a", "b"]])
    with pytest.raises(DataError, match=r"later\.csv has no column 'when'"):
        prepare(files_config(tmp_path, tmp_path / "*.csv"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.csv", b"", r"log\.csv is empty"),
        ("log.csv", b"who,what,who\n", r"more than one column 'who'"),
        ("log.parquet", b"PAR1 not really", r"log\.parquet is not a readable Parquet file"),
        ("log.txt", b"who,what\n", r"of no kind that can be read; use \.csv, "),
        ("log.csv", b"who,what,when\n", r"no interactions are left of 0 rows read"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(files_config(tmp_path, tmp_path / name))


def test_a_path_that_names_nothing_says_what_it_may_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.source\.interactions: .* names no file .*a folder or a glob"):
        prepare(files_config(tmp_path, tmp_path / "nothing*.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no file of \.csv, "):
        prepare(files_config(tmp_path, tmp_path / "empty"))


def test_a_numeric_time_without_a_unit_is_a_config_error(tmp_path: Path, csv: Path) -> None:
    config = files_config(
        tmp_path, csv, data__source__columns={"user": "who", "item": "what", "time": "when"}
    )
    with pytest.raises(ConfigError, match=r"time column 'when' holds numbers \(such as '0'\)"):
        prepare(config)


def test_quoted_values_may_hold_separators_and_line_ends(tmp_path: Path) -> None:
    lines = [f'u{u},"i,{n}",{n},"a ""note""\nof two lines"' for u in range(3) for n in range(5)]
    (tmp_path / "log.csv").write_text("\n".join(["who,what,when,note", *lines]) + "\n")
    dataset = prepare(files_config(tmp_path, tmp_path / "log.csv"))
    assert dataset.counts["interactions"] == 15
    assert dataset.item_ids.id(0) == "i,0"


# ---- values, events, window


def valued(tmp_path: Path, values: list[Any], **changes: Any) -> Any:
    rows = [[f"u{n // 5}", f"i{n}", n, values[n % len(values)]] for n in range(20)]
    path = write_csv(tmp_path / "log.csv", [*HEADER, "stars"], rows)
    columns = {"user": "who", "item": "what", "time": "when", "time_unit": "s", "value": "stars"}
    return prepare(files_config(tmp_path, path, data__source__columns=columns, **changes))


def test_scaled_weights_are_clipped_to_the_declared_scale(tmp_path: Path) -> None:
    positives = {"weight": "scaled", "value_range": [1.0, 3.0]}
    dataset = valued(tmp_path, [0, 1, 2, 3, 4], data__positives=positives)
    assert dataset.interactions.weight[:5].tolist() == [0, 0, 0.5, 1, 1]


def test_small_values_are_negative_with_weight_one(tmp_path: Path) -> None:
    positives = {"weight": "value", "min_value": 3.0}
    dataset = valued(tmp_path, [1, 2.5, 3, 4, 5], data__positives=positives)
    kinds = dataset.interactions.kind[:5].tolist()
    assert kinds == [KINDS["negative"]] * 2 + [KINDS["positive"]] * 3
    assert dataset.interactions.weight[:5].tolist() == [1, 1, 3, 4, 5]


@pytest.mark.parametrize("broken", ["", "NaN", "inf", "five", "1e999"])
def test_values_that_are_no_finite_number_are_bad_rows(tmp_path: Path, broken: str) -> None:
    with pytest.raises(DataError, match=r"4 rows can not be read \(4 without a readable value\)"):
        valued(tmp_path, [3, 4, broken, "+2.5", 1])


def test_rules_about_values_need_values(tmp_path: Path, csv: Path) -> None:
    for rule in ({"min_value": 2.0}, {"weight": "value"}):
        with pytest.raises(ConfigError, match=r"needs values, and the source has none"):
            prepare(files_config(tmp_path, csv, data__positives=rule))
    with pytest.raises(ConfigError, match=r"scaled needs the scale .* data\.positives\.value_range"):
        valued(tmp_path, [1], data__positives={"weight": "scaled"})


def event_log(tmp_path: Path, names: list[str], events: Any, **changes: Any) -> Any:
    rows = [[f"u{n // 6}", f"i{n}", n, names[n % len(names)]] for n in range(24)]
    path = write_csv(tmp_path / "log.csv", [*HEADER, "what_happened"], rows)
    columns = {"user": "who", "item": "what", "time": "when", "time_unit": "s", "event": "what_happened"}
    return prepare(
        files_config(tmp_path, path, data__source__columns=columns, data__source__events=events, **changes)
    )


def test_event_types_have_weights_or_kinds(tmp_path: Path) -> None:
    names = ["buy", "view", "cart", "hide", "buy", "cart"]
    events = {"buy": 1.0, "cart": 0.25, "view": "seen_only", "hide": "negative"}
    dataset = event_log(tmp_path, names, events)
    assert dataset.interactions.kind[:6].tolist() == [0, 2, 0, 1, 0, 0]
    assert dataset.interactions.weight[:6].tolist() == [1, 1, 0.25, 1, 1, 0.25]
    assert dataset.counts["kinds"] == {"positive": 16, "negative": 4, "seen_only": 4}


def test_an_event_type_that_is_not_listed_is_a_bad_row(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"4 with an event type that data\.source\.events does not list \(buy\)"
    ) as error:
        event_log(tmp_path, ["buy", "buy", "buy", "buy", "buy", "return"], {"buy": 1.0})
    assert "row 7" in str(error.value)
    assert "'return'" in str(error.value)


def test_events_and_their_column_go_together(tmp_path: Path, csv: Path) -> None:
    with pytest.raises(ConfigError, match=r"without data\.source\.events; say what each type means"):
        event_log(tmp_path, ["buy"], {})
    with pytest.raises(ConfigError, match=r"without data\.source\.columns\.event"):
        prepare(files_config(tmp_path, csv, data__source__events={"buy": 1.0}))
    with pytest.raises(ConfigError, match=r"events\.buy is 0\.0; a weight must be above 0"):
        event_log(tmp_path, ["buy"], {"buy": 0.0})


def test_no_positive_interactions_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the 24 interactions is positive"):
        event_log(tmp_path, ["view"], {"view": "seen_only"})


def test_the_window_is_half_open_and_in_the_configured_zone(tmp_path: Path, csv: Path) -> None:
    window = {"start": "1970-01-01T01:00:50", "end": "1970-01-01T01:50:00+01:00"}
    dataset = prepare(files_config(tmp_path, csv, data__window=window, data__timezone="Europe/Berlin"))
    seconds = dataset.interactions.time // 1_000_000
    assert (seconds.min(), seconds.max()) == (50, 2_090)
    assert dataset.counts["outside_window"] == 70 - len(seconds) == 45
    assert dataset.user_ids.ids(range(dataset.num_users)) == ["u0", "u1", "u2"]


def test_windows_that_can_not_be(tmp_path: Path, csv: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.window\.start 'soon' is no ISO 8601 time"):
        prepare(files_config(tmp_path, csv, data__window={"start": "soon"}))
    with pytest.raises(ConfigError, match="is empty: start"):
        prepare(files_config(tmp_path, csv, data__window={"start": "2026-01-02", "end": "2026-01-01"}))
    with pytest.raises(DataError, match=r"no interactions are left of 70 rows read \(0 bad, 70 outside"):
        prepare(files_config(tmp_path, csv, data__window={"start": "2026-01-02"}))


def test_data_without_times(tmp_path: Path, csv: Path) -> None:
    changes: dict[str, Any] = {
        "data__source__columns": {"user": "who", "item": "what"},
        "split__kind": "random",
    }
    dataset = prepare(files_config(tmp_path, csv, **changes))
    assert not dataset.has_times
    assert dataset.as_of is None
    assert not dataset.interactions.time.any()
    with pytest.raises(ConfigError, match=r"data\.window needs times"):
        prepare(files_config(tmp_path, csv, data__window={"end": "2026-01-02"}, **changes))


# ---- item and user tables


def test_items_outside_the_table_are_kept_behind_it_and_reported(
    tmp_path: Path, csv: Path, said: list[str]
) -> None:
    rows = [[f"i{n}", f"Item {n}", n % 3] for n in range(19, -1, -1)] + [["cold", "Cold", 9]]
    items = write_csv(tmp_path / "items.csv", ["sku", "name", "shelf"], rows)
    table = {"path": str(items), "id": "sku", "title": "name"}
    dataset = prepare(files_config(tmp_path, csv, data__source__items=table))
    assert dataset.num_catalogue_items == 21
    assert dataset.num_items == 24
    assert dataset.item_ids.ids(range(3)) == ["i19", "i18", "i17"]
    assert dataset.item_ids.row("cold") == 20
    # In first-appearance order; the grid walks the items in steps of three.
    assert dataset.item_ids.ids(range(21, 24)) == ["i21", "i20", "i22"]
    outside = pq.read_table(dataset.path / "outside_items.parquet").to_pylist()
    assert outside == [{"item_id": f"i{n}", "item_row": 21 + at} for at, n in enumerate((21, 20, 22))]
    first = {"item_id": "i19", "title": "Item 19", "name": "Item 19", "shelf": "1"}
    assert dataset.item_table().slice(0, 1).to_pylist() == [first]
    in_outside = int((dataset.interactions.item_row >= 21).sum())
    assert dataset.counts["interactions_outside_catalogue"] == in_outside > 0
    assert any("3 items are not in the item table" in line for line in said)


def test_without_an_item_table_the_catalogue_is_what_was_interacted_with(tmp_path: Path, csv: Path) -> None:
    dataset = prepare(files_config(tmp_path, csv))
    assert dataset.num_catalogue_items == dataset.num_items == 23
    assert dataset.item_table().column_names == ["item_id", "title"]
    assert dataset.item_table().column("title").null_count == 23


def test_duplicate_item_ids_are_named(tmp_path: Path, csv: Path) -> None:
    frame = pd.DataFrame({"sku": ["i1", "i2", "i1", "i3", "i2", "i4"]})
    frame.to_parquet(tmp_path / "items.parquet")
    table = {"path": str(tmp_path / "items.parquet"), "id": "sku"}
    with pytest.raises(DataError, match=r"items\.parquet has 2 item ids more than once: 'i1', 'i2'"):
        prepare(files_config(tmp_path, csv, data__source__items=table))


def test_integer_and_text_ids_of_tables_meet(tmp_path: Path) -> None:
    rows = [[u, 10 * u + n, n] for u in range(4) for n in range(6)]
    log = write_csv(tmp_path / "log.csv", HEADER, rows)
    pd.DataFrame({"sku": [int(r[1]) for r in rows]}).to_parquet(tmp_path / "items.parquet")
    pd.DataFrame({"id": [3, 1, 99], "age": [30, 10, 90]}).to_parquet(tmp_path / "users.parquet")
    config = files_config(
        tmp_path,
        log,
        data__source__items={"path": str(tmp_path / "items.parquet"), "id": "sku"},
        data__source__users={"path": str(tmp_path / "users.parquet"), "id": "id"},
    )
    dataset = prepare(config)
    assert dataset.counts["outside_items"] == 0
    assert dataset.user_table(["user_id", "age"]).to_pylist() == [
        {"user_id": "0", "age": None},
        {"user_id": "1", "age": 10},
        {"user_id": "2", "age": None},
        {"user_id": "3", "age": 30},
        {"user_id": "99", "age": 90},
    ]
    assert np.diff(dataset.interactions.user_offsets).tolist() == [6, 6, 6, 6, 0]
    assert dataset.counts["users_without_interactions"] == 1


def test_bad_rows_of_a_table_are_counted_with_the_others(tmp_path: Path, csv: Path) -> None:
    items = write_csv(tmp_path / "items.csv", ["sku"], [["i0"], ["1.0"], ["i1"]])
    table = {"path": str(items), "id": "sku"}
    with pytest.raises(DataError, match=r"items\.csv row 3: with an item id that is a float.*: '1\.0'"):
        prepare(files_config(tmp_path, csv, data__source__items=table))


def test_a_missing_id_column_of_a_table_is_named(tmp_path: Path, csv: Path) -> None:
    items = write_csv(tmp_path / "items.csv", ["sku"], [["i0"]])
    with pytest.raises(DataError, match=r"no column 'id' \(data\.source\.items\.id\); its columns are sku"):
        prepare(files_config(tmp_path, csv, data__source__items={"path": str(items), "id": "id"}))


def test_dictionary_encoded_columns_are_read(tmp_path: Path, csv: Path) -> None:
    frame = pd.read_csv(csv)
    table = pa.Table.from_pandas(frame, preserve_index=False)
    for at, name in enumerate(("who", "what")):
        table = table.set_column(at, name, table.column(name).dictionary_encode())
    pq.write_table(table, tmp_path / "log.parquet")
    expected = prepare(files_config(tmp_path, csv)).fingerprint
    assert prepare(files_config(tmp_path, tmp_path / "log.parquet")).fingerprint == expected


def test_a_given_split_column(tmp_path: Path) -> None:
    names = ["train", "train", "train", "validation", "test"]
    rows = [[f"u{n // 5}", f"i{n}", n, names[n % 5]] for n in range(20)]
    columns = {"user": "who", "item": "what", "time": "when", "time_unit": "s", "split": "part"}
    path = write_csv(tmp_path / "log.csv", [*HEADER, "part"], rows)
    dataset = prepare(files_config(tmp_path, path, data__source__columns=columns, split__kind="given"))
    assert dataset.interactions.split.tolist() == [0, 0, 0, 1, 2] * 4
    rows[7][3] = "dev"
    write_csv(path, [*HEADER, "part"], rows)
    with pytest.raises(DataError, match=r"row 9: with a split that is not train, validation or test: 'dev'"):
        prepare(files_config(tmp_path, path, data__source__columns=columns, split__kind="given"))
