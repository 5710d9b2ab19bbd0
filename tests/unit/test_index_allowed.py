"""Searches among some of the items: every kind and strategy, any sharding, dead items, exclude lists."""

from __future__ import annotations

import threading

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.index.allowed import Allowed
from twotower.index.build import build_shard, train_index
from twotower.index.filter_measure import measure_filters
from twotower.index.filter_plan import SHARES, Choice, FilterPlan, Point, Timing, unmeasured
from twotower.index.search import Searcher, Shard
from twotower.index.spec import Effort

DIM = 16
NUM_ROWS = 900
KINDS = (
    "Flat",
    "SQ8",
    "PQ8x4fs",
    "HNSW16,Flat",
    "HNSW16,SQ8",
    "IVF8,Flat",
    "IVF8,SQ8",
    "IVF8,PQ8",
    "IVF8,PQ8x4fs,RFlat",
    "IVF8,RaBitQ",
    "PCA8,IVF8,SQ8",
)
EXHAUSTIVE = ("Flat", "SQ8", "IVF8,Flat", "IVF8,SQ8", "IVF8,PQ8")
"""Kinds that rank by the vectors they give back, once every list is visited."""
STRATEGIES = (None, "gather", "selector", "over_fetch")


def unit_vectors(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.standard_normal((count, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def catalogue(factory: str, num_shards: int, rng: np.random.Generator) -> tuple[Searcher, np.ndarray]:
    """A searcher whose item rows have holes and dead ones among them, and the rows alive."""
    rows = np.sort(rng.choice(NUM_ROWS, 600, replace=False))
    vectors = unit_vectors(rng, len(rows))
    dead = np.sort(rng.choice(rows, 60, replace=False))
    shard = rng.integers(0, num_shards, len(rows))
    trained = train_index(vectors, factory)
    shards = []
    for number in range(num_shards):
        mine = shard == number
        own = None if trained is None else faiss.clone_index(trained)
        shards.append(Shard(build_shard(vectors[mine], factory, 1, rows[mine], own), rows[mine], dead))
    return Searcher(shards), np.setdiff1d(rows, dead)


@pytest.fixture(scope="module", params=[(kind, number) for kind in KINDS for number in (1, 3)])
def built(request: pytest.FixtureRequest) -> tuple[str, Searcher, np.ndarray]:
    kind, num_shards = request.param
    return kind, *catalogue(kind, num_shards, np.random.default_rng(5))


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    share=st.sampled_from([0.0, 0.004, 0.05, 0.5, 1.0]),
    num_queries=st.sampled_from([1, 4]),
    k=st.sampled_from([1, 10, 1000]),
    strategy=st.sampled_from(STRATEGIES),
    num_excluded=st.sampled_from([0, 7, 400]),
)
def test_k_of_the_allowed_come_and_nothing_else(
    built: tuple[str, Searcher, np.ndarray],
    seed: int,
    share: float,
    num_queries: int,
    k: int,
    strategy: str | None,
    num_excluded: int,
) -> None:
    kind, searcher, alive = built
    rng = np.random.default_rng(seed)
    allowed = Allowed.of_mask(rng.random(NUM_ROWS) < share)
    queries = unit_vectors(rng, num_queries)
    exclude = [rng.choice(NUM_ROWS, num_excluded, replace=False) for _ in queries] if num_excluded else None
    found = searcher.search(
        queries, k, exclude, effort=searcher.efforts()[-1], allowed=allowed, strategy=strategy
    )
    decoded = searcher.vectors(alive)
    for number, hits in enumerate(found):
        open_rows = allowed.contains(alive)
        if exclude is not None:
            open_rows &= ~np.isin(alive, exclude[number])
        assert len(hits.item_rows) == min(k, open_rows.sum())
        assert np.isin(hits.item_rows, alive[open_rows]).all()
        assert len(np.unique(hits.item_rows)) == len(hits.item_rows)
        assert (np.diff(hits.scores) <= 0).all()
        if kind in EXHAUSTIVE or strategy == "gather":
            best = np.sort(decoded[open_rows] @ queries[number])[::-1][:k]
            np.testing.assert_allclose(hits.scores, best, atol=2e-6)


def test_strategies_agree_where_the_search_is_exhaustive(rng: np.random.Generator) -> None:
    searcher, _ = catalogue("IVF8,SQ8", 2, rng)
    allowed = Allowed.of_mask(rng.random(NUM_ROWS) < 0.3)
    queries = unit_vectors(rng, 3)
    most = searcher.efforts()[-1]
    lists = [
        [h.item_rows.tolist() for h in searcher.search(queries, 20, allowed=allowed, strategy=s, effort=most)]
        for s in ("gather", "selector", "over_fetch")
    ]
    assert lists[0] == lists[1] == lists[2]


def test_threads_search_with_sets_of_their_own(rng: np.random.Generator) -> None:
    searcher, _ = catalogue("IVF8,SQ8", 3, rng)
    plain, _ = catalogue("HNSW16,Flat", 2, rng)
    wrong: list[str] = []

    def work(seed: int) -> None:
        own = np.random.default_rng(seed)
        for _ in range(60):
            allowed = Allowed.of_mask(own.random(NUM_ROWS) < own.choice([0.02, 0.3, 0.9]))
            query = unit_vectors(own, int(own.integers(1, 3)))
            for each in (searcher, plain):
                for hits in each.search(query, 15, allowed=allowed, strategy=own.choice(STRATEGIES[1:])):
                    if not allowed.contains(hits.item_rows).all() or len(hits.item_rows) == 0:
                        wrong.append(f"{hits} is not of {allowed}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 70), st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_sets_behave_as_sets(num_rows: int, seed: int, first_rows: bool, second_rows: bool) -> None:
    rng = np.random.default_rng(seed)
    masks = [rng.random(num_rows) < rng.choice([0.0, 0.05, 0.5, 1.0]) for _ in range(2)]

    def make(mask: np.ndarray, as_rows: bool) -> Allowed:
        return Allowed.of_rows(np.flatnonzero(mask)[::-1], num_rows) if as_rows else Allowed.of_mask(mask)

    a, b = make(masks[0], first_rows), make(masks[1], second_rows)
    for found, mask in ((a & b, masks[0] & masks[1]), (a | b, masks[0] | masks[1]), (~a, ~masks[0])):
        assert found.count == mask.sum()
        assert found.rows().tolist() == np.flatnonzero(mask).tolist()
        assert found.mask().tolist() == mask.tolist()
        assert np.unpackbits(found.bits(), bitorder="little").sum() == mask.sum()
        probe = np.arange(-2, num_rows + 2)
        inside = (probe >= 0) & (probe < num_rows)
        assert found.contains(probe).tolist() == (inside & mask[probe % num_rows]).tolist()


def test_sets_over_different_rows_do_not_mix() -> None:
    with pytest.raises(ValueError, match="over 5 and 6 item rows"):
        Allowed.of_rows([1], 5) & Allowed.of_rows([1], 6)


def plan() -> FilterPlan:
    return FilterPlan(
        [
            Point(0.5, {"selector": Timing(1.0, Effort(8)), "over_fetch": Timing(0.9, Effort(9))}),
            Point(
                0.1,
                {
                    "gather": Timing(40.0, Effort()),
                    "selector": Timing(1.2, Effort(16)),
                    "over_fetch": Timing(3.0, Effort(17)),
                },
            ),
            Point(0.01, {"gather": Timing(4.0, Effort()), "selector": Timing(2.0, Effort(64))}),
            Point(0.001, {"gather": Timing(0.4, Effort()), "selector": Timing(5.0, Effort(512))}),
        ]
    )


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (1.0, Choice("over_fetch", Effort(9))),
        (0.5, Choice("over_fetch", Effort(9))),
        (0.11, Choice("selector", Effort(16))),
        (0.02, Choice("selector", Effort(43))),
        (0.0012, Choice("gather", Effort())),
        (0.00002, Choice("gather", Effort())),
    ],
)
def test_the_plan_takes_the_fastest_at_the_effort_in_between(share: float, expected: Choice) -> None:
    count = round(share * 10_000_000)
    chosen = plan().choose(count, 10_000_000, 100)
    assert chosen is not None
    assert chosen.strategy == expected.strategy
    if expected.strategy != "gather":
        assert chosen.effort == expected.effort
    assert FilterPlan.from_json(plan().to_json()).choose(count, 10_000_000, 100) == chosen


def test_no_more_items_than_wanted_are_gathered() -> None:
    slow = FilterPlan([Point(0.5, {"selector": Timing(0.1, Effort(4))})])
    assert slow.choose(100, 200, 100) == Choice("gather", Effort())
    assert slow.choose(101, 202, 100) == Choice("selector", Effort(4))


def test_without_measurements_the_effort_grows_as_the_share_falls() -> None:
    assert unmeasured(1_000, 1_000_000, Effort(8)).strategy == "gather"
    assert unmeasured(100_000, 1_000_000, Effort(8)) == Choice("selector", Effort(80, 512))


def test_measured_plan_reaches_the_target_on_other_sets_and_queries(rng: np.random.Generator) -> None:
    centres = unit_vectors(rng, 40)
    vectors = centres[rng.integers(0, 40, 6_000)] + 0.4 * unit_vectors(rng, 6_000)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = np.arange(6_000)
    queries = unit_vectors(rng, 96)
    searcher = Searcher([Shard(build_shard(vectors, "IVF64,SQ8", 1, rows), rows)])

    def blocks() -> list[tuple[np.ndarray, np.ndarray]]:
        return [(rows[s : s + 1_000], vectors[s : s + 1_000]) for s in range(0, 6_000, 1_000)]

    plan = measure_filters(searcher, queries[:48], blocks, 10, 0.9, seed=1)
    assert [point.share for point in plan.points] == list(SHARES)
    wide = plan.points[0].timings["selector"].effort.nprobe
    narrow = plan.points[2].timings["selector"].effort.nprobe
    assert 1 <= wide <= narrow <= 64
    assert wide < 64
    planned = Searcher(searcher.shards, Effort(1), plan=plan)
    for share in (0.6, 0.2, 0.02):
        shares = []
        for query in queries[48:]:
            allowed = Allowed.of_mask(rng.random(6_000) < share)
            (hits,) = planned.search(query[None], 10, allowed=allowed)
            best = allowed.rows()[np.argsort(-(vectors[allowed.rows()] @ query))[:10]]
            shares.append(len(np.intersect1d(hits.item_rows, best)) / 10)
        assert np.mean(shares) >= 0.85
    # Without a plan's effort the same search finds too little: the check above is not an empty one.
    allowed = Allowed.of_mask(rng.random(6_000) < 0.6)
    found = planned.search(queries[48:], 10, effort=Effort(1), allowed=allowed, strategy="selector")
    best = np.argsort(-(vectors[allowed.rows()] @ queries[48:].T), axis=0)[:10].T
    shares = [
        len(np.intersect1d(h.item_rows, allowed.rows()[b])) / 10 for h, b in zip(found, best, strict=True)
    ]
    assert np.mean(shares) < 0.85


@pytest.mark.parametrize("factory", ["Flat", "IVF16,SQ8", "HNSW16,Flat"])
@pytest.mark.parametrize("restricted", [False, True])
def test_a_long_exclude_list_leaves_the_others(
    factory: str, restricted: bool, rng: np.random.Generator
) -> None:
    vectors = unit_vectors(rng, 3_000)
    rows = np.arange(3_000)
    searcher = Searcher([Shard(build_shard(vectors, factory, 1, rows), rows)], Effort(16, 512))
    allowed = Allowed.of_mask(rng.random(3_000) < 0.5) if restricted else None
    query = unit_vectors(rng, 1)
    order = np.argsort(-(searcher.vectors(rows) @ query[0]))
    # The best of all are among those left out.
    out = np.concatenate([order[:1_400], [-1, 5_000]])
    (hits,) = searcher.search(query, 20, [out], allowed=allowed, strategy="selector" if restricted else None)
    left = [r for r in order[1_400:] if allowed is None or allowed.contains(np.array([r]))[0]]
    assert len(hits.item_rows) == 20
    if factory == "HNSW16,Flat":
        assert np.isin(hits.item_rows, left).all()
    else:
        assert sorted(hits.item_rows.tolist()) == sorted(left[:20])
