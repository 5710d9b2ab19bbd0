"""Users who are forgotten are no examples of a report either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.forgetting import GONE, copy_of, files_with, make_shop
from tests.report_content import Page, full_content
from twotower.artefacts import read_manifest, write_json, write_manifest
from twotower.config import Config
from twotower.evaluation.examples import user_key
from twotower.evaluation.page.render import write_page
from twotower.retrieval.forget import forget_users
from twotower.retrieval.store import Store


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Before anybody is forgotten; do not change it."""
    return make_shop(tmp_path_factory.mktemp("made"))[0]


@pytest.fixture
def shop(made: Config, tmp_path: Path) -> Config:
    return copy_of(made, tmp_path)


def report_of(config: Config, name: str, *users: str) -> Path:
    """A report that shows users."""
    content: dict[str, Any] = full_content(20, "title")
    example = content["examples"][0]
    content["examples"] = [{**example, "user_id": user, "key": user_key(user)} for user in users]
    directory = config.reports / name
    directory.mkdir(parents=True)
    write_json(directory / "report.json", content)
    write_page(directory, content)
    (directory / "item_map.png").write_bytes(b"picture")
    write_manifest(directory, "report", {"id": name, "metrics": {}, "by_ranker": {}})
    return directory


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
