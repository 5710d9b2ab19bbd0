from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from twotower.config import parse_config
from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.data.sampling import popularity
from twotower.schema import SPLITS


@pytest.fixture(scope="module")
def dataset(mirror: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    values = {
        "storage": {"root": str(tmp_path_factory.mktemp("real"))},
        "data": {"source": {"kind": "movielens"}, "mirror": str(mirror)},
        # The published figures are of a split that parts equal times.
        "split": {"ties": "order"},
    }
    return prepare(parse_config(values))


def test_ml_latest_small_is_whole(dataset: Dataset) -> None:
    counts = dataset.counts
    assert (counts["users"], counts["catalogue_items"], counts["interactions"]) == (610, 9_742, 100_836)
    assert counts["outside_items"] == counts["bad_rows"] == counts["repeats"] == 0
    assert dataset.as_of == 1_537_799_250_000_000
    assert dataset.interactions.time.min() == 828_124_615_000_000
    assert len(np.unique(dataset.interactions.item_row)) == 9_724
    sizes = np.diff(dataset.interactions.user_offsets)
    test = np.bincount(dataset.interactions.user_row[dataset.interactions.split == SPLITS["test"]])
    assert np.array_equal(test, -(-sizes // 5))
    rows = dataset.item_table(["title", "genres", "year"]).slice(0, 1).to_pylist()
    assert rows == [
        {"title": "Toy Story (1995)", "genres": "Adventure|Animation|Children|Comedy|Fantasy", "year": 1995}
    ]


def test_popularity_reaches_the_published_figures(dataset: Dataset) -> None:
    """Recall@10 .0389, Recall@100 .2014 and NDCG@10 .0885 with train and validation as history."""
    data = dataset.interactions
    held_out = data.split == SPLITS["test"]
    train, test = data.select(~held_out), data.select(held_out)
    scores = np.tile(popularity(train, dataset.num_items).astype(np.float64), (dataset.num_users, 1))
    scores[train.user_row, train.item_row] = -1
    ranked = np.argsort(-scores, axis=1, kind="stable")[:, :100]
    relevant = np.zeros(scores.shape, dtype=bool)
    relevant[test.user_row, test.item_row] = True
    hits = np.take_along_axis(relevant, ranked, axis=1)
    sizes = relevant.sum(axis=1)
    discount = 1 / np.log2(np.arange(10) + 2)
    ideal = np.cumsum(discount)[np.minimum(sizes, 10) - 1]
    assert (hits[:, :10].sum(axis=1) / sizes).mean() == pytest.approx(0.0389, abs=5e-4)
    assert (hits.sum(axis=1) / sizes).mean() == pytest.approx(0.2014, abs=5e-4)
    assert ((hits[:, :10] * discount).sum(axis=1) / ideal).mean() == pytest.approx(0.0885, abs=5e-4)
