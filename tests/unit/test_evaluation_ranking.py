"""Exact ranking equals sorting every score, for any block size, mask and number of ties."""

import numpy as np
import pytest
import torch

from tests import oracles
from twotower.evaluation import ranking

NUM_QUERIES, NUM_ITEMS, DIM = 13, 47, 5


@pytest.fixture
def rng():
    return np.random.default_rng(21)


@pytest.fixture
def masked(rng):
    """Masked sets: none, nearly all, all, and in between."""
    sizes = [0, NUM_ITEMS - 2, NUM_ITEMS, *rng.integers(1, 30, NUM_QUERIES - 3)]
    return [set(rng.permutation(NUM_ITEMS)[:size].tolist()) for size in sizes]


def vectors(rng, num, spread):
    """Small integers: dot products are exact in float32, and a small spread makes many ties."""
    return rng.integers(-spread, spread + 1, (num, DIM)).astype(np.float32)


@pytest.mark.parametrize("spread", [1, 50])
@pytest.mark.parametrize("k", [1, 7, NUM_ITEMS, NUM_ITEMS + 9])
@pytest.mark.parametrize(("block_scores", "block_items"), [(1 << 24, 1 << 17), (40, 11), (1, 1), (500, 46)])
def test_rank_block_equals_sorting(rng, masked, spread, k, block_scores, block_items):
    queries, items = vectors(rng, NUM_QUERIES, spread), vectors(rng, NUM_ITEMS, spread)
    ranked = ranking.rank_block(
        queries, items, *oracles.csr(masked), k, block_scores=block_scores, block_items=block_items
    )
    assert ranked.shape == (NUM_QUERIES, k)
    assert ranked.dtype == np.int64
    np.testing.assert_array_equal(ranked, oracles.pad(oracles.top_k(queries, items, masked, k), k))


@pytest.mark.parametrize("spread", [1, 50])
@pytest.mark.parametrize(("num_items", "k"), [(1024, 2), (1061, 3), (2000, 1), (2001, 6)])
def test_the_best_of_groups_of_items_equal_sorting(rng, spread, num_items, k):
    queries, items = vectors(rng, NUM_QUERIES, spread), vectors(rng, num_items, spread)
    # The best items of some queries are in one group, and its neighbours tie with them.
    items[num_items - 40 : num_items - 30] = spread + 1
    items[64:128] = -spread - 1
    sizes = [0, num_items - 2, num_items, *rng.integers(1, num_items, NUM_QUERIES - 3)]
    masked = [set(rng.permutation(num_items)[:size].tolist()) for size in sizes]
    ranked = ranking.rank_block(queries, items, *oracles.csr(masked), k)
    np.testing.assert_array_equal(ranked, oracles.pad(oracles.top_k(queries, items, masked, k), k))


def test_fewer_where_fewer_are_allowed(rng, masked):
    ranked = ranking.rank_block(
        vectors(rng, NUM_QUERIES, 9), vectors(rng, NUM_ITEMS, 9), *oracles.csr(masked), NUM_ITEMS
    )
    assert [(row >= 0).sum() for row in ranked] == [NUM_ITEMS - len(m) for m in masked]
    assert (ranked[2] == -1).all()


def test_given_scores_and_one_order_rank_the_same(rng, masked):
    scores = rng.integers(0, 6, NUM_ITEMS).astype(np.float32)
    order = np.lexsort((np.arange(NUM_ITEMS), -scores))
    masks = oracles.csr(masked)
    by_order = ranking.rank_order(order, *masks, 9)
    by_scores = ranking.rank_scores(np.tile(scores, (NUM_QUERIES, 1)), *masks, 9)
    np.testing.assert_array_equal(by_order, by_scores)
    expected = oracles.top_k(np.ones((NUM_QUERIES, 1)), scores[:, None], masked, 9)
    np.testing.assert_array_equal(by_order, oracles.pad(expected, 9))


