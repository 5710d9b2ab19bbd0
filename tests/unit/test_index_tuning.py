"""From a recall target to an effort: ladders, the least that reaches it, the curve around it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from twotower.index.build import build_shard
from twotower.index.hits import Hits
from twotower.index.recall import index_recall_at_k, index_recalls
from twotower.index.search import Searcher, Shard, exact_top_k
from twotower.index.spec import Effort, efforts, empty_index
from twotower.index.tuning import curve, least_effort

DIM, COUNT, K = 20, 1_500, 10


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return unit_vectors(np.random.default_rng(4), COUNT)


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return unit_vectors(np.random.default_rng(5), 400)


@pytest.fixture(scope="module")
def exact(vectors: np.ndarray, queries: np.ndarray) -> list[Hits]:
    return exact_top_k(queries, 2 * K, [(np.arange(COUNT), vectors)])


def unit_vectors(rng: np.random.Generator, count: int) -> np.ndarray:
    found = rng.normal(size=(count, DIM)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def searcher_of(vectors: np.ndarray, factory: str) -> Searcher:
    rows = np.arange(len(vectors))
    return Searcher([Shard(build_shard(vectors, factory, item_rows=rows), rows)])


@pytest.mark.parametrize(
    ("factory", "part", "first", "last"),
    [
        ("IVF300,Flat", "nprobe", 1, 300),
        ("PCA8,IVF300,Flat", "nprobe", 1, 300),
        ("HNSW8", "ef_search", 16, 2_048),
        ("PQ4x4fs,RFlat", "k_factor", 1, 128),
    ],
)
def test_efforts_are_about_a_twentieth_apart_and_go_all_the_way(
    factory: str, part: str, first: int, last: int
) -> None:
    steps = [getattr(effort, part) for effort in efforts(empty_index(factory, DIM))]
    assert (steps[0], steps[-1]) == (first, last)
    pairs = list(itertools.pairwise(steps))
    assert all(a < b for a, b in pairs)
    assert all(b <= max(1.05 * a, a + 1) for a, b in pairs)
    assert efforts(empty_index("Flat", DIM)) == [Effort()]


def test_a_refined_search_looks_in_more_lists_and_at_more_candidates() -> None:
    steps = efforts(empty_index("IVF300,PQ4x4fs,RFlat", DIM))
    assert (steps[0].nprobe, steps[0].k_factor) == (1, 1.0)
    assert (steps[-1].nprobe, steps[-1].k_factor) == (300, 128.0)
    for low, high in itertools.pairwise(steps):
        assert low.nprobe <= high.nprobe
        assert low.k_factor <= high.k_factor
        assert low != high


@pytest.mark.parametrize("target", [0.6, 0.8, 0.9, 0.97])
@pytest.mark.parametrize("factory", ["IVF64,Flat", "HNSW8"])
def test_the_step_below_the_chosen_one_falls_short(
    factory: str, target: float, vectors: np.ndarray, queries: np.ndarray, exact: list[Hits]
) -> None:
    searcher = searcher_of(vectors, factory)
    chosen = least_effort(searcher, queries, exact, K, target)
    steps = searcher.efforts()
    place = steps.index(chosen)

    def recalls(effort: Effort) -> np.ndarray:
        return index_recalls(searcher.search(queries, K, effort=effort, complete=False), exact, K)

    mine = recalls(chosen)
    assert mine.mean() >= target + mine.std() / np.sqrt(len(mine))
    if place:
        below = recalls(steps[place - 1])
        assert below.mean() < target + below.std() / np.sqrt(len(below))
    if factory != "HNSW8":
        assert 0 < place < len(steps) - 1


def test_queries_that_did_not_tune_reach_the_target_too(
    vectors: np.ndarray, queries: np.ndarray, exact: list[Hits]
) -> None:
    searcher = searcher_of(vectors, "IVF64,Flat")
    rng = np.random.default_rng(9)
    passed = []
    for target in (0.8, 0.85, 0.9, 0.95) * 6:
        order = rng.permutation(len(queries))
        tuning, reporting = order[:200], order[200:]
        chosen = least_effort(searcher, queries[tuning], [exact[q] for q in tuning], K, target)
        found = searcher.search(queries[reporting], K, effort=chosen)
        passed.append(index_recall_at_k(found, [exact[q] for q in reporting], K) >= target)
    assert np.mean(passed) > 0.85


def test_an_index_that_finds_too_little_gets_the_effort_that_finds_the_most(
    vectors: np.ndarray, queries: np.ndarray, exact: list[Hits]
) -> None:
    searcher = searcher_of(vectors, "IVF32,PQ4x4")
    chosen = least_effort(searcher, queries, exact, K, 0.95)

    def recall(effort: Effort) -> float:
        return index_recall_at_k(searcher.search(queries, K, effort=effort), exact, K)

    assert recall(chosen) == recall(searcher.efforts()[-1]) < 0.9
    # A kind that just reaches its target at the greatest effort is held to that, without a margin.
    ceiling = recall(searcher.efforts()[-1])
    assert recall(least_effort(searcher, queries, exact, K, ceiling)) >= ceiling - 1e-6
    assert least_effort(searcher_of(vectors, "Flat"), queries, exact, K, 1.0) == Effort()
    assert least_effort(searcher_of(vectors, "IVF64,Flat"), queries, exact, K, 1.0).nprobe <= 64


def test_lists_and_candidates_are_traded_where_results_are_refined(
    vectors: np.ndarray, queries: np.ndarray, exact: list[Hits]
) -> None:
    searcher = searcher_of(vectors, "IVF16,PQ10x4,RFlat")

    def recall(effort: Effort) -> float:
        return index_recall_at_k(searcher.search(queries, K, effort=effort, complete=False), exact, K)

    chosen = least_effort(searcher, queries, exact, K, 0.9)
    assert recall(chosen) >= 0.9
    # Neither part alone reaches it: four candidates for each result are too few here, and so are few lists.
    assert recall(Effort(nprobe=16, k_factor=1)) < 0.9
    assert recall(replace(chosen, nprobe=1)) < 0.9
    assert chosen.k_factor > 1
    assert chosen.nprobe > 1


@pytest.mark.parametrize(
    ("factory", "fewest"), [("IVF64,Flat", 7), ("IVF5,Flat", 5), ("Flat", 1), ("IVF16,PQ10x4,RFlat", 5)]
)
def test_the_curve_goes_around_the_chosen_effort(
    factory: str, fewest: int, vectors: np.ndarray, queries: np.ndarray, exact: list[Hits]
) -> None:
    searcher = searcher_of(vectors, factory)
    for target in (0.1, 0.9, 1.0):
        chosen = least_effort(searcher, queries[:200], exact[:200], K, target)
        points = curve(searcher, queries[200:], exact[200:], K, chosen)
        assert fewest <= len(points) <= 8
        assert [p.effort for p in points].count(chosen) == 1
        recalls = [p.index_recall for p in points]
        assert recalls == sorted(recalls)
        assert all(p.search_ms > 0 for p in points)
        (mine,) = [p for p in points if p.effort == chosen]
        found = searcher.search(queries[200:], K, effort=chosen)
        assert mine.index_recall == index_recall_at_k(found, exact[200:], K)
        assert Effort(**mine.to_json()["effort"]) == chosen
