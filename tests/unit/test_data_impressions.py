"""Impressions from a column of real files to negative interactions of a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.datasets import files_config, write_csv
from twotower import progress
from twotower.data.dataset import Dataset
from twotower.data.interactions import COLUMNS
from twotower.data.prepare import prepare
from twotower.data.sources import files
from twotower.errors import DataError
from twotower.schema import KINDS, SPLITS

HEADER = ["who", "what", "when", "shown"]
MAPPED = {"user": "who", "item": "what", "time": "when", "time_unit": "s"}
WITH = {**MAPPED, "impressions": "shown"}
POSITIVE, NEGATIVE = KINDS["positive"], KINDS["negative"]


def log(seed: int = 4, num_users: int = 6, per_user: int = 12) -> list[list[Any]]:
    """Return user, item, second and the list shown: clicks repeat, and the chosen item is often listed."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(num_users):
        for _ in range(per_user):
            item = int(rng.integers(15))
            shown = [int(i) for i in rng.integers(0, 20, rng.integers(0, 6))]
            rows.append(
                [f"u{user}", item, int(rng.integers(40)), [*shown, item] if rng.random() < 0.5 else shown]
            )
    return [rows[at] for at in rng.permutation(len(rows))]


def as_csv(path: Path, rows: list[list[Any]], separator: str = "|") -> Path:
    return write_csv(path, HEADER, [[*row[:3], separator.join(map(str, row[3]))] for row in rows])


def run(tmp_path: Path, path: Path, columns: dict[str, Any] = WITH, **changes: Any) -> Dataset:
    return prepare(files_config(tmp_path, path, data__source__columns=columns, **changes))