def test_tensors_and_memory_maps_are_taken(rng, masked, tmp_path):
    queries, items = vectors(rng, NUM_QUERIES, 20), vectors(rng, NUM_ITEMS, 20)
    np.save(tmp_path / "items.npy", items)
    mapped = np.load(tmp_path / "items.npy", mmap_mode="r")
    masks = oracles.csr(masked)
    expected = ranking.rank_block(queries, items, *masks, 6)
    np.testing.assert_array_equal(ranking.rank_block(torch.from_numpy(queries), mapped, *masks, 6), expected)
    assert (expected[0] >= 0).all()


def test_masked_rows_beyond_the_catalogue_and_repeats_change_nothing(rng, masked):
    queries, items = vectors(rng, NUM_QUERIES, 20), vectors(rng, NUM_ITEMS, 20)
    more = [[NUM_ITEMS + 3, *m, *m, NUM_ITEMS] for m in masked]
    np.testing.assert_array_equal(
        ranking.rank_block(queries, items, *oracles.csr(more), 6),
        ranking.rank_block(queries, items, *oracles.csr(masked), 6),
    )


def test_arguments_are_not_changed(rng, masked):
    scores = rng.random((NUM_QUERIES, NUM_ITEMS), dtype=np.float32)
    before = scores.copy()
    ranking.rank_scores(scores, *oracles.csr(masked), 6)
    np.testing.assert_array_equal(scores, before)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_not_finite_is_refused_even_where_masked(rng, value, side):
    arrays = [vectors(rng, NUM_QUERIES, 9), vectors(rng, NUM_ITEMS, 9)]
    arrays[side][4, 2] = value
    everything = oracles.csr([set(range(NUM_ITEMS))] * NUM_QUERIES)
    with pytest.raises(ValueError, match="not finite"):
        ranking.rank_block(*arrays, *everything, 3)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        ranking.rank_scores(np.array([[1.0, np.nan]], dtype=np.float32), *oracles.csr([set()]), 1)


def test_large_finite_scores_are_ranked():
    scores = np.array([[3e38, 2e38, 3.1e38]], dtype=np.float32)
    assert ranking.rank_scores(scores, *oracles.csr([set()]), 3).tolist() == [[2, 0, 1]]


def test_products_that_overflow_are_refused_and_those_that_do_not_are_ranked():
    items = np.array([[1e19, 0], [2e19, 0]], dtype=np.float32)
    large, larger = np.array([[1e19, 0]], np.float32), np.array([[3e19, 0]], np.float32)
    assert ranking.rank_block(large, items, *oracles.csr([set()]), 2).tolist() == [[1, 0]]
    with pytest.raises(ValueError, match="not finite"):
        ranking.rank_block(larger, items, *oracles.csr([set()]), 2)


def test_shapes_that_do_not_fit_are_refused(rng):
    queries, items = vectors(rng, 3, 9), vectors(rng, NUM_ITEMS, 9)
    none = oracles.csr([set()] * 3)
    with pytest.raises(ValueError, match="same D"):
        ranking.rank_block(queries, items[:, :4], *none, 3)
    with pytest.raises(ValueError, match="masked_offsets"):
        ranking.rank_block(queries, items, np.array([0, 0]), none[1], 3)
    with pytest.raises(ValueError, match="0 or greater"):
        ranking.rank_block(queries, items, np.array([0, 1, 1, 1]), np.array([-1]), 3)
    with pytest.raises(ValueError, match="k is 0"):
        ranking.rank_block(queries, items, *none, 0)


def test_no_query_and_no_item():
    empty = np.empty((0, DIM), dtype=np.float32)
    assert ranking.rank_block(empty, np.ones((4, DIM), dtype=np.float32), *oracles.csr([]), 3).shape == (0, 3)
    ranked = ranking.rank_block(np.ones((2, DIM), dtype=np.float32), empty, *oracles.csr([set()] * 2), 3)
    assert ranked.tolist() == [[-1] * 3] * 2
