"""What lists look like together equals slow loops, and merges over parts."""

import math

import numpy as np
import pytest
from scipy import sparse

from tests import oracles
from twotower.evaluation import lists as lists_module
from twotower.evaluation.lists import ItemFacts, ListStats, Overlap, gini

NUM_QUERIES, NUM_ITEMS, WIDTH, NUM_VALUES = 37, 61, 23, 7
KS = (1, 5, 20)


@pytest.fixture
def rng():
    return np.random.default_rng(20)


@pytest.fixture
def lists(rng):
    """Rankings of different lengths."""
    return [rng.permutation(NUM_ITEMS)[: rng.integers(3, WIDTH + 1)].tolist() for _ in range(NUM_QUERIES)]


@pytest.fixture
def facts(rng):
    """Some items that nobody has, and some without an attribute."""
    counts = rng.integers(0, 9, NUM_ITEMS)
    attributes = (rng.random((NUM_ITEMS, NUM_VALUES)) < 0.3).astype(float)
    lengths = np.linalg.norm(attributes, axis=1)
    assert (lengths == 0).any()
    assert (counts == 0).any()
    unit = attributes / np.maximum(lengths, 1.0)[:, None]
    return ItemFacts(counts, 40, sparse.csr_matrix(unit))


def test_coverage_and_same_lists_equal_the_slow_loop(lists):
    lists = lists + [lists[0]] * 4 + [lists[0][::-1]]
    ranked = oracles.pad(lists, WIDTH)
    for k in KS:
        assert lists_module.catalogue_coverage(ranked, 200, k) == oracles.coverage_at_k(lists, 200, k)
    assert lists_module.share_same_top10(ranked) == oracles.share_same_top10(lists) == 5 / len(lists)


def test_list_statistics_merge(lists):
    ranked = oracles.pad([*lists, lists[3]], WIDTH)
    whole = lists_module.ListStats(NUM_ITEMS, KS)
    whole.add(ranked)
    merged = lists_module.ListStats(NUM_ITEMS, KS)
    for rows in (ranked[:9], ranked[9:9], ranked[9:]):
        part = lists_module.ListStats(NUM_ITEMS, KS)
        part.add(rows)
        merged.merge(part.state())
    assert merged.result() == whole.result()
    assert whole.result()["same_top10"] == 2 / len(ranked)


def test_gini_equals_the_mean_difference(rng):
    counts = rng.integers(0, 30, 25)
    assert gini(counts) == pytest.approx(oracles.gini(counts.tolist()))
    assert gini(np.full(8, 3)) == pytest.approx(0.0)
    assert gini(np.array([0, 0, 0, 5])) == pytest.approx(0.75)
    assert math.isnan(gini(np.zeros(4)))


def test_facts_of_lists_equal_slow_loops(lists, facts):
    ranked = oracles.pad([*lists, [], [4]], WIDTH)
    stats = ListStats(NUM_ITEMS, KS, facts)
    stats.add(ranked)
    found = stats.result()
    for k in KS:
        tops = [row[:k] for row in [*lists, [4]]]
        popular = [np.mean([facts.counts[item] for item in top]) for top in tops]
        bits = [np.mean([-math.log2(max(facts.counts[item], 1) / 40) for item in top]) for top in tops]
        assert found[f"mean_popularity@{k}"] == pytest.approx(np.mean(popular))
        assert found[f"novelty@{k}"] == pytest.approx(np.mean(bits))
        vectors = facts.attributes.toarray()
        distances = [
            np.mean([1 - vectors[a] @ vectors[b] for a in top for b in top if a != b])
            for top in tops
            if len(top) > 1
        ]
        if k == 1:
            assert math.isnan(found["diversity@1"])
        else:
            assert found[f"diversity@{k}"] == pytest.approx(np.mean(distances))
        shown = np.bincount(np.concatenate(tops), minlength=NUM_ITEMS)
        assert found[f"gini@{k}"] == pytest.approx(oracles.gini(shown.tolist()))


def test_facts_merge(lists, facts):
    ranked = oracles.pad(lists, WIDTH)
    whole, merged = ListStats(NUM_ITEMS, KS, facts), ListStats(NUM_ITEMS, KS, facts)
    whole.add(ranked)
    for rows in (ranked[:9], ranked[9:9], ranked[9:]):
        part = ListStats(NUM_ITEMS, KS, facts)
        part.add(rows)
        merged.merge(part.state())
    assert merged.result() == pytest.approx(whole.result(), nan_ok=True)


def test_without_attributes_there_is_no_diversity(lists, facts):
    stats = ListStats(NUM_ITEMS, KS, ItemFacts(facts.counts, 40))
    stats.add(oracles.pad(lists, WIDTH))
    names = {name.partition("@")[0] for name in stats.result()}
    assert names == {"coverage", "gini", "mean_popularity", "novelty", "same_top10"}


def test_state_of_another_catalogue_is_refused(lists):
    other = ListStats(NUM_ITEMS + 5, KS)
    other.add(np.array([[NUM_ITEMS + 4]]))
    with pytest.raises(ValueError, match="61 items"):
        ListStats(NUM_ITEMS, KS).merge(other.state())
    with pytest.raises(ValueError, match="61 items"):
        ListStats(NUM_ITEMS, KS).merge(ListStats(NUM_ITEMS, [5]).state())


def test_overlap_equals_all_pairs(lists):
    lists = [
        row + [item for item in range(NUM_ITEMS) if item not in row][: max(0, 10 - len(row))] for row in lists
    ]
    tops = [set(row[:10]) for row in lists]
    pairs = [len(a & b) / 10 for i, a in enumerate(tops) for j, b in enumerate(tops) if i != j]
    merged = Overlap(NUM_ITEMS)
    for part in (lists[:11], lists[11:]):
        some = Overlap(NUM_ITEMS)
        some.add(oracles.pad(part, WIDTH))
        merged.merge(some.state())
    assert merged.result() == pytest.approx(np.mean(pairs))


def test_overlap_of_equal_lists_and_of_few():
    same = Overlap(NUM_ITEMS)
    same.add(np.tile(np.arange(12), (5, 1)))
    assert same.result() == 1.0
    short = Overlap(4)
    short.add(np.tile(np.array([0, 1, 2, 3, -1, -1]), (5, 1)))
    assert short.result() == 1.0
    alone = Overlap(NUM_ITEMS)
    alone.add(np.arange(12)[None])
    assert math.isnan(alone.result())
