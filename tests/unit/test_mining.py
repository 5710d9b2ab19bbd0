"""Mined hard negatives against a plain search, and by what must never be among them."""

import copy

import numpy as np
import pytest

from twotower.config import Config, parse_config
from twotower.config.training import MinedConfig
from twotower.data.dataset import Dataset
from twotower.training.batches import MemorySource
from twotower.training.collectives import World
from twotower.training.loop import Trainer
from twotower.training.mining import mine
from twotower.training.validation import encode_catalogue


@pytest.fixture(scope="module")
def trainer(small_config: Config, small_dataset: Dataset) -> Trainer:
    """Trained for an epoch, so that scores differ."""
    values = copy.deepcopy(small_config.to_json())
    trainer = Trainer(parse_config(values), small_dataset, World(), "train")
    trainer.run_epoch()
    trainer.model.eval()
    return trainer


def facts(trainer: Trainer) -> tuple[np.ndarray, np.ndarray, list[set[int]]]:
    """Return scores [n, N] of every example, its positives [n], and what its user has had."""
    source = trainer.source
    assert isinstance(source, MemorySource)
    everyone = np.arange(len(source.examples))
    queries = trainer.model.encode_queries(source.examples.queries(everyone)).numpy()
    vectors = encode_catalogue(trainer.model, trainer.inputs, World())
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    offsets, rows = source.examples.known_positives(everyone)
    known = [set(rows[offsets[i] : offsets[i + 1]].tolist()) for i in everyone]
    return queries @ vectors.T, source.examples.item_rows(everyone), known


def test_mined_items_are_of_the_window_and_unknown(trainer: Trainer) -> None:
    config = MinedConfig(per_query=4, skip=5, window=12, margin=0.1)
    source = trainer.source
    assert isinstance(source, MemorySource)
    mined = mine(trainer.model, source.examples, World(), config, seed=1, step=9)
    scores, positives, known = facts(trainer)
    assert mined.shape == (len(positives), 4)
    assert mined.dtype == np.int32
    near = 0
    for i in range(0, len(positives), 7):
        found = mined[i][mined[i] >= 0]
        assert len(set(found.tolist())) == len(found)
        assert not known[i] & set(found.tolist()), "a known positive was mined"
        # Known positives take no rank: searching a few too many and dropping them is not enough.
        order = [item for item in np.argsort(-scores[i], kind="stable") if item not in known[i]]
        window = order[5:17]
        limit = scores[i][positives[i]] - 0.1 * abs(scores[i][positives[i]])
        allowed = {item for item in window if scores[i][item] <= limit + 1e-6}
        assert set(found.tolist()) <= allowed
        sure = {item for item in window if scores[i][item] <= limit - 1e-6}
        assert len(found) >= min(4, len(sure))
        near += len(window) - len(allowed)
    assert near > 50, "the margin left nothing out, so it was not tested"
    assert (mined >= 0).mean() > 0.2


def test_the_heaviest_user_gets_negatives_too(trainer: Trainer) -> None:
    """Over-fetching by one would return nothing to a user whose every good item is known."""
    source = trainer.source
    assert isinstance(source, MemorySource)
    everyone = np.arange(len(source.examples))
    heaviest = int(np.argmax(source.examples.user_counts(everyone)))
    config = MinedConfig(per_query=3, skip=0, window=10, margin=0.0)
    mined = mine(trainer.model, source.examples, World(), config, seed=1, step=9)
    scores, positives, known = facts(trainer)
    best = np.argsort(-scores[heaviest])[:13]
    assert len(known[heaviest] & set(best.tolist())) > 3
    unknown = [i for i in np.argsort(-scores[heaviest]) if i not in known[heaviest]][:10]
    allowed = [i for i in unknown if scores[heaviest][i] <= scores[heaviest][positives[heaviest]]]
    assert (mined[heaviest] >= 0).sum() == min(3, len(allowed))


def test_another_step_draws_others_of_the_window(trainer: Trainer) -> None:
    config = MinedConfig(per_query=2, skip=2, window=30)
    source = trainer.source
    assert isinstance(source, MemorySource)
    one, again, other = (
        mine(trainer.model, source.examples, World(), config, seed=1, step=s) for s in (9, 9, 10)
    )
    assert np.array_equal(one, again)
    assert (one != other)[one >= 0].mean() > 0.5
