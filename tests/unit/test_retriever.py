"""Answers of a retriever: single and in batches, by brute force, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.generations import catalogue_vectors
from tests.shop import NUM_ITEMS, NUM_USERS, build_store
from twotower.data.dataset import Dataset
from twotower.data.histories import Histories
from twotower.errors import ArtefactError, NotAllowedError
from twotower.model.checkpoint import Checkpoint
from twotower.model.features import QueryFeatures, encode_columns, profile_values
from twotower.retrieval.popularity import popularity_scores
from twotower.retrieval.query import UnknownItemError
from twotower.retrieval.retriever import HistoryItem, Query, Retriever


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Path]:
    _, dataset, generation = build_store(tmp_path_factory.mktemp("store"))
    return dataset, generation


@pytest.fixture(scope="module")
def retriever(store: tuple[Dataset, Path]) -> Retriever:
    return Retriever.open(store[1])


def test_scores_are_those_of_the_towers(store: tuple[Dataset, Path], retriever: Retriever) -> None:
    """The features come from the dataset here, and from the generation's tables there."""
    dataset, generation = store
    checkpoint = Checkpoint.open(generation / "model")
    items = catalogue_vectors(checkpoint, dataset)
    profiles = profile_values(checkpoint.schema, encode_columns(checkpoint.schema.item, dataset.item_table()))
    features = QueryFeatures(checkpoint.schema, profiles)
    users = np.arange(NUM_USERS)
    histories = Histories.of(dataset.interactions)
    rows, weights = histories.before(users, None, checkpoint.schema.max_history)
    columns = encode_columns(checkpoint.schema.query, dataset.user_table())
    scores = checkpoint.model.encode_queries(features(users, columns, rows, weights)).numpy() @ items.T
    for user in users:
        answer = retriever.retrieve(Query(k=NUM_ITEMS, user_id=dataset.user_ids.id(user), exclude_seen=False))
        found = np.empty(NUM_ITEMS)
        found[dataset.item_ids.rows([i["item_id"] for i in answer.items])] = [
            i["score"] for i in answer.items
        ]
        np.testing.assert_allclose(found, scores[user], atol=2e-6)
    assert scores.std() > 0.1


def test_a_batch_answers_as_its_queries_do(retriever: Retriever) -> None:
    queries = [
        Query(k=7, user_id="3"),
        Query(k=4),
        Query(k=7, history=[HistoryItem("1001"), HistoryItem("1002", weight=0.5)], fields=["title"]),
        Query(k=2, user_id="3", exclude_seen=False),
        Query(k=9, features={"age": 31}, exclude_items=["1003"]),
        Query(k=100, user_id="8"),
    ]
    answers = retriever.retrieve_batch(queries)
    assert [a.strategy for a in answers] == [
        "personal", "popular", "history", "personal", "features", "personal",
    ]  # fmt: skip
    for query, answer in zip(queries, answers, strict=True):
        single = retriever.retrieve(query)
        assert [i["item_id"] for i in answer.items] == [i["item_id"] for i in single.items]
        np.testing.assert_allclose(
            [i["score"] for i in answer.items], [i["score"] for i in single.items], atol=2e-6
        )
        assert 0 < len(answer.items) <= query.k
        assert list(answer.items[0])[2:] == list(query.fields)
    assert retriever.retrieve_batch([]) == []


def test_similar_items_are_the_nearest(store: tuple[Dataset, Path], retriever: Retriever) -> None:
    dataset, generation = store
    vectors = catalogue_vectors(Checkpoint.open(generation / "model"), dataset)
    row = 17
    scores = vectors @ vectors[row]
    scores[row] = -np.inf
    best = dataset.item_ids.ids(np.argsort(-scores)[:6])
    answer = retriever.similar(dataset.item_ids.id(row), 6)
    assert [i["item_id"] for i in answer.items] == best


@pytest.mark.parametrize("k", [0, -3])
def test_k_below_one(retriever: Retriever, k: int) -> None:
    with pytest.raises(NotAllowedError, match=f"k is {k}; allowed: an integer of 1 or more"):
        retriever.retrieve(Query(k=k))
    with pytest.raises(NotAllowedError, match=f"k is {k}"):
        retriever.similar("1001", k)


def test_fields_and_items_that_are_not_there(retriever: Retriever) -> None:
    with pytest.raises(NotAllowedError, match="items have no column 'colour'; allowed: title, "):
        retriever.retrieve(Query(k=3, fields=["colour"]))
    with pytest.raises(UnknownItemError, match="item 'nothing' is not known"):
        retriever.similar("nothing", 3)
    with pytest.raises(UnknownItemError, match="only occurs in interactions"):
        retriever.similar(str(1000 + NUM_ITEMS), 3)


def test_popularity_scores_fall_along_the_ranking() -> None:
    # Item 1 has the most positives, item 2 was had by more users.
    seen = np.array([1, 1, 2, 2, 2, 0, 4], np.int32)
    scores = popularity_scores(np.array([1, 2, 0, 3]), seen, num_users=5, num_items=6)
    assert scores.tolist() == pytest.approx([0.4, 0.4, 0.2, 0.0])


@pytest.mark.parametrize(
    "name",
    ["model/model.safetensors", "users/seen_item_rows.npy", "shards/00002/item_rows.npy", "popularity.npy"],
)
def test_a_wrong_byte_is_refused(store: tuple[Dataset, Path], tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(store[1], copy)
    content = bytearray((copy / name).read_bytes())
    content[-1] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ArtefactError, match="damaged"):
        Retriever.open(copy)