def listed(dataset: Dataset) -> list[tuple[str, str, int]]:
    """Return user id, item id and second of every impression, sorted."""
    data = dataset.interactions.select(dataset.interactions.is_impression)
    users, items = dataset.user_ids.ids(data.user_row), dataset.item_ids.ids(data.item_row)
    return sorted(zip(users, items, (data.time // 1_000_000).tolist(), strict=True))


def expected_of(rows: list[list[Any]]) -> list[tuple[str, str, int]]:
    """Return what a plain loop makes of rows that all stay."""
    return sorted(
        (user, str(other), second)
        for user, item, second, shown in rows
        for other in dict.fromkeys(shown)
        if other != item
    )


def assert_same_without_impressions(dataset: Dataset, without: Dataset) -> None:
    """The interactions themselves do not depend on whether their impressions are read."""
    mask = dataset.interactions.is_impression
    assert mask.any()
    assert not without.interactions.is_impression.any()
    own = dataset.interactions.select(~mask)
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(own, name), getattr(without.interactions, name), err_msg=name)
    assert dataset.item_ids.array.to_pylist()[: without.num_items] == without.item_ids.array.to_pylist()
    assert dataset.user_ids.hash == without.user_ids.hash


def test_each_item_shown_and_not_chosen_is_a_negative_of_that_user_and_time(tmp_path: Path) -> None:
    rows = log()
    dataset = run(tmp_path, as_csv(tmp_path / "log.csv", rows), data__repeats="keep")
    assert len(listed(dataset)) > 100
    assert listed(dataset) == expected_of(rows)
    impressions = dataset.interactions.select(dataset.interactions.is_impression)
    assert set(impressions.kind.tolist()) == {NEGATIVE}
    assert dataset.counts["impressions"] == dataset.counts["kinds"]["negative"] == len(impressions)
    assert dataset.counts["impressions_left_out"] == 0
    assert dataset.counts["interactions"] == len(rows) + len(impressions) == len(dataset.interactions)


def test_lists_in_parquet_and_text_in_csv_are_the_same_dataset(tmp_path: Path) -> None:
    rows = log()
    expected = run(tmp_path, as_csv(tmp_path / "log.csv", rows)).fingerprint
    other = {**WITH, "impressions_separator": "::"}
    assert run(tmp_path, as_csv(tmp_path / "two.csv", rows, "::"), other).fingerprint == expected
    who, what, when, shown = (list(column) for column in zip(*rows, strict=True))
    kinds = {
        "int": (pa.array(what), pa.array(shown, pa.list_(pa.int32()))),
        "large": (pa.array(what), pa.array(shown, pa.large_list(pa.uint64()))),
        "text": (pa.array(list(map(str, what))), pa.array([list(map(str, s)) for s in shown])),
        "none for an empty list": (pa.array(what), pa.array([s or None for s in shown])),
        "dictionary": (pa.array(what), pa.array(["|".join(map(str, s)) for s in shown]).dictionary_encode()),
        "view": (pa.array(what), pa.array(["|".join(map(str, s)) for s in shown], pa.string_view())),
    }
    for name, (item, lists) in kinds.items():
        pq.write_table(
            pa.table({"who": who, "what": item, "when": when, "shown": lists}), tmp_path / "log.parquet"
        )
        assert run(tmp_path, tmp_path / "log.parquet").fingerprint == expected, name


@pytest.mark.parametrize("chunk", [1, 7])
def test_impressions_do_not_depend_on_chunks(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = as_csv(tmp_path / "log.csv", log())
    whole = run(tmp_path / "whole", path)
    monkeypatch.setattr(files, "CHUNK_ROWS", chunk * 16)
    parts = run(tmp_path / "parts", path)
    assert (parts.fingerprint, parts.vocabulary_hash, parts.counts) == (
        whole.fingerprint,
        whole.vocabulary_hash,
        whole.counts,
    )


@pytest.mark.parametrize("split", ["temporal_user", "temporal_global", "leave_one_out", "random"])
@pytest.mark.parametrize("repeats", ["first", "last", "sum", "keep"])
def test_impressions_change_no_interaction_and_go_with_theirs(
    tmp_path: Path, split: str, repeats: str
) -> None:
    rows = log()
    for at, row in enumerate(rows):
        row[2] = 1_000 + 7 * at % 997  # no two at the same time, so that a time names its interaction
    path = as_csv(tmp_path / "log.csv", rows)
    rules = {"split__kind": split, "data__repeats": repeats}
    dataset, without = run(tmp_path, path, **rules), run(tmp_path, path, MAPPED, **rules)
    assert_same_without_impressions(dataset, without)
    kept = set((without.interactions.time // 1_000_000).tolist())
    assert listed(dataset) == expected_of([row for row in rows if row[2] in kept])
    assert (dataset.counts["impressions_left_out"] > 0) == (repeats != "keep")
    split_at = dict(zip(without.interactions.time.tolist(), without.interactions.split.tolist(), strict=True))
    data = dataset.interactions
    assert data.split.tolist() == [split_at[time] for time in data.time.tolist()]
    assert {SPLITS["train"], SPLITS["test"]} <= set(data.split[data.is_impression].tolist())


def test_without_times_and_in_a_given_split_impressions_are_where_their_interaction_is(
    tmp_path: Path,
) -> None:
    rows = [["u", f"i{n}", part, f"s{n}|i0"] for n, part in enumerate(["train"] * 6 + ["test"] * 2)]
    path = write_csv(tmp_path / "log.csv", ["who", "what", "part", "shown"], rows)
    columns = {"user": "who", "item": "what", "impressions": "shown", "split": "part"}
    for kind in ("given", "random"):
        dataset = run(tmp_path, path, columns, split__kind=kind, split__validation_share=0.3)
        data = dataset.interactions
        items = [
            f"{'shown ' if shown else ''}{item}"
            for item, shown in zip(dataset.item_ids.ids(data.item_row), data.is_impression, strict=True)
        ]
        split = dict(zip(items, data.split.tolist(), strict=True))
        assert [split[f"shown s{n}"] for n in range(8)] == [split[f"i{n}"] for n in range(8)]
        assert len({split[f"i{n}"] for n in range(8)}) == 3
        if kind == "given":
            assert [split[f"shown s{n}"] for n in (6, 7)] == [SPLITS["test"]] * 2


def test_an_item_shown_first_and_chosen_later_is_kept_as_both(tmp_path: Path) -> None:
    rows = [["u", "a", 1, ["b", "c"]], ["u", "b", 2, ["a", "d"]], ["u", "e", 3, ["b"]]]
    rows += [["v", x, n, []] for n, x in enumerate("abcde")]
    for repeats in ("first", "last", "sum", "keep"):
        dataset = run(tmp_path, as_csv(tmp_path / "log.csv", rows), data__repeats=repeats)
        assert listed(dataset) == expected_of(rows)
        data = dataset.interactions
        own = slice(*data.user_offsets[:2])
        found = list(
            zip(
                dataset.item_ids.ids(data.item_row[own]),
                data.kind[own].tolist(),
                data.weight[own].tolist(),
                strict=True,
            )
        )
        # Looking back from a moment one meets the head of the list first.
        assert found == [
            ("a", POSITIVE, 1),
            ("c", NEGATIVE, 0),
            ("b", NEGATIVE, 0),
            ("b", POSITIVE, 1),
            ("d", NEGATIVE, 0),
            ("a", NEGATIVE, 0),
            ("e", POSITIVE, 1),
            ("b", NEGATIVE, 0),
        ]


def test_items_that_are_only_shown_are_outside_an_item_table_and_inside_without_one(tmp_path: Path) -> None:
    rows = [["u", f"i{n}", n, ["new", "cold", f"i{n + 1}"]] for n in range(8)]
    path = as_csv(tmp_path / "log.csv", rows)
    items = write_csv(tmp_path / "items.csv", ["sku"], [["cold"], *([f"i{n}"] for n in range(8))])
    dataset = run(tmp_path, path, data__source__items={"path": str(items), "id": "sku"})
    assert dataset.item_ids.ids(range(dataset.num_items)) == [
        "cold",
        *(f"i{n}" for n in range(8)),
        "new",
        "i8",
    ]
    assert (dataset.num_catalogue_items, dataset.counts["outside_items"]) == (9, 2)
    assert dataset.counts["interactions_outside_catalogue"] == 9
    assert listed(dataset) == expected_of(rows)
    without_table = run(tmp_path, path)
    assert without_table.item_ids.ids(range(11))[8:] == ["new", "cold", "i8"]
    assert without_table.num_catalogue_items == 11


@pytest.mark.parametrize("smallest", [{"item": 1}, {"item": 3, "user": 4}])
def test_the_smallest_users_and_items_are_those_of_interactions_alone(
    tmp_path: Path, smallest: dict[str, int]
) -> None:
    rows = log()
    rows += [["seldom", 1, 5, [2, 3, 4, 5, 6, 7]]]
    path = as_csv(tmp_path / "log.csv", rows)
    rules = {"data__min_interactions": smallest, "data__repeats": "keep"}
    dataset, without = run(tmp_path, path, **rules), run(tmp_path, path, MAPPED, **rules)
    assert_same_without_impressions(dataset, without)
    assert dataset.num_items == without.num_items
    kept = set(without.item_ids.array.to_pylist())
    known = [row for row in rows if row[0] in without.user_ids and str(row[1]) in kept]
    assert listed(dataset) == [found for found in expected_of(known) if found[1] in kept]
    assert dataset.counts["impressions_left_out"] == len(expected_of(rows)) - len(listed(dataset)) > 0


def test_impressions_outside_the_window_go_with_their_interaction(tmp_path: Path) -> None:
    rows = log()
    path = as_csv(tmp_path / "log.csv", rows)
    window = {"start": "1970-01-01T00:00:10Z"}
    dataset = run(tmp_path, path, data__window=window, data__repeats="keep")
    assert listed(dataset) == expected_of([row for row in rows if row[2] >= 10])
    assert dataset.counts["outside_window"] > 0


# ---- bad rows


def test_a_row_with_a_bad_id_in_its_list_is_a_bad_row(tmp_path: Path) -> None:
    rows = [["u", f"i{n}", n, ["a", "b"]] for n in range(12)]
    rows[3][3] = ["a", "42.0", "7.0"]
    rows[5][3] = ["c", "", "  ", "d"]  # blank pieces of text are dropped
    path = as_csv(tmp_path / "log.csv", rows)
    path.write_bytes(path.read_bytes().replace(b"i8,8,a|b", b"i8,8,a|\xff|b"))
    with pytest.raises(DataError) as error:
        run(tmp_path, path)
    message = str(error.value)
    assert message.startswith("2 rows can not be read (")
    assert "log.csv row 5: with a shown item id that is a float, not text or an integer: '42.0'" in message
    assert "log.csv row 10: with a 'shown' that is not UTF-8" in message
    dataset = run(tmp_path, path, data__on_bad_rows="drop")
    assert dataset.counts["bad_rows"] == 2
    assert sum(dataset.counts["bad_rows_by_reason"].values()) == 2
    rows[5][3] = ["c", "d"]
    assert listed(dataset) == expected_of([row for at, row in enumerate(rows) if at not in (3, 8)])
    assert "i3" not in dataset.item_ids


@pytest.mark.parametrize(
    ("shown", "reason", "count"),
    [
        (
            pa.array([[1.0, 2.5]] * 6, pa.list_(pa.float64())),
            r"a shown item id that is a fraction.*: 2\.5",
            6,
        ),
        (pa.array([["a", None]] + [["b"]] * 5), "1 without a shown item id", 1),
        (pa.array([["a", " "]] * 2 + [["b"]] * 4), "2 without a shown item id", 2),
    ],
)
def test_bad_ids_in_lists_of_parquet(tmp_path: Path, shown: pa.Array, reason: str, count: int) -> None:
    table = pa.table({"who": ["u"] * 6, "what": list("cdefgh"), "when": range(6), "shown": shown})
    pq.write_table(table, tmp_path / "log.parquet")
    with pytest.raises(DataError, match=f"(?s){count} rows? can not be read .*{reason}"):
        run(tmp_path, tmp_path / "log.parquet")


def test_a_column_that_holds_no_lists_is_an_error(tmp_path: Path) -> None:
    frame = pd.DataFrame({"who": ["u"] * 6, "what": range(6), "when": range(6), "shown": range(6)})
    frame.to_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match="impressions column has type int64; it must hold lists of item ids"):
        run(tmp_path, tmp_path / "log.parquet")
    with pytest.raises(DataError, match=r"no column 'seen' \(data\.source\.columns\.impressions\)"):
        run(tmp_path, tmp_path / "log.parquet", {**MAPPED, "impressions": "seen"})


def test_impressions_are_in_the_report_of_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(progress, "say", said.append)
    dataset = run(tmp_path, as_csv(tmp_path / "log.csv", log()))
    counts = dataset.counts
    assert counts["impressions"] > 0
    assert counts["impressions_left_out"] > 0
    wanted = (
        f"impressions {counts['impressions']:,}, repeats reduced {counts['repeats']:,}, "
        f"impressions left out with their interactions or items {counts['impressions_left_out']:,}"
    )
    assert wanted in said
    run(tmp_path, as_csv(tmp_path / "none.csv", [[*row[:3], []] for row in log()]), MAPPED)
    assert not any("impressions left out" in line for line in said[said.index(wanted) + 1 :])


def test_a_column_without_any_list_gives_no_impressions(tmp_path: Path) -> None:
    rows = [[*row[:3], []] for row in log()]
    dataset = run(tmp_path, as_csv(tmp_path / "log.csv", rows))
    without = run(tmp_path, as_csv(tmp_path / "log.csv", rows), MAPPED)
    assert dataset.counts["impressions"] == 0
    assert dataset.fingerprint == without.fingerprint
