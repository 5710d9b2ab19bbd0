"""Offline recommendation on a local Ray: what the retriever answers for every user, in parts that resume."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.recommendations import recommend_config, run_until_killed
from tests.shop import NUM_USERS, build_store
from twotower.artefacts import has_manifest, read_manifest
from twotower.cluster import recommend as module
from twotower.cluster.recommend import recommend
from twotower.cluster.recommend_parts import SCHEMA
from twotower.errors import ArtefactError
from twotower.generations.generation import Generation
from twotower.retrieval.query import Query
from twotower.retrieval.retriever import Retriever

K = 13


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build_store(tmp_path_factory.mktemp("recommend"))


def variant(config, root, **sections):
    return recommend_config(config, root, K, **sections)


@pytest.fixture(scope="module")
def config(store, tmp_path_factory):
    return variant(store[0], tmp_path_factory.mktemp("out"), actors=2)


@pytest.fixture(scope="module")
def recommended(ray_local, config, store):
    return recommend(config, store[2])


def lists_of(directory):
    """(item_id, score) of each user, by rank, from all parts."""
    lists = {}
    for path in sorted(directory.glob("parts/part-*.parquet")):
        table = pq.read_table(path)
        assert table.schema.equals(SCHEMA), path
        for row in table.to_pylist():
            mine = lists.setdefault(row["user_id"], [])
            mine.append((row["item_id"], row["score"]))
            assert row["rank"] == len(mine)
    return lists


def assert_same(first, second):
    assert first.keys() == second.keys()
    for user_id, mine in first.items():
        assert [item for item, _ in mine] == [item for item, _ in second[user_id]]
        np.testing.assert_allclose([s for _, s in mine], [s for _, s in second[user_id]], atol=1e-6)


def test_every_user_gets_what_the_retriever_answers(recommended, store):
    retriever = Retriever.open(store[2])
    ids = [str(i) for i in range(NUM_USERS)]
    lists = lists_of(recommended)
    assert sorted(lists) == sorted(ids)
    assert len(list(recommended.glob("parts/part-*.parquet"))) == 5
    for user_id in ids:
        answer = retriever.retrieve(Query(user_id=user_id, k=K))
        assert len(answer.items) == K
        assert [item for item, _ in lists[user_id]] == [item["item_id"] for item in answer.items]
        np.testing.assert_allclose(
            [s for _, s in lists[user_id]], [i["score"] for i in answer.items], atol=1e-6
        )


def test_no_user_gets_what_he_has_had(recommended, store):
    generation = Generation.open(store[2])
    lists = lists_of(recommended)
    overlaps = 0
    for row in range(NUM_USERS):
        seen = set(generation.item_ids.ids(generation.seen(row)))
        assert not seen & {item for item, _ in lists[generation.user_ids.id(row)]}
        overlaps += len(seen)
    assert overlaps > NUM_USERS


def test_manifest_counts_rows(recommended, config):
    manifest = read_manifest(recommended, "recommendations")
    assert manifest["num_users"] == NUM_USERS
    assert manifest["num_rows"] == NUM_USERS * K
    assert manifest["num_empty"] == 0
    assert manifest["generation"] == "g1"
    assert sorted(p.name for p in recommended.iterdir()) == ["config.json", "manifest.json", "parts"]
    assert pq.read_table(recommended / "parts").num_rows > 0


def test_same_inputs_are_recommended_once(recommended, config, store, monkeypatch):
    monkeypatch.setattr(module, "work_through", None)
    assert recommend(config, store[2]) == recommended


def test_fewer_than_k_only_where_fewer_are_left_and_seen_items_on_request(ray_local, config, store):
    everything = variant(config, config.storage.root, recommend={"k": 59})
    generation = Generation.open(store[2])
    lists = lists_of(recommend(everything, store[2]))
    lengths = {len(lists[generation.user_ids.id(row)]) for row in range(NUM_USERS)}
    assert len(lengths) > 1
    for row in range(NUM_USERS):
        seen = generation.seen(row)
        assert len(lists[generation.user_ids.id(row)]) == 59 - int((seen < 59).sum())


def test_a_run_goes_on_with_the_parts_that_are_missing(recommended, config, store, tmp_path, monkeypatch):
    mine = variant(config, tmp_path)
    partial = mine.recommendations / f".{recommended.name}.partial" / "parts"
    partial.mkdir(parents=True)
    parts = sorted(recommended.glob("parts/part-*.parquet"))
    for path in parts[1:3]:
        shutil.copy(path, partial / path.name)
    # Left by another sharing-out, and by a write that did not end.
    shutil.copy(parts[0], partial / "part-0000000000-0000000003.parquet")
    (partial / f".{parts[0].name}.77.tmp").write_bytes(b"half")
    asked = []
    real = module.work_through

    def spy(worker, settings, missing, *rest, **more):
        asked.extend(missing)
        return real(worker, settings, missing, *rest, **more)

    monkeypatch.setattr(module, "work_through", spy)
    path = recommend(mine, store[2])
    assert [part["start"] for part in asked] == [0, 24, 32]
    assert_same(lists_of(path), lists_of(recommended))
    assert {p.name for p in path.rglob("*")} == {p.name for p in recommended.rglob("*")}


def test_damaged_part_is_an_error_and_nothing_is_finished(recommended, config, store, tmp_path):
    mine = variant(config, tmp_path)
    partial = mine.recommendations / f".{recommended.name}.partial" / "parts"
    partial.mkdir(parents=True)
    for path in recommended.glob("parts/part-*.parquet"):
        shutil.copy(path, partial / path.name)
    last = max(partial.iterdir())
    last.write_bytes(last.read_bytes()[:-30])
    with pytest.raises(ArtefactError, match=f"{last.name} can not be read"):
        recommend(mine, store[2])
    assert not has_manifest(mine.recommendations / recommended.name)


def test_damaged_generation_is_refused_before_anything_is_written(store, config, tmp_path):
    damaged = tmp_path / "g1"
    shutil.copytree(store[2], damaged)
    path = damaged / "shards" / "00001" / "index.faiss"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    mine = variant(config, tmp_path / "out")
    with pytest.raises(ArtefactError, match=r"index\.faiss"):
        recommend(mine, damaged)
    assert not mine.recommendations.exists()


def test_killed_run_leaves_nothing_visible_and_the_next_one_finishes(recommended, config, store, tmp_path):
    mine = variant(config, tmp_path)
    run_until_killed(mine, store[2], tmp_path)
    visible = [p for p in mine.recommendations.iterdir() if not p.name.startswith(".")]
    assert visible == []
    left = mine.recommendations / f".{recommended.name}.partial"
    assert len(list(left.glob("parts/part-*.parquet"))) == 2
    assert_same(lists_of(recommend(mine, store[2])), lists_of(recommended))
