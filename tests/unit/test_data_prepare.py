from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.datasets import files_config, grid, write_csv
from twotower import progress
from twotower.config import Config, parse_config
from twotower.data import prepare as module
from twotower.data.dataset import Dataset
from twotower.data.interactions import Interactions, count_rows, user_blocks
from twotower.data.prepare import prepare
from twotower.data.reading import _Growing
from twotower.errors import ArtefactError, DataError

HEADER = ["who", "what", "when"]


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "log.csv", HEADER, grid())


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(progress, "say", lines.append)
    return lines


def visible(root: Path) -> list[str]:
    return [p.name for p in (root / "twotower" / "datasets").glob("*") if not p.name.startswith(".")]


def test_the_dataset_holds_every_interaction_by_user_and_time(tmp_path: Path) -> None:
    rows = grid()
    shuffled = [rows[n] for n in np.random.default_rng(1).permutation(len(rows))]
    dataset = prepare(files_config(tmp_path, write_csv(tmp_path / "log.csv", HEADER, shuffled)))
    data = dataset.interactions
    users = dataset.user_ids.ids(data.user_row)
    items = dataset.item_ids.ids(data.item_row)
    found = list(zip(users, items, (data.time // 1_000_000).tolist(), strict=True))
    assert sorted(found) == sorted(map(tuple, rows))
    assert (np.diff(data.user_row) >= 0).all()
    for user in range(dataset.num_users):
        own = slice(*data.user_offsets[user : user + 2])
        assert set(data.user_row[own].tolist()) == {user}
        assert (np.diff(data.time[own]) > 0).all()
    assert dataset.as_of == max(r[2] for r in rows) * 1_000_000
    assert dataset.user_ids.id(0) == shuffled[0][0]
    types = [getattr(data, n).dtype.name for n in ("user_row", "item_row", "time", "weight", "kind", "split")]
    assert types == ["int32", "int32", "int64", "float32", "int8", "int8"]


def test_finished_work_is_recognised(
    tmp_path: Path, csv: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(files_config(tmp_path, csv))

    def never(*_: Any) -> None:
        raise AssertionError("prepared again")

    monkeypatch.setattr(module, "_build", never)
    again = prepare(files_config(tmp_path, csv, seed=99, train__epochs=3))
    assert (again.path, again.fingerprint) == (first.path, first.fingerprint)
    assert any("is there already" in line for line in said)


def test_changed_raw_data_or_rules_are_another_dataset(tmp_path: Path, csv: Path) -> None:
    first = prepare(files_config(tmp_path, csv))
    assert prepare(files_config(tmp_path, csv, split__test_share=0.3)).fingerprint != first.fingerprint
    write_csv(csv, HEADER, grid(per_user=11))
    os.utime(csv, ns=(1, 1))
    changed = prepare(files_config(tmp_path, csv))
    assert changed.path != first.path
    assert changed.fingerprint != first.fingerprint
    assert Dataset.open(first.path).counts["interactions"] == 70


def test_only_a_random_split_depends_on_the_seed(tmp_path: Path, csv: Path) -> None:
    random = [prepare(files_config(tmp_path, csv, split__kind="random", seed=s)) for s in (1, 2)]
    assert random[0].path != random[1].path
    assert random[0].fingerprint != random[1].fingerprint


def test_the_fingerprint_does_not_depend_on_paths_but_on_every_part(tmp_path: Path) -> None:
    prints = {}
    items = [[f"i{n}", f"T{n}"] for n in range(23)]
    for place in ("a", "b", "title", "time"):
        folder = tmp_path / place
        folder.mkdir()
        rows = grid()
        if place == "time":
            rows[0][2] += 1
        table = [["i0", "Other"], *items[1:]] if place == "title" else items
        log = write_csv(folder / f"{place}.csv", HEADER, rows)
        path = str(write_csv(folder / "things.csv", ["id", "title"], table))
        config = files_config(folder, log, data__source__items={"path": path, "id": "id", "title": "title"})
        prints[place] = prepare(config).fingerprint
    assert prints["a"] == prints["b"]
    assert len(set(prints.values())) == 3


def test_item_parts_cover_the_catalogue_once_in_row_order(tmp_path: Path) -> None:
    source = {"kind": "generated", "num_users": 200, "num_items": 2_600, "num_interactions": 4_000}
    dataset = prepare(parse_config({"storage": {"root": str(tmp_path)}, "data": {"source": source}}))
    assert len(dataset.item_paths) == 3
    rows = np.concatenate([pq.read_table(p).column("item_row").to_numpy() for p in dataset.item_paths])
    assert rows.dtype == np.int64
    assert rows.tolist() == list(range(2_600))
    assert dataset.item_table(["item_id"]).column(0).to_pylist() == dataset.item_ids.array.to_pylist()
    with pytest.raises(
        DataError, match=r"the item table has no column 'colour'; it has item_id, title, genres, year"
    ):
        dataset.item_table(["title", "colour"])


def test_the_manifest_says_where_the_data_came_from(tmp_path: Path, csv: Path) -> None:
    config = files_config(tmp_path, csv)
    dataset = prepare(config)
    assert dataset.source == config.data.source
    assert dataset.manifest["config"]["split"]["kind"] == "temporal_user"
    assert "mirror" not in dataset.manifest["config"]["data"]
    assert dataset.manifest["files"]["interactions.parquet"] > 0
    assert json.loads((dataset.path / "features.json").read_text()) == dataset.schema.to_json()


def test_a_failed_build_leaves_nothing_visible(
    tmp_path: Path, csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise DataError("late")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_manifest", broken)
        with pytest.raises(DataError, match="late"):
            prepare(files_config(tmp_path, csv))
    assert visible(tmp_path) == []
    assert prepare(files_config(tmp_path, csv)).counts["interactions"] == 70


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_dataset_is_refused_and_prepared_again(
    tmp_path: Path, csv: Path, damage: str, said: list[str]
) -> None:
    first = prepare(files_config(tmp_path, csv))
    victim = first.path / "interactions.parquet"
    victim.unlink() if damage == "missing" else victim.write_bytes(victim.read_bytes()[:-3])
    message = (
        r"lacks interactions\.parquet" if damage == "missing" else r"has \d+ bytes, its manifest says \d+"
    )
    with pytest.raises(ArtefactError, match=message):
        Dataset.open(first.path)
    assert prepare(files_config(tmp_path, csv)).fingerprint == first.fingerprint
    assert any("preparing it again" in line for line in said)


def test_a_directory_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="not a finished dataset"):
        Dataset.open(tmp_path)


# ---- a real kill

SCRIPT = """
import sys, time
from twotower.config import parse_config
from twotower.data import prepare as module
step = sys.argv[2]
original = getattr(module, step, None)
def slow(*args, **kwargs):
    result = original(*args, **kwargs) if step == "write_items" else None
    print("REACHED", flush=True)
    time.sleep(600)
if step != "none":
    setattr(module, step, slow)
print(module.prepare(parse_config(__import__("json").loads(sys.argv[1]))).fingerprint)
"""


def start(config: Config, step: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, json.dumps(config.to_json()), step]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("step", ["read_interactions", "write_items", "write_manifest"])
def test_a_killed_prepare_leaves_nothing_and_the_next_one_succeeds(tmp_path: Path, step: str) -> None:
    source = {"kind": "generated", "num_users": 200, "num_items": 300, "num_interactions": 4_000}
    values = {"data": {"source": source}}
    expected = prepare(parse_config({**values, "storage": {"root": str(tmp_path / "whole")}})).fingerprint
    config = parse_config({**values, "storage": {"root": str(tmp_path / "killed")}})
    process = start(config, step)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "REACHED\n"
        partial = [p for p in config.datasets.glob(".*.partial") if p.is_dir()]
        assert len(partial) == 1
        assert any(partial[0].iterdir()) == (step != "read_interactions")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert visible(tmp_path / "killed") == []
    deadline = time.monotonic() + 60
    second = start(config, "none")
    output, _ = second.communicate(timeout=deadline - time.monotonic())
    assert output.strip() == expected
    assert prepare(config).fingerprint == expected
    assert not list(config.datasets.glob(".*.partial"))


# ---- arrays


def test_select_keeps_users_and_their_offsets(small_dataset: Dataset) -> None:
    data = small_dataset.interactions
    mask = data.user_row % 3 == 1
    part = data.select(mask)
    assert 0 < len(part) == int(mask.sum()) < len(data)
    assert part.num_users == data.num_users
    for user in (0, 1, 4, data.num_users - 1):
        own = slice(*part.user_offsets[user : user + 2])
        whole = slice(*data.user_offsets[user : user + 2])
        expected = data.item_row[whole].tolist() if user % 3 == 1 else []
        assert part.item_row[own].tolist() == expected
    with pytest.raises(ValueError, match=r"mask must be \[\d+\] bool, got \[3\] bool"):
        data.select(np.ones(3, dtype=bool))


def test_interactions_are_read_as_they_were_written(
    small_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twotower.data.interactions._ROW_GROUP", 999)
    data = small_dataset.interactions
    data.write(tmp_path / "x.parquet")
    assert pq.read_metadata(tmp_path / "x.parquet").num_row_groups > 3
    again = Interactions.read(tmp_path / "x.parquet", data.num_users)
    for name, column in data.columns().items():
        assert np.array_equal(getattr(again, name), column)
    assert np.array_equal(again.user_offsets, data.user_offsets)


def test_blocks_never_part_a_user() -> None:
    user = np.repeat([0, 1, 2, 5, 6], [3, 9, 1, 1, 4]).astype(np.int32)
    for size in range(1, 20):
        blocks = list(user_blocks(user, size))
        assert sum(b.stop - b.start for b in blocks) == len(user)
        owners = [set(user[b].tolist()) for b in blocks]
        assert sum(map(len, owners)) == 5
    assert len(list(user_blocks(user, 3))) >= 4


def test_columns_grow_over_many_chunks(rng: np.random.Generator) -> None:
    parts = [rng.integers(0, 1_000, size=n).astype(np.int32) for n in (0, 60_000, 1, 70_000, 200_000, 5)]
    growing = _Growing(np.int32)
    for part in parts:
        growing.append(part)
    whole = growing.finish()
    assert np.array_equal(whole, np.concatenate(parts))
    counts = count_rows(np.tile(whole, 5), 1_003)
    assert np.array_equal(counts, np.bincount(np.tile(whole, 5), minlength=1_003))
