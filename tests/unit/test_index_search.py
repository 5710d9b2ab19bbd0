"""The searcher: merging, exclusion, exactness where an approximate index finds too little, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import faiss
import numpy as np
import pytest

from twotower.errors import ArtefactError, ConfigError, RequestError
from twotower.index.allowed import Allowed
from twotower.index.build import build_shard, train_index
from twotower.index.recall import index_recall_at_k
from twotower.index.search import Hits, Searcher, Shard, exact_top_k
from twotower.index.spec import Effort
from twotower.index.tuning import least_effort

DIM = 20


def unit_vectors(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.normal(size=(count, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def searcher_of(
    vectors: np.ndarray, shards: np.ndarray, num_shards: int, factory: str, **effort: int
) -> Searcher:
    parts = []
    for s in range(num_shards):
        rows = np.flatnonzero(shards == s)
        parts.append(Shard(build_shard(vectors[rows], factory, item_rows=rows), rows))
    return Searcher(parts, Effort(**effort))


def brute_force(vectors: np.ndarray, query: np.ndarray, k: int, excluded: list[int]) -> list[int]:
    scores = vectors @ query
    ranked = sorted(range(len(vectors)), key=lambda row: (-scores[row], row))
    return [row for row in ranked if row not in set(excluded)][:k]


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 40])
def test_sharded_flat_equals_brute_force(num_shards: int, rng: np.random.Generator) -> None:
    vectors = unit_vectors(rng, 61)
    shards = rng.integers(0, num_shards, len(vectors))
    searcher = searcher_of(vectors, shards, num_shards, "Flat")
    assert searcher.num_items == 61
    queries = unit_vectors(rng, 11)
    for k in (1, 5, 60, 61, 200):
        for q, hits in enumerate(searcher.search(queries, k)):
            assert hits.item_rows.tolist() == brute_force(vectors, queries[q], k, [])
            assert hits.item_rows.dtype == np.int64
            assert hits.scores.dtype == np.float32
            np.testing.assert_allclose(hits.scores, vectors[hits.item_rows] @ queries[q], atol=1e-6)


@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "IVF8,Flat"])
def test_excluded_items_are_left_out_and_replaced(factory: str, rng: np.random.Generator) -> None:
    vectors = unit_vectors(rng, 150)
    searcher = searcher_of(vectors, np.arange(150) % 3, 3, factory, nprobe=8, ef_search=400)
    queries = unit_vectors(rng, 4)
    best = brute_force(vectors, queries[0], 150, [])
    # The best ones twice, none, all but three, and rows that are nowhere.
    exclude = [best[:90] + best[:5], [], best[3:], [150, 10_000, -1]]
    found = searcher.search(queries, 10, exclude)
    for q, hits in enumerate(found):
        assert hits.item_rows.tolist() == brute_force(vectors, queries[q], 10, exclude[q])
    assert [len(h.item_rows) for h in found] == [10, 10, 3, 10]


def test_everything_excluded_leaves_nothing(rng: np.random.Generator) -> None:
    vectors = unit_vectors(rng, 12)
    searcher = searcher_of(vectors, np.arange(12) % 2, 2, "Flat")
    (hits,) = searcher.search(unit_vectors(rng, 1), 4, [np.arange(12)])
    assert hits.item_rows.shape == (0,)


@pytest.mark.parametrize("factory", ["IVF32,Flat", "HNSW4", "IVF32,SQ8"])
def test_k_items_come_though_the_index_returns_fewer(factory: str, rng: np.random.Generator) -> None:
    vectors = unit_vectors(rng, 400)
    searcher = searcher_of(vectors, np.arange(400) % 2, 2, factory, nprobe=1, ef_search=16)
    queries = unit_vectors(rng, 6)
    exclude = [rng.choice(400, 30 * q, replace=False) for q in range(6)]
    raw = searcher.shards[0].index.search(queries, 200)[1]
    assert (raw < 0).any() or factory == "HNSW4"
    for q, hits in enumerate(searcher.search(queries, 300, exclude)):
        assert len(hits.item_rows) == min(300, 400 - 30 * q)
        assert len(set(hits.item_rows.tolist())) == len(hits.item_rows)
        assert not set(hits.item_rows.tolist()) & set(exclude[q].tolist())
        assert hits.item_rows.min() >= 0
        assert (np.diff(hits.scores) <= 0).all()
        if factory == "IVF32,Flat":
            assert hits.item_rows.tolist() == brute_force(vectors, queries[q], 300, exclude[q].tolist())


def test_equal_scores_come_by_item_row(rng: np.random.Generator) -> None:
    vectors = np.repeat(unit_vectors(rng, 5), 6, axis=0)
    shards = rng.integers(0, 4, 30)
    searcher = searcher_of(vectors, shards, 4, "Flat")
    (hits,) = searcher.search(vectors[:1], 30)
    expected = brute_force(vectors, vectors[0], 30, [])
    assert hits.item_rows.tolist() == expected
    assert hits.item_rows[:6].tolist() == [0, 1, 2, 3, 4, 5]


def test_negative_and_zero_scores_are_ordered() -> None:
    vectors = np.eye(3, dtype=np.float32)
    searcher = Searcher([Shard(build_shard(vectors, "Flat"), np.array([4, 7, 9]))])
    (hits,) = searcher.search(np.array([[-0.5, -0.0, -0.25]], np.float32), 3)
    assert hits.item_rows.tolist() == [7, 9, 4]
    assert hits.scores.tolist() == [0.0, -0.25, -0.5]


def test_large_batches_with_lists_of_any_length(rng: np.random.Generator) -> None:
    vectors = unit_vectors(rng, 90)
    searcher = searcher_of(vectors, np.arange(90) % 2, 2, "Flat")
    queries = unit_vectors(rng, 1_100)
    exclude = [rng.choice(90, int(rng.integers(0, 80)), replace=False) for _ in queries]
    for q, hits in enumerate(searcher.search(queries, 7, exclude)):
        assert hits.item_rows.tolist() == brute_force(vectors, queries[q], 7, exclude[q].tolist())


def test_an_index_without_items_answers_with_nothing(rng: np.random.Generator) -> None:
    empty = Shard(build_shard(np.zeros((0, DIM), np.float32), "Flat"), np.zeros(0, np.int64))
    for searcher in (Searcher([]), Searcher([empty, empty])):
        assert [len(h.item_rows) for h in searcher.search(unit_vectors(rng, 2), 3)] == [0, 0]
    vectors = unit_vectors(rng, 8)
    searcher = Searcher([empty, Shard(build_shard(vectors, "Flat"), np.arange(8)), empty])
    assert len(searcher.search(vectors[:1], 3)[0].item_rows) == 3


def test_bad_calls_say_what_is_wrong(rng: np.random.Generator) -> None:
    searcher = searcher_of(unit_vectors(rng, 20), np.zeros(20), 1, "Flat")
    query = unit_vectors(rng, 1)
    with pytest.raises(RequestError, match=r"k \(0\)"):
        searcher.search(query, 0)
    with pytest.raises(RequestError, match=r"\(1, 4\); it must be \(number, 20\)"):
        searcher.search(query[:, :4], 3)
    with pytest.raises(RequestError, match="NaN"):
        searcher.search(np.full((1, DIM), np.nan, np.float32), 3)
    with pytest.raises(RequestError, match="1 queries have 2 exclude lists"):
        searcher.search(query, 3, [[], []])
    with pytest.raises(RequestError, match="item row 20 is not in the index"):
        searcher.vectors([3, 20])


def test_shards_that_do_not_fit_together_are_refused(rng: np.random.Generator) -> None:
    one = build_shard(unit_vectors(rng, 3), "Flat")
    with pytest.raises(ArtefactError, match="item row 5 is in two shards"):
        Searcher([Shard(one, np.array([1, 5, 6])), Shard(one, np.array([2, 3, 5]))])
    with pytest.raises(ConfigError, match="item row 5 occurs twice"):
        Searcher([Shard(one, np.array([1, 5, 5]))])
    with pytest.raises(ArtefactError, match="3 vectors and 2 item rows"):
        Searcher([Shard(one, np.array([1, 5]))])
    with pytest.raises(ArtefactError, match=r"\[9, 20\] dimensions"):
        Searcher(
            [
                Shard(one, np.arange(3)),
                Shard(build_shard(np.eye(9, dtype=np.float32), "Flat"), np.arange(3, 12)),
            ]
        )


@pytest.mark.parametrize("factory", ["Flat", "IVF16,SQ8", "HNSW8"])
def test_threads_share_a_searcher(factory: str, rng: np.random.Generator) -> None:
    vectors = unit_vectors(rng, 500)
    searcher = searcher_of(vectors, np.arange(500) % 3, 3, factory)
    queries = unit_vectors(rng, 40)
    efforts = [Effort(nprobe=1 + q % 16, ef_search=16 + q) for q in range(40)]

    def ask(q: int) -> tuple[list[int], list[float]]:
        (hits,) = searcher.search(queries[q : q + 1], 9, [np.arange(q)], efforts[q])
        return hits.item_rows.tolist(), hits.scores.tolist()

    alone = [ask(q) for q in range(40)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, [q for _ in range(5) for q in range(40)]))
    assert together == alone * 5


def test_effort_is_of_the_call_and_never_of_the_index(rng: np.random.Generator) -> None:
    vectors = unit_vectors(rng, 900)
    searcher = searcher_of(vectors, np.zeros(900), 1, "IVF32,Flat", nprobe=1)
    queries = unit_vectors(rng, 60)
    exact = exact_top_k(queries, 30, iter([(np.arange(900), vectors)]))
    recalls = [
        index_recall_at_k(searcher.search(queries, 10, effort=Effort(nprobe=n)), exact, 10)
        for n in (1, 4, 32)
    ]
    assert recalls[0] < recalls[1] < recalls[2] == 1.0
    assert index_recall_at_k(searcher.search(queries, 10), exact, 10) == recalls[0]
    assert searcher.shards[0].index.nprobe == 1


@pytest.mark.parametrize("factory", ["IVF32,Flat", "HNSW8", "IVF8,PQ4x4,RFlat", "PQ4x4fs,RFlat"])
def test_least_effort_reaches_the_target(factory: str, rng: np.random.Generator) -> None:
    vectors = unit_vectors(rng, 900)
    searcher = searcher_of(vectors, np.arange(900) % 2, 2, factory)
    queries = unit_vectors(rng, 60)
    exact = exact_top_k(queries, 30, iter([(np.arange(900), vectors)]))
    low, high = (least_effort(searcher, queries, exact, 10, target) for target in (0.5, 0.97))
    assert index_recall_at_k(searcher.search(queries, 10, effort=low), exact, 10) >= 0.5
    assert low != high


def test_index_recall_counts_near_ties_and_short_lists() -> None:
    def hits(rows: list[int], scores: list[float]) -> Hits:
        return Hits(np.array(rows, np.int64), np.array(scores, np.float32))

    exact = hits([1, 2, 3, 4], [0.9, 0.8, 0.8 - 5e-7, 0.1])
    assert index_recall_at_k([hits([1, 3], [0.9, 0.8])], [exact], 2) == 1.0
    assert index_recall_at_k([hits([1, 4], [0.9, 0.1])], [exact], 2) == 0.5
    assert index_recall_at_k([hits([3, 2], [0.8, 0.8])], [exact], 1) == 0.0
    assert index_recall_at_k([hits([1, 2, 3, 4], [1, 1, 1, 1])], [exact], 10) == 1.0
    assert index_recall_at_k([hits([], [])], [hits([], [])], 10) == 1.0


def test_exact_search_over_blocks_equals_brute_force(rng: np.random.Generator) -> None:
    vectors = unit_vectors(rng, 130)
    order = rng.permutation(130)
    blocks = [(order[start : start + 37], vectors[order[start : start + 37]]) for start in range(0, 130, 37)]
    queries = unit_vectors(rng, 5)
    for q, hits in enumerate(exact_top_k(queries, 12, iter(blocks))):
        assert hits.item_rows.tolist() == brute_force(vectors, queries[q], 12, [])


@pytest.mark.parametrize("factory", ["Flat", "HNSW8,SQ8", "IVF16,Flat", "IVF16,SQ8", "IVF8,PQ4"])
def test_exact_search_scores_every_vector_as_the_index_holds_it(
    factory: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, queries = unit_vectors(rng, 900), unit_vectors(rng, 7)
    parts = [(build_shard(vectors[at], factory, item_rows=at), at) for at in np.split(np.arange(900), 3)]
    # Trained apart, and with the least effort: neither may matter.
    effort = Effort(nprobe=1, ef_search=1)
    searchers = [
        Searcher([Shard(faiss.clone_index(index), at, at[:dead]) for index, at in parts], effort)
        for dead in (0, 40)
    ]
    gathered = []
    monkeypatch.setattr(Searcher, "_gather", lambda *a, _of=Searcher._gather: gathered.append(1) or _of(*a))
    for searcher in searchers:
        alive = np.flatnonzero(searcher.contains(np.arange(900)))
        for allowed in (None, Allowed.of_rows(alive[::2], 900)):
            held = alive if allowed is None else alive[::2]
            exclude = [held[q::5] for q in range(len(queries))]
            hits = searcher.search_exactly(queries, 25, exclude, allowed)
            for q, each in enumerate(hits):
                left = np.setdiff1d(held, exclude[q])
                scores = searcher.vectors(left) @ queries[q]
                assert np.isin(each.item_rows, left).all()
                np.testing.assert_allclose(each.scores, np.sort(scores)[::-1][:25], atol=1e-5)
    assert [searcher.num_items for searcher in searchers] == [900, 780]
    # Graphs alone can not be searched as a whole.
    assert bool(gathered) == factory.startswith("HNSW")


@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,SQ8", "IVF8,PQ4"])
def test_shards_trained_together_answer_as_one_index(factory: str, rng: np.random.Generator) -> None:
    vectors, queries = unit_vectors(rng, 900), unit_vectors(rng, 30)
    rows = np.sort(rng.permutation(3_000)[: len(vectors)])
    trained = train_index(vectors, factory)
    whole = Searcher([Shard(build_shard(vectors, factory, 1, rows, faiss.clone_index(trained)), rows)])
    part = rng.integers(0, 4, len(vectors))
    shards = [
        Shard(
            build_shard(vectors[part == s], factory, 1, rows[part == s], faiss.clone_index(trained)),
            rows[part == s],
        )
        for s in range(4)
    ]
    sharded = Searcher(shards)
    assert len(sharded.units) == 1
    effort = Effort(nprobe=3)
    found = 0
    for one, many in zip(
        whole.search(queries, 20, effort=effort), sharded.search(queries, 20, effort=effort), strict=True
    ):
        assert one.item_rows.tolist() == many.item_rows.tolist()
        assert one.scores.tolist() == many.scores.tolist()
        found += len(many.item_rows)
    assert found == 600
    assert (sharded.vectors(rows[::7]) == whole.vectors(rows[::7])).all()
    # Each shard's own index is as it was.
    assert [s.index.ntotal for s in shards] == [int((part == s).sum()) for s in range(4)]


def test_shards_trained_apart_are_not_joined(rng: np.random.Generator) -> None:
    vectors = unit_vectors(rng, 600)
    shards = [
        Shard(build_shard(vectors[r], "IVF8,Flat", item_rows=r), r)
        for r in (np.arange(300), np.arange(300, 600))
    ]
    searcher = Searcher(shards, Effort(nprobe=8))
    assert len(searcher.units) == 2
    for query, hits in zip(vectors[::50], searcher.search(vectors[::50], 9), strict=True):
        assert hits.item_rows.tolist() == brute_force(vectors, query, 9, [])


def test_tuning_does_not_count_what_exact_search_made_up_for(rng: np.random.Generator) -> None:
    vectors = unit_vectors(rng, 400)
    rows = np.arange(400)
    searcher = Searcher([Shard(build_shard(vectors, "IVF100,Flat", item_rows=rows), rows)])
    queries = unit_vectors(rng, 20)
    exact = exact_top_k(queries, 80, iter([(rows, vectors)]))
    # One list holds a few vectors, never 40: the answer is complete all the same.
    assert [len(h.item_rows) for h in searcher.search(queries, 40, effort=Effort(nprobe=1))] == [40] * 20
    assert least_effort(searcher, queries, exact, 40, 0.9).nprobe > 8


@pytest.mark.parametrize("changed", [0, 1], ids=["build", "update"])
def test_a_query_fetches_no_more_than_its_short_list_asks_for(
    changed: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries that fetch alike are searched together; long lists make nobody fetch more, alone or not."""
    vectors = unit_vectors(rng, 3000)
    dead = np.arange(changed)
    shards = [Shard(build_shard(vectors, "Flat"), np.arange(3000), dead)]
    if changed:
        shards.append(Shard(build_shard(vectors[dead], "Flat"), dead))
    searcher = Searcher(shards)
    unit = searcher.units[0]
    queries = unit_vectors(rng, 700)
    lengths = rng.permutation([0] * 300 + [3] * 300 + [40] * 96 + [1400, 1600, 2500, 2998])
    excluded = [rng.choice(3000, n, replace=False) for n in lengths]
    k = 5
    fetched = np.zeros(len(queries), np.int64)
    real = unit.search

    def search(some: np.ndarray, fetch: int, *rest: Any, **more: Any) -> Any:
        for q in some:
            fetched[np.flatnonzero((queries == q).all(axis=1))] += fetch
        return real(some, fetch, *rest, **more)

    monkeypatch.setattr(unit, "search", search)
    few = np.where(lengths > 1000, 0, lengths)
    for q, hits in enumerate(searcher.search(queries, k, excluded)):
        assert hits.item_rows.tolist() == brute_force(vectors, queries[q], k, excluded[q].tolist())
    assert (fetched <= 2 * (k + few)).all()
    assert (fetched[lengths <= 1000] >= k).all()
    fetched[:] = 0
    for q in [*range(30), *np.flatnonzero(lengths > 1000).tolist()]:
        searcher.search(queries[q : q + 1], k, excluded[q : q + 1])
    assert (fetched <= 2 * (k + few)).all()
