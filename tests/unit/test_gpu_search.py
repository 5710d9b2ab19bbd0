"""Searching and building on real GPUs against the same on the CPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from benchmarks.index import share_equal
from benchmarks.vectors import make
from twotower.errors import ConfigError
from twotower.index import gpu as gpu_module
from twotower.index.allowed import Allowed
from twotower.index.build import build_shard, read_index, train_index, write_index
from twotower.index.gpu import GpuUnit, gpus
from twotower.index.hits import Hits
from twotower.index.recall import NEAR_TIE, index_recall_at_k
from twotower.index.search import Searcher, Shard, exact_top_k
from twotower.index.spec import CAGRA, CAGRA_POOL, Effort, ivf_of
from twotower.index.tuning import least_effort

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(faiss.get_num_gpus() == 0, reason="FAISS sees no GPU, or is its CPU build"),
]

DIM, K, COUNT = 128, 20, 20_000
ALL_LISTS = Effort(nprobe=64)


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    return make(COUNT, DIM, num_queries=300)


def shards_of(
    vectors: np.ndarray, factory: str, number: int = 3, dead: np.ndarray | None = None, on_gpu: bool = False
) -> list[Shard]:
    gpu = gpus()[0] if on_gpu else None
    trained = train_index(vectors[::2], factory, 2, gpu)
    shards = []
    for part in range(number):
        rows = np.arange(part, len(vectors), number)
        own = None if trained is None else faiss.clone_index(trained)
        index = build_shard(vectors[rows], factory, 2, rows, own, gpu)
        shards.append(Shard(index, rows, np.zeros(0, np.int64) if dead is None else dead))
    return shards


def both(vectors: np.ndarray, factory: str, effort: Effort, **how: Any) -> tuple[Searcher, Searcher]:
    """A searcher on the GPUs and one on the CPU, of indexes of their own."""
    ours = Searcher(shards_of(vectors, factory, **how), effort)
    assert all(isinstance(u, GpuUnit) and u._copy is not None for u in ours.units)
    return ours, Searcher(shards_of(vectors, factory, **how), effort, on=())


def assert_same(ours: list[Hits], theirs: list[Hits]) -> None:
    """The answers are equal but for scores closer than rounding."""
    for mine, other in zip(ours, theirs, strict=True):
        assert len(mine.item_rows) == len(other.item_rows) == len(np.unique(mine.item_rows))
        np.testing.assert_allclose(mine.scores, other.scores, atol=2 * NEAR_TIE)
        edge = other.scores[-1] + 2 * NEAR_TIE
        sure = set(other.item_rows[other.scores > edge])
        assert sure <= set(mine.item_rows)


@pytest.mark.parametrize("number", [1, 3])
def test_flat_is_exact(number: int, data: tuple[np.ndarray, np.ndarray]) -> None:
    vectors, queries = data
    ours, _ = both(vectors, "Flat", Effort(), number=number)
    whole = faiss.IndexFlatIP(DIM)
    whole.add(vectors)
    scores, labels = whole.search(queries, K + 30)
    assert share_equal(ours.search(queries, K), scores, labels, K) == 1
    singly = [ours.search(query[None], K)[0] for query in queries[:50]]
    assert share_equal(singly, scores[:50], labels[:50], K) == 1


@pytest.mark.parametrize("factory", ["Flat", "IVF64,Flat", "IVF64,SQ8", "PCA64,IVF64,SQ8"])
def test_answers_are_those_of_the_cpu(
    factory: str, data: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, queries = data
    rng = np.random.default_rng(1)
    dead = np.sort(rng.choice(COUNT, 2_000, replace=False))
    ours, theirs = both(vectors, factory, ALL_LISTS, dead=dead)
    exclude = [rng.choice(COUNT, 50, replace=False) for _ in queries]
    monkeypatch.setattr(gpu_module, "BLOCK", 128)
    for call in (
        {"queries": queries, "k": K},
        {"queries": queries[:1], "k": K},
        {"queries": queries, "k": K, "exclude": exclude},
        {"queries": queries[:2], "k": 3_000},
    ):
        assert_same(ours.search(**call), theirs.search(**call))
    allowed = Allowed.of_mask(rng.random(COUNT) < 0.1)
    for strategy in ("gather", "selector", "over_fetch"):
        found = ours.search(queries[:20], K, allowed=allowed, strategy=strategy)
        assert_same(found, theirs.search(queries[:20], K, allowed=allowed, strategy=strategy))
        for hits in found:
            assert allowed.contains(hits.item_rows).all()
            assert not np.isin(hits.item_rows, dead).any()


@pytest.mark.parametrize("factory", ["Flat", "IVF64,SQ8"])
def test_threads_share_a_searcher(factory: str, data: tuple[np.ndarray, np.ndarray]) -> None:
    vectors, queries = data
    ours, _ = both(vectors, factory, ALL_LISTS)
    alone = [ours.search(query[None], K)[0] for query in queries]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda query: ours.search(query[None], K)[0], [*queries, *queries]))
    assert_same(found, alone + alone)


@pytest.mark.parametrize("factory", ["IVF64,Flat", "IVF64,SQ8", "IVF64,PQ16", "IVF64,PQ64x4fs,Refine(SQ8)"])
def test_an_index_built_on_a_gpu_is_one_of_the_cpu(
    factory: str, data: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    vectors, queries = data
    (built,) = shards_of(vectors, factory, 1, on_gpu=True)
    (plain,) = shards_of(vectors, factory, 1)
    assert type(faiss.downcast_index(built.index)) is type(faiss.downcast_index(plain.index))
    write_index(built.index, tmp_path / "index.faiss")
    read = read_index(tmp_path / "index.faiss", factory, DIM, COUNT)
    lists: Any = ivf_of(read).invlists
    ids = [faiss.rev_swig_ptr(lists.get_ids(n), lists.list_size(n)).copy() for n in range(64)]
    np.testing.assert_array_equal(np.sort(np.concatenate(ids)), built.item_rows)
    exact = exact_top_k(queries, 2 * K, [(np.arange(COUNT), vectors)])
    effort = Effort(nprobe=8, k_factor=4)
    mine, theirs = (
        index_recall_at_k(Searcher([shard], effort, on=()).search(queries, K), exact, K)
        for shard in (Shard(read, built.item_rows), plain)
    )
    assert mine == pytest.approx(theirs, abs=0.02)


needs_cuvs = pytest.mark.skipif(not hasattr(faiss, "GpuIndexCagra"), reason="FAISS is built without cuVS")


@needs_cuvs
def test_a_graph_goes_through_its_file_and_is_found_on_both(
    data: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    vectors, queries = data
    built = shards_of(vectors, CAGRA, 2, on_gpu=True)
    shards = []
    for number, shard in enumerate(built):
        write_index(shard.index, tmp_path / f"{number}.faiss")
        read = read_index(tmp_path / f"{number}.faiss", CAGRA, DIM, len(shard.item_rows))
        shards.append(Shard(read, shard.item_rows))
        assert (faiss.vector_to_array(faiss.downcast_index(read).hnsw.neighbors) < COUNT).all()
    exact = exact_top_k(queries, 2 * K, [(np.arange(COUNT), vectors)])
    for on in (gpus(), ()):
        searcher = Searcher(shards, on=on)
        assert all(isinstance(u, GpuUnit) and u._copy is not None for u in searcher.units) or not on
        searcher.effort = least_effort(searcher, queries[:150], exact[:150], K, 0.95)
        found = searcher.search(queries[150:], K, complete=False)
        assert index_recall_at_k(found, exact[150:], K) > 0.93
        for query, hits in zip(queries[150:], found, strict=True):
            assert len(np.unique(hits.item_rows)) == len(hits.item_rows)
            # Inner products, as of every other kind: not distances, not negated.
            np.testing.assert_allclose(hits.scores, vectors[hits.item_rows] @ query, atol=1e-4)


@needs_cuvs
def test_a_graph_answers_a_batch_as_it_answers_one_query(data: tuple[np.ndarray, np.ndarray]) -> None:
    vectors, queries = data
    searcher = Searcher(shards_of(vectors, CAGRA, 1, on_gpu=True), Effort(ef_search=128))
    exact = exact_top_k(queries, 2 * K, [(np.arange(COUNT), vectors)])
    singly = [searcher.search(query[None], K)[0] for query in queries]
    batch, alone = (index_recall_at_k(found, exact, K) for found in (searcher.search(queries, K), singly))
    assert batch == pytest.approx(alone, abs=0.02)


@needs_cuvs
def test_a_graph_passes_over_dead_and_filtered_items(data: tuple[np.ndarray, np.ndarray]) -> None:
    vectors, queries = data
    rng = np.random.default_rng(2)
    dead = np.sort(rng.choice(COUNT, 4_000, replace=False))
    searcher = Searcher(shards_of(vectors, CAGRA, 2, dead, on_gpu=True), Effort(ef_search=256))
    allowed = Allowed.of_mask(rng.random(COUNT) < 0.2)
    for call in ({}, *({"allowed": allowed, "strategy": s} for s in ("gather", "selector", "over_fetch"))):
        for hits in searcher.search(queries[:30], K, **call):
            assert len(hits.item_rows) == K
            assert not np.isin(hits.item_rows, dead).any()
            assert not call or allowed.contains(hits.item_rows).all()
    assert len(searcher.search(queries[:1], 2_000)[0].item_rows) == 2_000


@needs_cuvs
def test_a_graph_of_few_vectors_is_refused(data: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(ConfigError, match=rf"more than {CAGRA_POOL} vectors in a shard, and one has 100"):
        build_shard(data[0][:100], CAGRA, gpu=gpus()[0])
