"""Users who are forgotten are no examples of a report, nor among those whose metrics it keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.forgetting import GONE, copy_of, dataset_of, files_with, make_shop
from tests.report_content import Page, full_content
from twotower.artefacts import read_manifest, write_json, write_manifest
from twotower.config import Config
from twotower.evaluation.examples import user_key
from twotower.evaluation.page.render import write_page
from twotower.generations.store import Store
from twotower.lifecycle.forget import forget_users


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Before anybody is forgotten; do not change it."""
    return make_shop(tmp_path_factory.mktemp("made"))[0]


@pytest.fixture
def shop(made: Config, tmp_path: Path) -> Config:
    return copy_of(made, tmp_path)


def report_of(
    config: Config, name: str, *users: str, dataset: str | None = None, measured: tuple[str, ...] = ()
) -> Path:
    """A report that shows users, and keeps the metrics of some."""
    content: dict[str, Any] = full_content(20, "title")
    example = content["examples"][0]
    content["examples"] = [{**example, "user_id": user, "key": user_key(user)} for user in users]
    directory = config.reports / name
    directory.mkdir(parents=True)
    write_json(directory / "report.json", content)
    write_page(directory, content)
    (directory / "item_map.png").write_bytes(b"picture")
    facts: dict[str, Any] = {"id": name, "metrics": {}, "by_ranker": {}}
    if measured:
        rows = dataset_of(config).user_ids.rows(measured)
        values = np.arange(len(rows), dtype=np.float32)
        pq.write_table(pa.table({"user_row": rows, "recall@10": values}), directory / "users.parquet")
        facts["dataset"] = dataset or dataset_of(config).fingerprint
    write_manifest(directory, "report", facts)
    return directory


def measured_rows(report: Path) -> dict[int, float]:
    table = pq.read_table(report / "users.parquet")
    return dict(zip(table["user_row"].to_pylist(), table["recall@10"].to_pylist(), strict=True))


def test_an_example_user_is_forgotten(shop: Config) -> None:
    theirs, other = report_of(shop, "r1", GONE, "somebody-else"), report_of(shop, "r2", "somebody-else")
    kept = (other / "report.html").read_bytes()
    before = Page((theirs / "report.html").read_text())
    assert len(before.all("details", class_="example")) == 2
    done = forget_users(shop, Store(shop.store), [GONE])
    assert [(c.name, c.removed) for c in done.changes if c.kind == "report"] == [("r1", {"users": 1})]
    assert files_with(shop.reports, GONE) == set()
    assert files_with(shop.reports, user_key(GONE)) == set()
    after = Page((theirs / "report.html").read_text())
    assert [e.text.strip() for e in after.all("h3") if "somebody-else" in e.text] == ["User somebody-else"]
    assert len(after.all("details", class_="example")) == 1
    assert after.tables() == before.tables()
    content = json.loads((theirs / "report.json").read_text())
    assert [example["user_id"] for example in content["examples"]] == ["somebody-else"]
    assert read_manifest(theirs, "report")["id"] == "r1"
    assert (theirs / "item_map.png").read_bytes() == b"picture"
    assert (other / "report.html").read_bytes() == kept


def test_a_dry_run_counts_them_and_leaves_them(shop: Config) -> None:
    report = report_of(shop, "r1", GONE)
    done = forget_users(shop, Store(shop.store), [GONE], dry_run=True)
    assert [c.name for c in done.changes if c.kind == "report"] == ["r1"]
    assert GONE in (report / "report.html").read_text()


def test_a_report_that_can_not_be_read_is_said(shop: Config) -> None:
    report = report_of(shop, "r1", "somebody-else")
    (report / "report.json").write_text('{"examples": [{"user_id": 7}]}')
    done = forget_users(shop, Store(shop.store), [GONE])
    assert any("report.json" in sentence for sentence in done.left)


def test_metrics_of_a_user_go_by_his_row(shop: Config) -> None:
    """Also of one who is no example, and of the next user, when the dataset is another one already."""
    dataset = dataset_of(shop)
    row, others = int(dataset.user_ids.row(GONE)), dataset.user_ids.rows(["14", "15"]).tolist()
    theirs = report_of(shop, "r1", measured=("14", GONE, "15"))
    without = report_of(shop, "r2", measured=("14", "15"))
    page = (theirs / "report.html").read_bytes()
    assert row in measured_rows(theirs)
    done = forget_users(shop, Store(shop.store), [GONE])
    assert [(c.name, c.removed) for c in done.changes if c.kind == "report"] == [
        ("r1", {"metrics_of_users": 1})
    ]
    assert measured_rows(theirs) == {others[0]: 0.0, others[1]: 2.0}
    assert measured_rows(without) == {others[0]: 0.0, others[1]: 1.0}
    assert (theirs / "report.html").read_bytes() == page
    assert done.left == []
    for report in (theirs, without):
        assert read_manifest(report, "report")["dataset"] == dataset_of(shop).fingerprint
    forget_users(shop, Store(shop.store), ["15"])
    assert measured_rows(theirs) == {others[0]: 0.0}
    assert measured_rows(without) == {others[0]: 0.0}


def test_metrics_of_a_dataset_that_is_gone_are_said(shop: Config) -> None:
    report = report_of(shop, "r1", dataset="0123456789abcdef", measured=("14", GONE))
    before = (report / "users.parquet").read_bytes()
    done = forget_users(shop, Store(shop.store), [GONE])
    assert [s for s in done.left if "users.parquet" in s and "0123456789abcdef" in s] == done.left
    assert len(done.left) == 1
    assert (report / "users.parquet").read_bytes() == before


def test_damaged_metrics_keep_nobody_from_the_rest(shop: Config) -> None:
    report = report_of(shop, "r1", measured=("14", GONE))
    (report / "users.parquet").write_bytes(b"PAR1")
    done = forget_users(shop, Store(shop.store), [GONE])
    assert any("users.parquet can not be read" in sentence for sentence in done.left)
    assert files_with(shop.datasets, GONE) == set()
