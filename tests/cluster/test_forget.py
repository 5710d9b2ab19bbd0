"""After users are forgotten: a build of the same checkpoint, offline lists and the evaluation."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from tests.forgetting import GONE, make_shop, others
from twotower.cluster.build import build_generation
from twotower.cluster.evaluate import evaluate
from twotower.cluster.recommend import PARTS, recommend
from twotower.data.prepare import prepare
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.lifecycle.forget import forget_users


def test_the_other_jobs_go_on_without_him(ray_local: None, tmp_path: Path) -> None:
    config, _ = make_shop(tmp_path)
    store = Store(config.store)
    expected = set(others(prepare(config)))
    kept = pq.read_table(recommend(config, store.fetch("build")) / PARTS)
    assert set(kept["user_id"].to_pylist()) == {GONE, *expected}
    forget_users(config, store, [GONE])
    dataset = prepare(config)
    checkpoint = config.checkpoints / "first"
    path = build_generation(config, dataset, checkpoint)
    store.publish(path.name, "next")
    successor = next(n for n in store.generations() if "build" in store.manifest(n).get("replaces", ()))
    manifest = store.manifest(successor)
    assert Generation.open(path).manifest["checkpoint_fingerprint"] == manifest["checkpoint_fingerprint"]
    for generation in (path, store.fetch(successor)):
        lists = recommend(config, generation)
        table = pq.read_table(lists / PARTS)
        # The same lists for everybody else, and none for him.
        assert set(table["user_id"].to_pylist()) == expected
        theirs = [row for row in kept.to_pylist() if row["user_id"] != GONE]
        found = {(row["user_id"], row["item_id"]): row["score"] for row in table.to_pylist()}
        assert found.keys() == {(row["user_id"], row["item_id"]) for row in theirs}
        assert all(abs(found[row["user_id"], row["item_id"]] - row["score"]) < 1e-5 for row in theirs)
        report = evaluate(config, dataset, checkpoint, generation)
        assert (report / "manifest.json").is_file()
