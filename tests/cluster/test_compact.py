"""Compaction: what updates changed becomes part of the base shards, and no answer changes."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from jobs import update_items as job
from tests.apart import Apart
from tests.generations import edit_index
from tests.shop import NUM_ITEMS, NUM_USERS, build_store
from tests.updates import Item, copied, items_of, table_of, write_config
from twotower.cluster import compact
from twotower.config import Config, parse_config
from twotower.generations.files import file_facts
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.index.spec import shard_of
from twotower.lifecycle.update import update_items
from twotower.model.checkpoint import WEIGHTS
from twotower.retrieval.query import Query
from twotower.retrieval.retriever import Retriever

DEADLINE_S = 240

# The job kills itself before it renames something to the name in the last argument.
JOB = """
import os, signal, sys
from pathlib import Path
from jobs import update_items

def watch(event, arguments):
    if event == "os.rename" and Path(os.fspath(arguments[1])).name == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
sys.exit(update_items.main(["--config", sys.argv[1], "--compact"]))
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A published generation; do not change it."""
    return build_store(tmp_path_factory.mktemp("compact"))[0]


@pytest.fixture
def config(shop: Config, tmp_path: Path) -> Config:
    return copied(shop, tmp_path / "runs")


@pytest.fixture
def store(config: Config) -> Store:
    return Store(config.store)


def changes_of(generation: Path) -> tuple[list[Item], list[str]]:
    """Two items added, two changed, three deleted."""
    items = items_of(generation)
    new = [{**items["1004"], "item_id": f"new{n}", "title": f"New {n}"} for n in range(2)]
    changed = [{**items[i], "genres": "War", "year": 1931} for i in ("1007", "1022")]
    return [*new, *changed], ["1001", "1030", "1058"]


def updated(store: Store) -> str:
    given, deleted = changes_of(store.path("g1"))
    return update_items(store, table_of(given, store.path("g1")), deleted).generation


Answers = list[dict[str, tuple[float, str]]]


def answers(path: Path) -> Answers:
    """Score and title of all items by id, for every user, an unknown one, and with a filter."""
    retriever = Retriever.open(path)
    queries = [Query(user_id=str(u), k=200, fields=["title"]) for u in range(NUM_USERS)]
    queries += [
        Query(k=200, fields=["title"]),
        Query(user_id="3", k=200, fields=["title"], filter={"genres": {"any_of": ["War"]}}),
    ]
    return [
        {item["item_id"]: (item["score"], item["title"]) for item in answer.items}
        for answer in retriever.retrieve_batch(queries)
    ]


def assert_same(
    found: list[dict[str, tuple[float, str]]], expected: list[dict[str, tuple[float, str]]]
) -> None:
    """The same items with the same titles, and scores but for the last bits of another batch."""
    assert len(found) == len(expected) == NUM_USERS + 2
    for mine, theirs in zip(found, expected, strict=True):
        assert {i: title for i, (_, title) in mine.items()} == {i: title for i, (_, title) in theirs.items()}
        for item, (score, _) in mine.items():
            assert score == pytest.approx(theirs[item][0], abs=1e-5)


def test_answers_stay_and_the_delta_is_gone(ray_local: None, config: Config, store: Store) -> None:
    before = updated(store)
    file = write_config(config, config.storage.path / "config.yaml")
    assert job.main(["--config", str(file), "--compact"]) == 0
    after = store.current()
    assert after not in (None, before, "g1")
    old, new = Generation.open(store.path(before)), Generation.open(store.path(str(after)))
    assert old.manifest["delta"]["deleted"] == 3
    assert new.manifest["delta"] is None
    assert len(new.dead_rows) == len(new.delta_rows) == 0
    assert new.num_items == old.num_items == NUM_ITEMS + 2 - 3
    # The rows of deleted items are gaps: rows stay what towers and seen sets know.
    np.testing.assert_array_equal(new.answerable_rows(), old.answerable_rows())
    assert int(new.answerable_rows()[-1]) >= new.num_items
    for shard in new.manifest["shards"]:
        rows = np.load(new.path / "shards" / shard["name"] / "item_rows.npy")
        assert (shard_of(new.item_ids.ids(rows), 3) == int(shard["name"])).all()
    expected = answers(old.path)
    assert [len(a) for a in expected[-2:]] == [new.num_items, len(expected[-1])]
    assert 0 < len(expected[-1]) < 40
    assert_same(answers(new.path), expected)
    assert {"new0", "1007"} <= set(expected[-2])
    for name in (f"model/{WEIGHTS}", "users/seen_item_rows.npy", "popularity.npy"):
        assert os.path.samefile(old.path / name, new.path / name)

    # Compacting again does nothing, and updates go on from here.
    assert job.main(["--config", str(file), "--compact"]) == 0
    assert store.current() == after
    given, _ = changes_of(store.path("g1"))
    again = update_items(store, table_of([{**given[0], "year": 1}], store.path("g1")), ["1002"])
    assert (again.base, again.changed, again.deleted, again.added) == (after, 1, 1, 0)
    assert Generation.open(store.path(again.generation)).manifest["delta"]["base"] == after


def test_updates_beyond_a_share_are_compacted(
    ray_local: None, config: Config, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = config.to_json()
    values["index"]["max_delta_share"] = 2 / NUM_ITEMS
    file = write_config(parse_config(values), tmp_path / "config.yaml")

    def run(*arguments: str) -> dict[str, Any]:
        assert job.main(["--config", str(file), *arguments]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1].partition(" ")[2])

    first = run("--delete-id", "1001", "1002")
    assert first["generation"] == first["updated"]
    assert Generation.open(store.path(first["generation"])).manifest["delta"]["deleted"] == 2
    second = run("--delete-id", "1003")
    assert second["generation"] != second["updated"]
    assert store.current() == second["generation"]
    assert Generation.open(store.path(second["generation"])).manifest["delta"] is None
    assert store.has(second["updated"])
    assert store.rollback().id == second["updated"]


def test_a_compaction_below_its_target_leaves_the_update(
    ray_local: None, config: Config, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = updated(store)
    real = compact.build_index

    def poor(*arguments: Any) -> dict[str, Any]:
        return {**real(*arguments), "index_recall": 0.5}

    monkeypatch.setattr(compact, "build_index", poor)
    file = write_config(config, tmp_path / "config.yaml")
    assert job.main(["--config", str(file), "--compact"]) == 3
    assert store.current() == before
    # What was built is there to be published all the same.
    assert job.main(["--config", str(file), "--compact", "--force"]) == 0
    assert store.current() != before
    assert store.publications()[-1].reasons


def test_a_killed_compaction_is_finished_by_the_next_one(
    ray_local: None, config: Config, store: Store, tmp_path: Path
) -> None:
    before = updated(store)
    file = write_config(config, tmp_path / "config.yaml")
    work = store.root / ".work"
    for fatal in ("index.faiss", "manifest.json", "CURRENT"):
        process = Apart(JOB, file, fatal, RAY_ADDRESS=ray.get_runtime_context().gcs_address)
        if fatal == "index.faiss":
            # Ray's workers write shards: the driver is killed when the first file is there.
            while not any(work.glob(f"*/shards/*/{fatal}")):
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.01)
            process.kill()
        _, shown = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == -signal.SIGKILL, shown
        assert store.current() == before
        for name in store.generations():
            Generation.open(store.path(name), verify=True)

    assert job.main(["--config", str(file), "--compact"]) == 0
    after = str(store.current())
    assert after != before
    assert_same(answers(store.path(after)), answers(store.path(before)))
    assert [p.name for p in work.iterdir() if not p.name.endswith(".lock")] == []
    assert not [p for p in (store.root / "generations").iterdir() if p.name.endswith(".partial")]


def test_the_index_of_a_compaction_is_chosen_for_what_there_is(
    ray_local: None, config: Config, store: Store, tmp_path: Path
) -> None:
    """Inverted lists, whose labels are item rows with gaps; the configuration of the build says so."""
    path = store.path("g1") / "config.json"
    values = json.loads(path.read_text())
    values["index"] |= {"factory": "IVF3,SQ8", "shard_items": 20, "recall_k": 5, "target_index_recall": 0.5}
    path.write_text(json.dumps(values))
    manifest = json.loads((store.path("g1") / "manifest.json").read_text())
    manifest["files"]["config.json"] = file_facts(path)
    (store.path("g1") / "manifest.json").write_text(json.dumps(manifest))
    edit_index(store.path("g1"), target_index_recall=0.5)
    before = updated(store)
    file = write_config(config, tmp_path / "config.yaml")
    assert job.main(["--config", str(file), "--compact"]) == 0
    after = Generation.open(store.path(str(store.current())))
    assert after.manifest["index"]["factory"] == "IVF3,SQ8"
    assert len(after.manifest["shards"]) == 3
    assert answers(after.path)[-2] == answers(store.path(before))[-2]
    # Every list visited: the same best items, up to what codes round.
    exact, rounded = (
        Retriever.open(p).retrieve(Query(user_id="5", k=200)).items for p in (store.path(before), after.path)
    )
    assert {i["item_id"] for i in exact} == {i["item_id"] for i in rounded}
    scores = {i["item_id"]: i["score"] for i in exact}
    assert max(abs(scores[i["item_id"]] - i["score"]) for i in rounded) < 0.03
