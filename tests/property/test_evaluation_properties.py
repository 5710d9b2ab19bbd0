"""What holds for every ranking and every relevant set."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import oracles
from twotower.evaluation import metrics, ranking

NUM_ITEMS = 19
METRICS = (
    "recall_at_k",
    "ndcg_at_k",
    "mrr_at_k",
    "hit_rate_at_k",
    "average_precision_at_k",
    "precision_at_k",
)


@st.composite
def cases(draw):
    """Some lists, each with a relevant set that is not empty."""
    num_queries = draw(st.integers(1, 6))
    items = st.integers(0, NUM_ITEMS - 1)
    lists = [draw(st.lists(items, max_size=12, unique=True)) for _ in range(num_queries)]
    relevant = [draw(st.lists(items, min_size=1, max_size=12, unique=True)) for _ in range(num_queries)]
    return oracles.pad(lists, 12), relevant


def values(name, ranked, relevant, k):
    return getattr(metrics, name)(ranked, *oracles.csr(relevant), k)


@given(case=cases(), k=st.integers(1, 15), name=st.sampled_from(METRICS))
def test_between_0_and_1(case, k, name):
    found = values(name, *case, k)
    assert ((found >= 0) & (found <= 1)).all()


@given(case=cases(), k=st.integers(1, 14), name=st.sampled_from(["recall_at_k", "mrr_at_k", "hit_rate_at_k"]))
def test_never_falls_with_k(case, k, name):
    assert (values(name, *case, k) <= values(name, *case, k + 1)).all()


@given(case=cases(), k=st.integers(1, 15), name=st.sampled_from(METRICS), seed=st.integers(0, 99))
def test_order_of_relevant_items_changes_nothing(case, k, name, seed):
    ranked, relevant = case
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(r).tolist() for r in relevant]
    np.testing.assert_array_equal(values(name, ranked, relevant, k), values(name, ranked, shuffled, k))


@given(case=cases(), k=st.integers(1, 15), name=st.sampled_from(METRICS))
def test_only_the_first_k_count(case, k, name):
    ranked, relevant = case
    np.testing.assert_array_equal(values(name, ranked, relevant, k), values(name, ranked[:, :k], relevant, k))


@given(case=cases(), k=st.integers(1, 15))
def test_perfect_ranking_scores_1(case, k):
    relevant = case[1]
    ranked = oracles.pad(relevant, 12)
    for name in ("ndcg_at_k", "mrr_at_k", "hit_rate_at_k"):
        assert values(name, ranked, relevant, k).tolist() == [1.0] * len(relevant)
    assert values("recall_at_k", ranked, relevant, 12).tolist() == [1.0] * len(relevant)


@given(case=cases(), k=st.integers(1, 15))
def test_nothing_relevant_found_scores_0(case, k):
    ranked, relevant = case
    ranked = np.where(ranked >= 0, ranked + NUM_ITEMS, -1)
    for name in METRICS:
        assert values(name, ranked, relevant, k).tolist() == [0.0] * len(relevant)


@given(case=cases(), k=st.integers(1, 15), place=st.integers(1, 11))
def test_moving_a_hit_up_never_lowers_a_metric(case, k, place):
    ranked, relevant = case
    better = ranked.copy()
    for row, items in enumerate(relevant):
        upper, lower = better[row, place - 1], better[row, place]
        if lower in items and upper not in items and upper >= 0:
            better[row, place - 1], better[row, place] = lower, upper
    for name in METRICS:
        assert (values(name, better, relevant, k) >= values(name, ranked, relevant, k)).all()


@given(case=cases(), cut=st.integers(0, 6), ks=st.sets(st.integers(1, 12), min_size=1))
def test_sums_do_not_depend_on_the_parts(case, cut, ks):
    ranked, relevant = case
    whole, parts = metrics.MetricSums(sorted(ks)), metrics.MetricSums(sorted(ks))
    whole.add(ranked, *oracles.csr(relevant))
    for rows in (slice(0, cut), slice(cut, None)):
        part = metrics.MetricSums(sorted(ks))
        part.add(ranked[rows], *oracles.csr(relevant[rows]))
        parts.merge(part.state())
    assert parts.num_queries == whole.num_queries == len(relevant)
    assert parts.result() == pytest.approx(whole.result(), rel=1e-12)


@settings(max_examples=60)
@given(data=st.data(), k=st.integers(1, 12), block_scores=st.integers(1, 90), block_items=st.integers(1, 15))
def test_ranking_does_not_depend_on_the_blocks(data, k, block_scores, block_items):
    seed = data.draw(st.integers(0, 999))
    rng = np.random.default_rng(seed)
    queries = rng.integers(-2, 3, (4, 3)).astype(np.float32)
    items = rng.integers(-2, 3, (11, 3)).astype(np.float32)
    masked = [set(rng.permutation(11)[: rng.integers(0, 12)].tolist()) for _ in range(4)]
    ranked = ranking.rank_block(
        queries, items, *oracles.csr(masked), k, block_scores=block_scores, block_items=block_items
    )
    np.testing.assert_array_equal(ranked, oracles.pad(oracles.top_k(queries, items, masked, k), k))
