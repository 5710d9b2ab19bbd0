"""The metrics equal slow loops, merge over parts, and refuse what is no ranking."""

import math

import numpy as np
import pytest

from tests import oracles
from twotower.evaluation import metrics

NUM_QUERIES, NUM_ITEMS, WIDTH = 37, 61, 23
KS = (1, 5, 20)
METRICS = {
    "recall": "recall_at_k",
    "ndcg": "ndcg_at_k",
    "mrr": "mrr_at_k",
    "hit_rate": "hit_rate_at_k",
    "map": "average_precision_at_k",
    "precision": "precision_at_k",
}


@pytest.fixture
def rng():
    return np.random.default_rng(20)


@pytest.fixture
def lists(rng):
    """Rankings of different lengths."""
    return [rng.permutation(NUM_ITEMS)[: rng.integers(3, WIDTH + 1)].tolist() for _ in range(NUM_QUERIES)]


@pytest.fixture
def relevant(rng):
    """Relevant sets of 0 to 30 items; some queries have none, some more than any cut-off but the last."""
    sizes = rng.integers(0, 31, NUM_QUERIES)
    sizes[:2] = 0, 30
    return [set(rng.permutation(NUM_ITEMS)[:size].tolist()) for size in sizes]


@pytest.mark.parametrize("name", METRICS.values())
@pytest.mark.parametrize("k", [*KS, 50])
def test_metric_equals_the_slow_loop(lists, relevant, name, k):
    values = getattr(metrics, name)(oracles.pad(lists, WIDTH), *oracles.csr(relevant), k)
    expected = [
        getattr(oracles, name)(r, s, k) if s else math.nan for r, s in zip(lists, relevant, strict=True)
    ]
    assert values.shape == (NUM_QUERIES,)
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    assert 0 < np.nanmean(values) < 1 or name == "hit_rate_at_k"


def test_metrics_of_lists_of_no_length_are_zero():
    values = metrics.per_query(np.zeros((2, 0), dtype=bool), np.array([3, 0]), [1, 5])
    assert values.shape == (2, 6, 2)
    assert (values[0] == 0).all()
    assert np.isnan(values[1]).all()


def test_metrics_at_cut_offs_equal_those_of_one_cut_off(lists, relevant):
    ranked, sets = oracles.pad(lists, WIDTH), oracles.csr(relevant)
    values = metrics.per_query(*metrics.hit_matrix(ranked, *sets), KS)
    for row, name in enumerate(METRICS.values()):
        for column, k in enumerate(KS):
            np.testing.assert_array_equal(values[:, row, column], getattr(metrics, name)(ranked, *sets, k))
    assert metrics.metric_names(KS)[:4] == ["recall@1", "recall@5", "recall@20", "ndcg@1"]
    assert len(metrics.metric_names(KS)) == values[0].size


def test_known_values():
    # Ranks 2 and 4 hit, three relevant items.
    ranked, relevant = np.array([[7, 3, 9, 1, 5]]), oracles.csr([{3, 1, 8}])
    assert metrics.recall_at_k(ranked, *relevant, 5)[0] == pytest.approx(2 / 3)
    assert metrics.mrr_at_k(ranked, *relevant, 5)[0] == 0.5
    assert metrics.hit_rate_at_k(ranked, *relevant, 1)[0] == 0.0
    # (1/log2(3) + 1/log2(5)) / (1 + 1/log2(3) + 1/2) = (.63093 + .43068) / 2.13093
    assert metrics.ndcg_at_k(ranked, *relevant, 5)[0] == pytest.approx(0.498190, abs=1e-6)
    # (1/2 + 2/4) / 3
    assert metrics.average_precision_at_k(ranked, *relevant, 5)[0] == pytest.approx(1 / 3)
    assert metrics.precision_at_k(ranked, *relevant, 4)[0] == 0.5
    # A list that is shorter than k misses the rest.
    assert metrics.precision_at_k(ranked, *relevant, 10)[0] == 0.2


def test_sums_equal_the_means_over_queries_with_relevant_items(lists, relevant):
    sums = metrics.MetricSums(KS)
    sums.add(oracles.pad(lists, WIDTH), *oracles.csr(relevant))
    pairs = [(r, s) for r, s in zip(lists, relevant, strict=True) if s]
    assert 0 < len(pairs) < NUM_QUERIES
    assert sums.num_queries == len(pairs)
    expected = {
        f"{name}@{k}": np.mean([getattr(oracles, function)(r, s, k) for r, s in pairs])
        for name, function in METRICS.items()
        for k in KS
    }
    assert sums.result() == pytest.approx(expected)


def test_parts_merge_to_the_whole(lists, relevant):
    whole, merged = metrics.MetricSums(KS), metrics.MetricSums(KS)
    ranked = oracles.pad(lists, WIDTH)
    whole.add(ranked, *oracles.csr(relevant))
    states = []
    for start, stop in ((0, 5), (5, 5), (5, 30), (30, NUM_QUERIES)):
        part = metrics.MetricSums(KS)
        part.add(ranked[start:stop], *oracles.csr(relevant[start:stop]))
        states.append(part.state())
    merged.merge(np.sum(states, axis=0))
    assert merged.num_queries == whole.num_queries
    assert merged.result() == pytest.approx(whole.result(), rel=1e-12)


def test_no_query_gives_nan_and_not_zero():
    assert all(math.isnan(v) for v in metrics.MetricSums(KS).result().values())


def test_padding_is_no_item():
    # The row before padding, -1, must not match anything, nor must it wrap round to another query's item.
    ranked = np.array([[-1, -1], [0, -1]])
    assert metrics.hit_rate_at_k(ranked, *oracles.csr([{0, 60}, {1}]), 2).tolist() == [0.0, 0.0]


def test_repeats_of_relevant_items_change_nothing():
    ranked = np.array([[4, 2, 0]])
    assert metrics.recall_at_k(ranked, *oracles.csr([[2, 2, 5, 5]]), 3)[0] == 0.5


@pytest.mark.parametrize(
    ("ranked", "offsets", "rows", "message"),
    [
        ([[1, 1, -1]], [0, 1], [1], "names an item twice"),
        ([[1, 2, -1]], [0, 2], [1], "must rise"),
        ([[1, 2, -1]], [0, 1, 1], [1], r"\[Q \+ 1\]"),
        ([[1, 2, -1]], [0, 1], [-1], "0 or greater"),
    ],
)
def test_what_is_no_ranking_is_refused(ranked, offsets, rows, message):
    with pytest.raises(ValueError, match=message):
        metrics.recall_at_k(np.array(ranked), np.array(offsets), np.array(rows), 2)


def test_lists_shorter_than_the_cut_off_are_refused():
    with pytest.raises(ValueError, match="cut-off 20"):
        metrics.MetricSums(KS).add(np.zeros((1, 5), dtype=np.int64), *oracles.csr([{0}]))


@pytest.mark.parametrize("ks", [[], [0, 5]])
def test_cut_offs_below_one_are_refused(ks):
    with pytest.raises(ValueError, match="at least 1"):
        metrics.MetricSums(ks)


def test_state_of_other_cut_offs_is_refused():
    with pytest.raises(ValueError, match="cut-offs"):
        metrics.MetricSums([10]).merge(metrics.MetricSums(KS).state())
