"""What is done around GPUs, with the CPU in a GPU's place: building, placing, calls within limits, locks."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import faiss
import numpy as np
import pytest

from twotower.index import gpu as gpu_module
from twotower.index import gpu_build
from twotower.index.allowed import Allowed
from twotower.index.build import build_shard, train_index
from twotower.index.gpu import Gpu, GpuUnit, placed, spread
from twotower.index.search import Searcher, Shard
from twotower.index.spec import CAGRA, Effort, builds_on_gpu, empty_index

DIM = 16
NUM_ROWS = 900
MOST = 500
"""Results and lists of a call; a GPU has more."""


class OnCpu(Gpu):
    """A GPU whose indexes are the CPU's, with the limits of a GPU: calls beyond them fail."""

    def __init__(self, has_room: bool = True) -> None:
        self.device = 0
        self.lock = threading.Lock()
        self.has_room = has_room
        self.flats: list[faiss.IndexFlat] = []
        self.copies: list[Limited] = []

    def copy(self, index: Any) -> Any | None:
        if not self.has_room or isinstance(faiss.downcast_index(index), faiss.IndexHNSW):
            return None
        self.copies.append(Limited(faiss.clone_index(index), self.lock))
        return self.copies[-1]

    def flat(self, dim: int, metric: int) -> Any:
        assert self.lock.locked()
        self.flats.append(faiss.IndexFlat(dim, metric))
        return self.flats[-1]


class Limited:
    """An index on a GPU, as FAISS documents what it can do."""

    def __init__(self, index: Any, lock: threading.Lock) -> None:
        self.index = index
        self.lock = lock
        self.num_queries = 0

    def search(self, queries: np.ndarray, k: int, params: Any) -> tuple[np.ndarray, np.ndarray]:
        assert self.lock.locked()
        assert k <= gpu_module.MOST
        assert len(queries) <= gpu_module.BLOCK
        assert getattr(params, "nprobe", 1) <= gpu_module.MOST
        assert getattr(params, "sel", None) is None
        self.num_queries += len(queries)
        return self.index.search(queries, k, params=params)


