"""Generations whose files are as they were written and answer nonsense, and those that are pruned in use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import safetensors.numpy

from tests.generations import edit_manifest
from tests.shop import NUM_ITEMS, NUM_USERS, build_store
from twotower.artefacts import MANIFEST, read_manifest
from twotower.config import Config
from twotower.errors import ArtefactError
from twotower.generations.files import file_facts
from twotower.generations.generation import Generation
from twotower.generations.names import CURRENT
from twotower.generations.store import Store
from twotower.retrieval.canary import check_answers, check_vectors, sampled_rows
from twotower.retrieval.follower import Follower
from twotower.retrieval.query import HistoryItem, Query
from twotower.retrieval.retriever import Retriever


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A configuration with the published generation g1; do not change it."""
    return build_store(tmp_path_factory.mktemp("canary"))[0]


@pytest.fixture
def generation(shop: Config, tmp_path: Path) -> Path:
    """A copy of that generation."""
    return Path(shutil.copytree(Store(shop.store).path("g1"), tmp_path / "g1"))


def write_facts(path: Path) -> None:
    """Let the manifest say of every file what it is now."""
    files = read_manifest(path, "generation")["files"]
    edit_manifest(path, files={name: file_facts(path / name) for name in files})


def edit_vectors(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace the vectors of every shard."""
    for file in path.glob("shards/*/index.faiss"):
        index = faiss.read_index(str(file))
        other = faiss.IndexFlatIP(index.d)
        other.add(np.ascontiguousarray(change(index.reconstruct_n(0, index.ntotal))))
        faiss.write_index(other, str(file))
    write_facts(path)


def edit_tower(path: Path, side: str, value: float) -> None:
    """Set all weights of the last layer of a tower, and let everything be of these towers."""
    file = path / "model" / "model.safetensors"
    weights = safetensors.numpy.load_file(file)
    names = [name for name in weights if f"{side}.output" in name]
    assert len(names) == 2, sorted(weights)
    safetensors.numpy.save_file(
        {n: np.full_like(w, value) if n in names else w for n, w in sorted(weights.items())}, file
    )
    new = file_facts(file)["sha256"]
    old = read_manifest(path, "generation")["checkpoint_fingerprint"]
    for other in [path / MANIFEST, path / "model" / MANIFEST, *path.glob("shards/*/shard.json")]:
        text = other.read_text()
        assert old in text
        other.write_text(text.replace(old, new))
    write_facts(path)


def nan(vectors: np.ndarray) -> np.ndarray:
    return np.full_like(vectors, np.nan)


def of_others(vectors: np.ndarray) -> np.ndarray:
    return np.roll(vectors, 1, axis=0)


def test_what_makes_sense_passes(generation: Path) -> None:
    write_facts(generation)
    retriever = Retriever.ready(Generation.open(generation))
    assert retriever.retrieve(Query(k=3, user_id="5")).generation == "g1"
    edit_vectors(generation, lambda vectors: vectors)
    assert len(sampled_rows(Retriever.ready(Generation.open(generation)))) == 32


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda path: edit_vectors(path, nan), "canary|NaN"),
        (lambda path: edit_vectors(path, of_others), "vectors are those of other items"),
        (lambda path: edit_tower(path, "query", np.nan), "NaN or infinity"),
        (lambda path: edit_tower(path, "item", np.nan), "NaN or infinity"),
        (lambda path: edit_tower(path, "item", 1.0), "vectors are those of other items or of another tower"),
    ],
    ids=["NaN vectors", "vectors of others", "NaN query tower", "NaN item tower", "another item tower"],
)
def test_nonsense_is_refused(generation: Path, break_it: Callable[[Path], None], reason: str) -> None:
    break_it(generation)
    opened = Generation.open(generation)
    # Nothing else would notice.
    Retriever(opened)
    with pytest.raises(ArtefactError, match=reason):
        Retriever.ready(opened)


def test_users_that_had_everything_are_no_error(generation: Path) -> None:
    offsets = np.load(generation / "users" / "seen_offsets.npy")
    everything = np.arange(NUM_ITEMS, dtype=np.int32)
    np.save(generation / "users" / "seen_offsets.npy", np.arange(len(offsets)) * NUM_ITEMS)
    np.save(generation / "users" / "seen_item_rows.npy", np.tile(everything, len(offsets) - 1))
    write_facts(generation)
    retriever = Retriever.ready(Generation.open(generation))
    assert retriever.retrieve(Query(k=3, user_id="5")).items == []


def test_too_few_answers_are_refused(generation: Path) -> None:
    retriever = Retriever(Generation.open(generation))
    answered = retriever.retrieve

    def short(query: Query) -> Any:
        answer = answered(query)
        del answer.items[-1]
        return answer

    check_answers(retriever, answered)
    with pytest.raises(ArtefactError, match="canary query of a known user failed: 9 items .* instead of 10"):
        check_answers(retriever, short)


def test_vectors_that_are_rounded_pass_and_lists_that_are_not_found_do_not() -> None:
    rng = np.random.default_rng(4)
    encoded = rng.standard_normal((32, 13)).astype(np.float32)
    encoded /= np.linalg.norm(encoded, axis=1, keepdims=True)
    rounded = encoded + rng.standard_normal(encoded.shape).astype(np.float32) * 0.05

    def search(vectors: np.ndarray) -> np.ndarray:
        return np.asarray((vectors @ rounded.T).max(axis=1))

    def finds(count: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda v: np.where(np.isin(v[:, 0], encoded[:count, 0]), search(v), -np.inf)

    check_vectors(encoded, rounded, search)
    # Half of them may be lost, not more.
    check_vectors(encoded, rounded, finds(16))
    with pytest.raises(ArtefactError, match="finds only 47% of 32 items"):
        check_vectors(encoded, rounded, finds(15))
    with pytest.raises(ArtefactError, match="other items"):
        check_vectors(encoded, of_others(rounded), search)
    # Equal vectors can not be told apart.
    check_vectors(encoded[:1].repeat(9, axis=0), encoded[:1].repeat(9, axis=0), search)


def test_what_is_pruned_while_it_answers_goes_on_answering(shop: Config, tmp_path: Path) -> None:
    store = Store(shutil.copytree(shop.store, tmp_path / "store"))
    shutil.copytree(store.path("g1"), store.path("g2"))
    edit_manifest(store.path("g2"), id="g2", created="2027")
    queries = [
        *(Query(user_id=str(u), k=9, fields=["title", "year"]) for u in range(NUM_USERS)),
        Query(k=12, history=[HistoryItem("1003")], filter={"genres": {"any_of": ["War"]}}),
        Query(k=12, filter={"year": {"gte": 1970}, "label": {"none_of": ["brand 1"]}}),
        Query(k=12, features={"age": 30}, allow_items=["1001", "1002", "1003"]),
        Query(k=12, features={"group": "red"}, exclude_items=["1001"]),
    ]
    untouched = Retriever.open(Store(shop.store).path("g1"))
    expected = [untouched.retrieve(query).items for query in queries]
    follower = Follower(store, CURRENT, Retriever.ready)
    held = follower.open()
    store.publish("g2")
    assert store.prune(keep=1, grace_s=0).generations == ["g1"]
    assert not store.path("g1").exists()
    assert [held.retrieve(query).items for query in queries] == expected
    assert held.similar("1003", 9, ["title"]).items == untouched.similar("1003", 9, ["title"]).items
    assert held.describe() == untouched.describe()
    assert json.dumps(held.attributes)
