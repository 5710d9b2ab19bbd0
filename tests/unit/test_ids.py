"""Ids that no query could name, or that break a line of a file, are refused where they enter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.shop import build_store
from twotower.config import parse_config
from twotower.data.item_files import read_item_ids, read_items
from twotower.data.prepare import prepare
from twotower.errors import DataError, NotAllowedError
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.ids import MAX_ID_LENGTH, id_problem
from twotower.lifecycle.update import update_items
from twotower.retrieval.request import QueryRow, RetrieveRequest, parse

BAD = ["a\nb", "a\r", "\ta", "a\x00b", "a\x1b[2J", "a\x7f", "a\x85b", "a\u2028b", "x" * (MAX_ID_LENGTH + 1)]
GOOD = ["a b", "ä", "x" * MAX_ID_LENGTH, "é" * MAX_ID_LENGTH, "a\u00a0b", "🙂", "-1", "<b>"]


def test_the_rule() -> None:
    assert all(map(id_problem, [*BAD, ""]))
    assert not any(map(id_problem, GOOD))


def make(root: Path, role: str, bad: str, on_bad_rows: str) -> Any:
    """Files with one such id in one role."""
    users, items = ["u1", "u2", "u3", GOOD[2]], ["i1", "i2", *GOOD[:2]]
    log = [(u, i) for u in users for i in items]
    tables: dict[str, Any] = {"items": items, "users": users}
    if role == "user":
        log.append((bad, "i1"))
    elif role == "item":
        log.append(("u1", bad))
    else:
        tables[role] = [*tables[role], bad]
    root.mkdir()
    columns = {"user": [u for u, _ in log], "item": [i for _, i in log], "time": list(range(len(log)))}
    pq.write_table(pa.table(columns), root / "log.parquet")
    for name, ids in tables.items():
        pq.write_table(pa.table({"id": ids}), root / f"{name}.parquet")
    source = {
        "kind": "files",
        "interactions": str(root / "log.parquet"),
        "columns": {"user": "user", "item": "item", "time": "time", "time_unit": "s"},
        **{name: {"path": str(root / f"{name}.parquet"), "id": "id"} for name in tables},
    }
    data = {"source": source, "on_bad_rows": on_bad_rows}
    return parse_config({"name": "n", "storage": {"root": str(root / "runs")}, "data": data})


@pytest.mark.parametrize("role", ["user", "item", "users", "items"])
def test_a_bad_row_with_its_reason(tmp_path: Path, role: str) -> None:
    for number, bad in enumerate((BAD[0], BAD[-1])):
        reason = "more than 1,024 characters" if number else "a line break"
        with pytest.raises(DataError, match=reason):
            prepare(make(tmp_path / f"e{number}", role, bad, "error"))
        dataset = prepare(make(tmp_path / f"d{number}", role, bad, "drop"))
        assert dataset.counts["bad_rows"] == 1
        ((text, count),) = dataset.counts["bad_rows_by_reason"].items()
        assert (count, reason in text) == (1, True), text
        assert bad not in dataset.user_ids
        assert bad not in dataset.item_ids
        assert GOOD[2] in dataset.user_ids


@pytest.mark.parametrize("bad", BAD)
def test_every_such_id_of_an_interaction(tmp_path: Path, bad: str) -> None:
    dataset = prepare(make(tmp_path / "d", "item", bad, "drop"))
    assert sum(dataset.counts["bad_rows_by_reason"].values()) == 1


@pytest.mark.parametrize("bad", BAD)
def test_queries(bad: str) -> None:
    for key, value in (
        ("user_id", bad),
        ("history", [bad]),
        ("history", [{"item_id": bad}]),
        ("exclude_items", [bad]),
        ("allow_items", ["1", bad]),
        ("query_id", bad),
    ):
        with pytest.raises(NotAllowedError, match=f"{key}.*(control character|has 1025 characters)"):
            parse({"k": 3, key: value}, 10, QueryRow)
    for good in GOOD:
        assert parse({"k": 3, "user_id": good, "history": [good]}, 10, RetrieveRequest).user_id == good


def test_updates(tmp_path: Path) -> None:
    config, _, path = build_store(tmp_path)
    row = Generation.open(path).items.table([3]).to_pylist()[0]
    schema = Generation.open(path).items.schema
    for bad in (BAD[0], BAD[-1]):
        given = pa.Table.from_pylist([{**row, "item_id": bad}], schema)
        with pytest.raises(DataError, match="1 ids of items can not be used"):
            update_items(Store(config.store), given)
        file = tmp_path / "new.parquet"
        pq.write_table(pa.table({"item": [bad, "1001"], "name": ["a", "b"]}), file)
        for read in (read_items, lambda data, path: read_item_ids(data, path, "--delete")):
            with pytest.raises(DataError, match="control character|more than 1,024"):
                read(config.data, str(file))