def unit_vectors(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.standard_normal((count, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _copy(index: Any) -> Any:
    return faiss.deserialize_index(faiss.serialize_index(index))


def shards_of(
    factory: str, num_shards: int, rng: np.random.Generator, dead: np.ndarray | None = None
) -> list[Shard]:
    vectors, rows = unit_vectors(rng, NUM_ROWS), np.arange(NUM_ROWS)
    part = rng.integers(0, num_shards, NUM_ROWS)
    trained = train_index(vectors, factory)
    dead = np.zeros(0, np.int64) if dead is None else dead
    return [
        Shard(
            build_shard(
                vectors[part == s], factory, 1, rows[part == s], trained and faiss.clone_index(trained)
            ),
            rows[part == s],
            dead,
        )
        for s in range(num_shards)
    ]


FACTORIES = {
    "IVF16,Flat": 2,
    "IVF16,SQ8": 2,
    "IVF16,PQ4x4": 3,
    "IVF16,PQ8x4fs,Refine(SQ8)": 2,
    "PCA8,IVF16,PQ4x4": 2,
    "IVF16_HNSW8,SQ8": 1,
    "IVF16,RaBitQ": 1,
}
"""Kinds, and what a GPU does for each: centroids, codebooks, the lists of what is added."""


@pytest.mark.parametrize("factory", FACTORIES)
def test_what_a_gpu_helps_to_build_is_the_same_index(factory: str, rng: np.random.Generator) -> None:
    vectors, rows = unit_vectors(rng, 900), np.arange(900) * 2 + 1
    gpu = OnCpu()
    helped = build_shard(vectors, factory, item_rows=rows, gpu=gpu)
    plain = build_shard(vectors, factory, item_rows=rows)
    assert bytes(faiss.serialize_index(helped)) == bytes(faiss.serialize_index(plain))
    assert [flat.ntotal > 0 for flat in gpu.flats] == [True] * FACTORIES[factory]
    assert not gpu.lock.locked()
    shared = train_index(vectors, factory, gpu=gpu)
    assert bytes(faiss.serialize_index(shared)) == bytes(faiss.serialize_index(train_index(vectors, factory)))


def test_the_lists_of_vectors_are_those_the_gpu_finds(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_build, "_BLOCK", 100)
    vectors, rows = unit_vectors(rng, 900), np.arange(900)
    trained = train_index(vectors, "IVF16,SQ8")
    gpu = OnCpu()
    index = build_shard(vectors, "IVF16,SQ8", 1, rows, faiss.clone_index(trained), gpu)
    assert [flat.ntotal for flat in gpu.flats] == [16]
    plain = build_shard(vectors, "IVF16,SQ8", 1, rows, faiss.clone_index(trained))
    assert bytes(faiss.serialize_index(index)) == bytes(faiss.serialize_index(plain))


def test_what_a_gpu_takes_over() -> None:
    taken = {f: builds_on_gpu(empty_index(f, DIM)) for f in [*FACTORIES, CAGRA, "Flat", "HNSW8", "SQ8"]}
    assert [f for f, is_taken in taken.items() if not is_taken] == ["Flat", "HNSW8", "SQ8"]


def test_shards_go_where_the_least_lies() -> None:
    assert spread([], 2) == []
    assert spread([5, 5, 5, 5], 2) == [0, 1, 0, 1]
    assert spread([1, 9, 2, 3, 4], 2) == [0, 0, 1, 1, 1]
    assert spread([3, 2, 1], 5) == [0, 1, 2]


def test_shards_of_a_gpu_are_joined_where_they_were_trained_together(rng: np.random.Generator) -> None:
    shards = [(s.index, s.item_rows, s.dead) for s in shards_of("IVF16,SQ8", 5, rng)]
    units = placed(shards, [OnCpu(), OnCpu()])
    assert [type(u) for u in units] == [GpuUnit, GpuUnit]
    assert units[0].gpu is not units[1].gpu
    np.testing.assert_array_equal(np.sort(np.concatenate([u.item_rows for u in units])), np.arange(NUM_ROWS))
    sizes = [len(u.item_rows) for u in units]
    cards = [u.gpu for u in units if isinstance(u, GpuUnit)]
    copied = [card.copies[0].index.ntotal for card in cards if isinstance(card, OnCpu)]
    assert copied == sizes
    assert max(sizes) < NUM_ROWS * 0.65


@pytest.mark.parametrize("has_room", [True, False])
@pytest.mark.parametrize(
    "factory", ["Flat", "IVF16,Flat", "IVF16,SQ8", "SQ8", "HNSW16,Flat", "PCA8,IVF16,SQ8"]
)
@pytest.mark.parametrize("num_shards", [1, 3])
def test_answers_are_those_of_the_cpu(
    factory: str, num_shards: int, has_room: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_module, "BLOCK", 16)
    monkeypatch.setattr(gpu_module, "MOST", MOST)
    dead = np.sort(rng.choice(NUM_ROWS, 100, replace=False))
    shards = shards_of(factory, num_shards, rng, dead)
    # A searcher tells indexes of labels beyond their vectors.
    copies = [Shard(_copy(s.index), s.item_rows, s.dead) for s in shards]
    gpus = [OnCpu(has_room), OnCpu(has_room)]
    effort = Effort(nprobe=16, ef_search=300)
    theirs = Searcher(shards, effort, on=gpus)
    ours = Searcher(copies, effort, on=())
    queries = unit_vectors(rng, 40)
    exclude = [rng.choice(NUM_ROWS, 20, replace=False) for _ in queries]
    allowed = Allowed.of_mask(rng.random(NUM_ROWS) < 0.3)
    asked: list[dict[str, Any]] = [
        {"queries": queries, "k": 10},
        {"queries": queries[:1], "k": 10},
        {"queries": queries, "k": 10, "exclude": exclude},
        {"queries": queries[:3], "k": 600},
        *(
            {"queries": queries[:3], "k": 10, "allowed": allowed, "strategy": s}
            for s in ("gather", "selector", "over_fetch")
        ),
    ]
    for call in asked:
        for mine, other in zip(ours.search(**call), theirs.search(**call), strict=True):
            np.testing.assert_array_equal(mine.item_rows, other.item_rows)
            np.testing.assert_allclose(mine.scores, other.scores, atol=2e-6)
    on_gpu = has_room and factory != "HNSW16,Flat"
    assert bool(sum(copy.num_queries for gpu in gpus for copy in gpu.copies)) == on_gpu


def test_lists_are_counted_as_the_index_has_them(rng: np.random.Generator) -> None:
    gpu = OnCpu()
    searcher = Searcher(shards_of("IVF16,SQ8", 1, rng), Effort(nprobe=100_000), on=[gpu])
    searcher.search(unit_vectors(rng, 1), 5)
    assert gpu.copies[0].num_queries == 1


@pytest.mark.parametrize("factory", ["Flat", "IVF16,SQ8"])
def test_threads_share_the_gpus(factory: str, rng: np.random.Generator) -> None:
    # The stand-in fails where a GPU would be searched by two threads: each call is made under its lock.
    shards = shards_of(factory, 3, rng)
    searcher = Searcher(shards, Effort(nprobe=16), on=[OnCpu(), OnCpu()])
    queries = unit_vectors(rng, 60)
    alone = [h.item_rows.tolist() for h in searcher.search(queries, 10)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda q: searcher.search(q[None], 10)[0].item_rows.tolist(), queries))
    assert found == alone
