"""Queries whose history is a sequence: stored or sent, alone or among others, cut to the longest stretch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.generations import catalogue_vectors
from tests.sequences import TRANSFORMER, transformer
from tests.shop import NUM_ITEMS, build_store
from twotower.data.dataset import Dataset
from twotower.data.histories import Histories
from twotower.model.checkpoint import Checkpoint
from twotower.retrieval.retriever import HistoryItem, Query, Retriever

Store = tuple[Dataset, Path, Retriever]
LENGTH, LONGEST = 6, 8
"""Items that the sequence looks at, and that any feature does: the profile."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    _, dataset, path = build_store(tmp_path_factory.mktemp("sequences"), 100, TRANSFORMER)
    return dataset, path, Retriever.open(path)


def scores(retriever: Retriever, **question: object) -> dict[str, float]:
    answer = retriever.retrieve(Query(k=NUM_ITEMS, exclude_seen=False, **question))
    return {item["item_id"]: item["score"] for item in answer.items}


def history_of(dataset: Dataset, user: int) -> list[HistoryItem]:
    items, times, weights = Histories.of(dataset.interactions).of_user(user)
    return [
        HistoryItem(dataset.item_ids.id(int(i)), int(t), float(w))
        for i, t, w in zip(items, times, weights, strict=True)
    ]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_stored_history_that_is_sent_gives_identical_scores(store: Store, place: int) -> None:
    dataset, _, retriever = store
    lengths = np.diff(Histories.of(dataset.interactions).offsets)
    user = int(np.argsort(-lengths, kind="stable")[place])
    user_id = dataset.user_ids.id(user)
    sent = history_of(dataset, user)
    assert len(sent) > LONGEST > LENGTH
    stored = scores(retriever, user_id=user_id)
    assert scores(retriever, user_id=user_id, history=sent) == stored
    assert scores(retriever, user_id=user_id, history=sent[-LONGEST:]) == stored
    shorter = scores(retriever, user_id=user_id, history=sent[-LENGTH + 1 :])
    assert shorter != stored
    before = scores(retriever, user_id=user_id, at=sent[-1].time)
    assert scores(retriever, user_id=user_id, history=sent[:-1]) == before != stored


def test_the_order_and_the_gaps_count(store: Store) -> None:
    dataset, _, retriever = store
    sent = history_of(dataset, 8)[-4:]
    plain = scores(retriever, history=sent)
    swapped = [sent[1], sent[0], *sent[2:]]
    timeless = [HistoryItem(item.item_id) for item in sent]
    assert scores(retriever, history=swapped) != plain
    assert scores(retriever, history=timeless) != plain
    assert scores(retriever, history=[HistoryItem("no such item"), *sent]) == plain


def test_a_batch_answers_as_its_queries_do(store: Store) -> None:
    dataset, _, retriever = store
    sent = history_of(dataset, 3)
    queries = [
        Query(k=9, user_id=dataset.user_ids.id(3)),
        Query(k=9, history=sent[:1]),
        Query(k=9, features={"age": 44}),
        Query(k=9, history=sent[2:5]),
        Query(k=9, user_id="nobody"),
        Query(k=9, history=sent[:3]),
    ]
    for query, answer in zip(queries, retriever.retrieve_batch(queries), strict=True):
        single = retriever.retrieve(query)
        assert [i["item_id"] for i in answer.items] == [i["item_id"] for i in single.items]
        np.testing.assert_allclose(
            [i["score"] for i in answer.items], [i["score"] for i in single.items], atol=2e-6
        )


def test_scores_are_those_of_loops_over_the_history(store: Store) -> None:
    """The sequence in float64, one item and head at a time, and then the tower."""
    dataset, path, retriever = store
    checkpoint = Checkpoint.open(path / "model")
    model = checkpoint.model
    sent = history_of(dataset, 20)[-LENGTH:]
    rows = dataset.item_ids.rows([item.item_id for item in sent])
    encoder = model.towers.query.encoders["of_history"]
    weights = {name: value.double().numpy() for name, value in encoder.state_dict().items()}
    items = model.tables["id_of_item"].detach().double().numpy()[rows + 1]
    embedding = transformer(weights, items, heads=2, times=[item.time for item in sent])
    query = Query(k=1, history=sent)
    front = retriever
    batch = front._features(*front._inputs.batch([front._inputs.resolve(query, now=10**18)]))
    inputs = model.inputs("query", batch).detach()
    np.testing.assert_allclose(inputs[0, 5:19].numpy(), embedding, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        expected = catalogue_vectors(checkpoint, dataset) @ model.towers.query(inputs)[0].numpy()
    found = scores(retriever, history=sent)
    ids = dataset.item_ids.ids(np.arange(NUM_ITEMS))
    np.testing.assert_allclose([found[i] for i in ids], expected, atol=5e-6)
