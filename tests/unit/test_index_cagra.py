"""CAGRA graphs on machines without a GPU: read, searched, filtered, tuned; not built."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest

from tests.graphs import cagra_graph
from twotower.config.service import IndexConfig
from twotower.errors import ArtefactError, ConfigError
from twotower.index.allowed import Allowed
from twotower.index.build import build_shard, read_index, train_index, write_index
from twotower.index.choice import choose, memory_bytes
from twotower.index.gpu import cagra_candidates
from twotower.index.gpu_build import require_gpu
from twotower.index.recall import index_recall_at_k
from twotower.index.search import Searcher, Shard, exact_top_k
from twotower.index.spec import CAGRA, Effort, efforts, empty_index
from twotower.index.tuning import least_effort

DIM, K = 24, 10


def unit_vectors(rng: np.random.Generator, count: int, dim: int = DIM) -> np.ndarray:
    vectors = rng.normal(size=(count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return unit_vectors(np.random.default_rng(3), 1_200)


@pytest.fixture(scope="module")
def shards(vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> list[Shard]:
    """Two shards, through their files; item row r is vector r."""
    folder, shards = tmp_path_factory.mktemp("cagra"), []
    for number in range(2):
        rows = np.arange(number, len(vectors), 2)
        write_index(cagra_graph(vectors[rows]), folder / f"{number}.faiss")
        shards.append(Shard(read_index(folder / f"{number}.faiss", CAGRA, DIM, len(rows)), rows))
    return shards


def test_a_graph_is_read_back_and_scores_inner_products(shards: list[Shard], vectors: np.ndarray) -> None:
    searcher = Searcher(shards, Effort(ef_search=400))
    queries = unit_vectors(np.random.default_rng(4), 50)
    hits = searcher.search(queries, 10)
    exact = exact_top_k(queries, 20, [(np.arange(len(vectors)), vectors)])
    assert index_recall_at_k(hits, exact, 10) > 0.98
    for query, found in zip(queries, hits, strict=True):
        np.testing.assert_allclose(found.scores, vectors[found.item_rows] @ query, atol=1e-6)
    assert (searcher.vectors([7, 2]) == vectors[[7, 2]]).all()


def test_a_file_of_another_kind_is_no_graph(shards: list[Shard], tmp_path: Path, vectors: np.ndarray) -> None:
    write_index(build_shard(vectors[:200], "HNSW32,Flat"), tmp_path / "hnsw.faiss")
    with pytest.raises(ArtefactError, match="holds a IndexHNSWFlat, 'CAGRA' is a IndexHNSWCagra"):
        read_index(tmp_path / "hnsw.faiss", CAGRA, DIM, 200)
    write_index(shards[0].index, tmp_path / "cagra.faiss")
    with pytest.raises(ArtefactError, match="holds a IndexHNSWCagra"):
        read_index(tmp_path / "cagra.faiss", "HNSW32,Flat", DIM, 600)


def test_effort_is_tuned_to_a_target(rng: np.random.Generator) -> None:
    steps = efforts(empty_index(CAGRA, 48))
    assert (steps[0].ef_search, steps[-1].ef_search) == (16, 2_048)
    vectors, queries = (unit_vectors(rng, count, 48) for count in (4_000, 200))
    rows = np.arange(len(vectors))
    searcher = Searcher([Shard(cagra_graph(vectors), rows)])
    assert searcher.efforts() == steps
    exact = exact_top_k(queries, 20, [(rows, vectors)])
    chosen = least_effort(searcher, queries, exact, K, 0.95)
    assert steps[0].ef_search < chosen.ef_search < steps[-1].ef_search
    recalls = {
        step: index_recall_at_k(searcher.search(queries, K, effort=step, complete=False), exact, K)
        for step in (steps[0], chosen)
    }
    assert recalls[steps[0]] < 0.95 <= recalls[chosen]


@pytest.mark.parametrize("strategy", [None, "gather", "selector", "over_fetch"])
@pytest.mark.parametrize("share", [0.004, 0.3])
def test_filters_and_dead_items_are_kept_to(
    strategy: str | None, share: float, shards: list[Shard], vectors: np.ndarray
) -> None:
    rng = np.random.default_rng(6)
    dead = np.sort(rng.choice(len(vectors), 150, replace=False))
    searcher = Searcher([Shard(s.index, s.item_rows, dead) for s in shards])
    allowed = Allowed.of_mask(rng.random(len(vectors)) < share)
    queries = unit_vectors(rng, 5)
    open_rows = np.setdiff1d(allowed.rows(), dead)
    found = searcher.search(queries, 30, allowed=allowed, strategy=strategy, effort=Effort(ef_search=1_200))
    for query, hits in zip(queries, found, strict=True):
        assert len(hits.item_rows) == min(30, len(open_rows))
        assert np.isin(hits.item_rows, open_rows).all()
        best = np.sort(vectors[open_rows] @ query)[::-1][: len(hits.scores)]
        assert hits.scores.mean() > best.mean() - 0.01
        if strategy == "gather":
            np.testing.assert_allclose(hits.scores, best, atol=1e-6)


def test_building_one_without_a_gpu_is_refused(vectors: np.ndarray) -> None:
    with pytest.raises(
        ConfigError, match=r"cagra is built on a GPU, and this build has none; .* index\.kind"
    ):
        build_shard(vectors, CAGRA)
    with pytest.raises(ConfigError, match="this build has none"):
        require_gpu(False)
    assert train_index(vectors, CAGRA) is None
    assert build_shard(vectors[:0], CAGRA).ntotal == 0


@pytest.mark.skipif(hasattr(faiss, "GpuIndexCagra"), reason="FAISS is built with cuVS")
def test_building_one_without_cuvs_is_refused() -> None:
    with pytest.raises(ConfigError, match="FAISS here is built without it; .*make setup FLAVOUR=gpu"):
        require_gpu(True)


def test_the_kind_is_chosen_by_name_and_weighed(shards: list[Shard], tmp_path: Path) -> None:
    assert choose(IndexConfig(kind="cagra"), 10, DIM).factory == CAGRA
    with pytest.raises(ConfigError, match=r"cagra of 10,000,000 items.*allows 1;"):
        choose(IndexConfig(kind="cagra", max_memory_gib=1), 10_000_000, DIM)
    write_index(shards[0].index, tmp_path / "index.faiss")
    size = (tmp_path / "index.faiss").stat().st_size
    assert memory_bytes("cagra", 600, DIM) - 17 * 600 == pytest.approx(size, rel=0.1)


def test_cuvs_keeps_candidates_in_blocks_and_at_least_k() -> None:
    asked = [(10, 16), (10, 32), (10, 33), (100, 64), (1_000, 2_048)]
    assert [cagra_candidates(k, Effort(ef_search=ef)) for k, ef in asked] == [32, 32, 64, 128, 2_048]
