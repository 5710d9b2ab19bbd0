from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.datasets import write_zip
from twotower.config import parse_config
from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.errors import ConfigError, DataError

FILES = {
    "train.txt": "0 5 3 9 1\n1 3 8 5\n\n2 9\n",
    "test.txt": "0 8\n1 9 1\n2\n",
    "item_list.txt": "org_id remap_id\n" + "".join(f"x{n} {n}\n" for n in range(11)),
    "user_list.txt": "org_id remap_id\nalice 0\nbob 1\ncarol 2\ndave 3\n",
}


def run(tmp_path: Path, path: Path, **changes: Any) -> Dataset:
    data = {"source": {"kind": "lightgcn", "path": str(path)}, **changes}
    return prepare(
        parse_config({"storage": {"root": str(tmp_path / "runs")}, "data": data, "split": {"kind": "given"}})
    )


def folder(tmp_path: Path, **changes: str | None) -> Path:
    made = tmp_path / "raw"
    made.mkdir()
    for name, content in {**FILES, **{k.replace("_txt", ".txt"): v for k, v in changes.items()}}.items():
        if content is not None:
            (made / name).write_text(content)
    return made


def pairs(dataset: Dataset, *splits: int) -> set[tuple[str, str]]:
    data = dataset.interactions
    mask = [s in splits for s in data.split.tolist()]
    rows = [(u, i) for u, i, m in zip(data.user_row, data.item_row, mask, strict=True) if m]
    return {(dataset.user_ids.id(int(u)), dataset.item_ids.id(int(i))) for u, i in rows}


def test_a_folder_and_a_zip_are_the_same(tmp_path: Path) -> None:
    raw = folder(tmp_path)
    in_folder = run(tmp_path, raw)
    zipped = write_zip(tmp_path / "raw.zip", {f"gowalla/{name}": text for name, text in FILES.items()})
    in_zip = run(tmp_path, zipped)
    assert in_folder.fingerprint == in_zip.fingerprint
    assert len(in_zip.manifest["raw"]["sha256"]) == 64
    assert pairs(in_zip, 2) == {("0", "8"), ("1", "9"), ("1", "1")}
    train = {("0", "5"), ("0", "3"), ("0", "9"), ("0", "1"), ("1", "3"), ("1", "8"), ("1", "5"), ("2", "9")}
    assert pairs(in_zip, 0, 1) == train
    assert pairs(in_zip, 1)
    assert not in_zip.has_times
    assert in_zip.item_ids.ids(range(11)) == [str(n) for n in range(11)]
    assert in_zip.item_table(["item_id", "original_id"]).slice(10).to_pylist() == [
        {"item_id": "10", "original_id": "x10"}
    ]
    assert in_zip.user_table(["original_id"]).column(0).to_pylist() == ["alice", "bob", "carol", "dave"]


def test_without_lists_the_catalogue_is_what_the_pairs_hold(tmp_path: Path) -> None:
    dataset = run(tmp_path, folder(tmp_path, item_list_txt=None, user_list_txt=None))
    assert dataset.item_ids.ids(range(dataset.num_items)) == ["5", "3", "9", "1", "8"]
    assert dataset.num_catalogue_items == 5
    assert dataset.num_users == 3


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist; give a folder or zip"):
        run(tmp_path, tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"lacks test\.txt"):
        run(tmp_path, folder(tmp_path, test_txt=None))
    zipped = write_zip(tmp_path / "raw.zip", dict(FILES))
    zipped.write_bytes(zipped.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"raw\.zip is not a complete zip file"):
        run(tmp_path, zipped)


def test_lines_that_are_no_numbers_are_bad_rows(tmp_path: Path) -> None:
    raw = folder(tmp_path, train_txt=FILES["train.txt"] + "3 4 x\n")
    with pytest.raises(DataError, match=r"train\.txt row 5: that is no line of whole numbers: '3 4 x'"):
        run(tmp_path, raw)
    assert run(tmp_path, raw, on_bad_rows="drop").counts["bad_rows"] == 1


def test_temporal_splits_are_refused_with_the_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs times"):
        parse_config({"data": {"source": {"kind": "lightgcn", "path": str(tmp_path)}}})
