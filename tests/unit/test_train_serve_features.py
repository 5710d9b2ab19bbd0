"""The same (user, t) gives the same features in training and in serving: stored history or sent."""

import numpy as np
import pytest
import torch

from twotower.data.dataset import Dataset
from twotower.data.histories import Histories
from twotower.model.features import Bag, FeatureBatch, QueryFeatures, encode_columns, profile_values
from twotower.retrieval.inputs import Inputs, UserTable
from twotower.retrieval.query import HistoryItem, Query
from twotower.training.examples import Examples, TowerInputs


def assert_equal_features(found: FeatureBatch, expected: FeatureBatch) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        other = found[name]
        if isinstance(value, Bag):
            assert isinstance(other, Bag)
            assert torch.equal(other.ids, value.ids), name
            assert torch.equal(other.weights, value.weights), name
        else:
            assert torch.equal(other, value), name


@pytest.fixture(scope="module")
def serving(small_dataset: Dataset) -> tuple[Inputs, QueryFeatures]:
    """What a generation would hold: histories of everything, up to the end of the test period."""
    schema = small_dataset.schema
    none = np.zeros(schema.num_users + 1, np.int64)
    columns = encode_columns(schema.query, small_dataset.user_table())
    histories = Histories.of(small_dataset.interactions)
    users = UserTable(small_dataset.user_ids, histories, none, np.zeros(0, np.int64), columns)
    profiles = profile_values(schema, encode_columns(schema.item, small_dataset.item_table()))
    return Inputs(schema, users, small_dataset.item_ids), QueryFeatures(schema, profiles)


def test_training_and_serving_make_equal_features(
    small_dataset: Dataset, serving: tuple[Inputs, QueryFeatures]
) -> None:
    inputs, features = serving
    examples = Examples.of(small_dataset, TowerInputs(small_dataset), "train")
    some = np.arange(0, len(examples), 41)
    trained = examples.queries(some)
    positions = examples._examples[some]
    users, times = examples._user_of[positions], examples.histories.times[positions]

    stored, sent = [], []
    for user, time in zip(users, times, strict=True):
        user_id = small_dataset.user_ids.id(int(user))
        stored.append(Query(user_id=user_id, at=int(time), k=5))
        items, when, weights = inputs.users.histories.of_user(int(user))
        history = [
            HistoryItem(small_dataset.item_ids.id(int(i)), int(t), float(w))
            for i, t, w in zip(items, when, weights, strict=True)
        ]
        sent.append(Query(user_id=user_id, at=int(time), k=5, history=history))
    for queries in (stored, sent):
        served = features(*inputs.batch([inputs.resolve(q, now=0) for q in queries]))
        assert_equal_features(served, trained)
    history = trained["history"]
    assert isinstance(history, Bag)
    lengths = (history.ids >= 0).sum(1)
    assert lengths.max() == 13
    assert lengths.min() < 5
    assert all(torch.count_nonzero(v) > 0 for v in trained.values() if isinstance(v, torch.Tensor))
