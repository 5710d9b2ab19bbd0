"""The same (user, t) gives the same features in training and in serving: stored history or sent."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.sequences import ATTENTION, TRANSFORMER, with_history
from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.data.histories import Histories
from twotower.data.prepare import prepare
from twotower.model.batch import Bag, FeatureBatch, Sequences
from twotower.model.features import QueryFeatures, encode_columns, profile_values
from twotower.model.towers import TwoTower
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


def serving_of(small_dataset: Dataset) -> tuple[Inputs, QueryFeatures]:
    """Return what a generation would hold: histories of everything, up to the end of the test period."""
    schema = small_dataset.schema
    none = np.zeros(schema.num_users + 1, np.int64)
    columns = encode_columns(schema.query, small_dataset.user_table())
    histories = Histories.of(small_dataset.interactions)
    users = UserTable(small_dataset.user_ids, histories, none, np.zeros(0, np.int64), columns)
    profiles = profile_values(schema, encode_columns(schema.item, small_dataset.item_table()))
    return Inputs(schema, users, small_dataset.item_ids), QueryFeatures(schema, profiles)


def asked(dataset: Dataset, inputs: Inputs, examples: Examples, some: np.ndarray) -> list[list[Query]]:
    """Return the queries of examples as those of a service, with histories stored and sent."""
    positions = examples._examples[some]
    users, times = examples._user_of[positions], examples.histories.times[positions]
    stored, sent = [], []
    for user, time in zip(users, times, strict=True):
        user_id = dataset.user_ids.id(int(user))
        stored.append(Query(user_id=user_id, at=int(time), k=5))
        items, when, weights = inputs.users.histories.of_user(int(user))
        history = [
            HistoryItem(dataset.item_ids.id(int(i)), int(t), float(w))
            for i, t, w in zip(items, when, weights, strict=True)
        ]
        sent.append(Query(user_id=user_id, at=int(time), k=5, history=history))
    return [stored, sent]


def test_training_and_serving_make_equal_features(small_dataset: Dataset) -> None:
    inputs, features = serving_of(small_dataset)
    examples = Examples.of(small_dataset, TowerInputs(small_dataset), "train")
    some = np.arange(0, len(examples), 41)
    trained = examples.queries(some)
    for queries in asked(small_dataset, inputs, examples, some):
        served = features(*inputs.batch([inputs.resolve(q, now=0) for q in queries]))
        assert_equal_features(served, trained)
    history = trained["history"]
    assert isinstance(history, Bag)
    lengths = (history.ids >= 0).sum(1)
    assert lengths.max() == 13
    assert lengths.min() < 5
    assert all(torch.count_nonzero(v) > 0 for v in trained.values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("history", [TRANSFORMER, ATTENTION], ids=["transformer", "attention"])
def test_training_and_serving_encode_sequences_alike(
    history: dict[str, Any], small_config: Config, tmp_path: Path
) -> None:
    """Training reads many examples from one window, serving each from the history stored or sent."""
    config = with_history(small_config, max_length=300, **history)
    root = config.storage.model_copy(update={"root": str(tmp_path)})
    dataset = prepare(config.model_copy(update={"storage": root}))
    inputs, features = serving_of(dataset)
    examples = Examples.of(dataset, TowerInputs(dataset), "train")
    model = TwoTower(dataset.schema, config.model, 0.1, seed=3).eval()
    for parameter in [*model.towers.query.encoders.parameters(), *model.tables.values()]:
        torch.nn.init.normal_(parameter, std=0.3)
    some = np.arange(0, len(examples), 7)
    trained = examples.queries(some)
    sequences = trained["history"]
    assert isinstance(sequences, Sequences)
    assert sequences.names is not None
    assert len(sequences.names) < 0.5 * len(some)
    together = model.encode_queries(trained)
    for queries in asked(dataset, inputs, examples, some):
        resolved = [inputs.resolve(q, now=0) for q in queries]
        torch.testing.assert_close(
            model.encode_queries(features(*inputs.batch(resolved))), together, rtol=1e-5, atol=2e-6
        )
        for number in (0, 11, 200):
            single = model.encode_queries(features(*inputs.batch(resolved[number : number + 1])))
            torch.testing.assert_close(single[0], together[number], rtol=1e-5, atol=2e-6)
    assert together.std(0).min() > 0.01
