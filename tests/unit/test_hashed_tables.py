"""Hashed tables: which rows an id reads, and that training, encoding and serving read the same."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import shop
from tests.generations import plain_generation
from twotower.config import parse_config
from twotower.data.prepare import prepare
from twotower.model.batch import Bag
from twotower.model.features import QueryFeatures, item_batch
from twotower.model.hashing import hashed_rows
from twotower.model.towers import table_sizes
from twotower.retrieval.query import HistoryItem, Query
from twotower.retrieval.retriever import Retriever
from twotower.schema import FeatureSchema, FittedFeature, HistoryFeature, IdFeature
from twotower.training.examples import Examples, TowerInputs

HASHES, BUCKETS = 3, 17


def make_schema(share: bool = True) -> FeatureSchema:
    return FeatureSchema(
        query=[
            FittedFeature(spec=IdFeature(name="user_id", dim=4)),
            FittedFeature(
                spec=HistoryFeature(name="h", dim=6, max_length=4, share=share, pooling="weighted")
            ),
        ],
        item=[FittedFeature(spec=IdFeature(name="item_id", dim=6, buckets=BUCKETS, hashes=HASHES))],
        num_users=30,
        num_items=90,
        num_catalogue_items=80,
    )


def test_hashes_are_uniform_independent_and_leave_row_0() -> None:
    found = hashed_rows(torch.arange(60_000), 50, 4)
    assert found.shape == (60_000, 4)
    for column in found.T:
        counts = torch.bincount(column, minlength=51)
        assert counts[0] == 0
        # 60 000 draws into 50 buckets: 1 200 each, standard deviation 34.
        assert (counts[1:] - 1200).abs().max() < 170
    same = (found[:, :1] == found[:, 1:]).float().mean(0)
    assert (same - 1 / 50).abs().max() < 0.004
    assert torch.equal(hashed_rows(torch.tensor([[7], [59_999]]), 50, 4)[:, 0], found[[7, 59_999]])


def test_ids_with_a_bucket_in_common_seldom_have_all() -> None:
    rows = hashed_rows(torch.arange(1000), 400, 2)
    assert len(rows[:, 0].unique()) < 400
    assert len(rows.unique(dim=0)) > 990


def test_the_unknown_item_is_row_0_once() -> None:
    bag = item_batch(make_schema(), [5, -1, 8], {})["item_id"]
    assert isinstance(bag, Bag)
    assert bag.ids[1].tolist() == [0, -1, -1]
    assert bag.weights.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 1]]
    assert torch.equal(bag.ids[[0, 2]], hashed_rows(torch.tensor([5, 8]), BUCKETS, HASHES))


def test_a_history_that_shares_the_table_reads_the_same_rows() -> None:
    args = ([3, -1], {}, [[5, 8, -1], [-1, -1, -1]], [[1.0, 3.0, 0.0], [0.0] * 3])
    bag = QueryFeatures(make_schema(), {})(*args)["h"]
    assert isinstance(bag, Bag)
    assert bag.ids[0].tolist() == [*hashed_rows(torch.tensor([5, 8]), BUCKETS, HASHES).flatten(), -1, -1, -1]
    assert bag.weights.tolist() == [[0.25] * 3 + [0.75] * 3 + [0] * 3, [0] * 9]
    assert (bag.ids[1] == -1).all()
    own = QueryFeatures(make_schema(share=False), {})(*args)["h"]
    assert isinstance(own, Bag)
    assert own.ids.tolist() == [[6, 9, -1], [-1, -1, -1]]


def test_table_sizes() -> None:
    assert table_sizes(make_schema()) == {"id_of_item": (BUCKETS + 1, 6), "id_of_user": (31, 4)}
    own = table_sizes(make_schema(share=False))
    assert own == {"id_of_item": (BUCKETS + 1, 6), "id_of_user": (31, 4), "query_h": (91, 6)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_serving_answers_from_the_embeddings_that_training_makes(dtype: str, tmp_path: Path) -> None:
    """Stored or sent, a history scores as in training's own path through features, tables and towers."""
    shop.write_files(tmp_path / "files")
    values = copy.deepcopy(shop.make_config(tmp_path).to_json())
    values["features"]["query"][0] |= {"buckets": 11, "hashes": 2}
    values["features"]["item"][0] |= {"buckets": BUCKETS, "hashes": HASHES}
    values["model"] |= {"table_dtype": dtype, "normalize": False}
    config = parse_config(values)
    dataset = prepare(config)
    checkpoint = shop.fresh_checkpoint(config, dataset, tmp_path / "checkpoint")
    assert checkpoint.model.tables["id_of_item"].shape == (BUCKETS + 1, 14)
    assert checkpoint.model.tables["id_of_item"].dtype == getattr(torch, dtype)
    generation = plain_generation(config, dataset, checkpoint, "g1")

    inputs = TowerInputs(dataset)
    examples = Examples.of(dataset, inputs, "all")
    user, k = 9, 5
    queries = checkpoint.model.encode_queries(examples.latest_queries(np.array([user])))
    catalogue = np.arange(dataset.num_catalogue_items)
    items = checkpoint.model.encode_items(inputs.items(catalogue))
    assert (items.norm(dim=1) - 1).abs().max() > 0.1, "scores must be inner products"
    expected = (queries @ items.T)[0].sort(descending=True)

    best = [dataset.item_ids.id(int(row)) for row in expected.indices[:k]]

    retriever = Retriever.open(generation)
    past, times, weights = retriever._inputs.users.histories.of_user(user)
    sent = [
        HistoryItem(dataset.item_ids.id(int(i)), int(t), float(w))
        for i, t, w in zip(past, times, weights, strict=True)
    ]
    for history in (None, sent):
        query = Query(user_id=dataset.user_ids.id(user), k=k, exclude_seen=False, history=history)
        answer = retriever.retrieve(query)
        assert [hit["item_id"] for hit in answer.items] == best
        scores = torch.tensor([hit["score"] for hit in answer.items])
        torch.testing.assert_close(scores, expected.values[:k], rtol=1e-4, atol=1e-4)
