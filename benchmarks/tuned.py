"""Shards over made vectors, built and tuned to a recall target as a build does it; for several benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import faiss
import numpy as np
import numpy.typing as npt

from twotower.index.build import build_shard, train_index
from twotower.index.hits import Hits
from twotower.index.search import Searcher, Shard
from twotower.index.tuning import least_effort

FloatArray = npt.NDArray[np.float32]

K = 100
TARGET = 0.95
THREADS = 2
SHARDS = 4
POINTS_PER_LIST = 64


@dataclass
class Data:
    """Vectors, and queries with their exact answers: some to tune on, others to report on."""

    vectors: FloatArray
    tuning: FloatArray
    tuning_exact: list[Hits]
    queries: FloatArray
    exact: list[Hits]

    def blocks(self) -> Iterable[tuple[npt.NDArray[np.int64], FloatArray]]:
        """Yield (item_rows, vectors) of all items."""
        for start in range(0, len(self.vectors), 32_768):
            block = self.vectors[start : start + 32_768]
            yield np.arange(start, start + len(block)), block


def with_answers(vectors: FloatArray, queries: FloatArray) -> Data:
    """Search the queries exactly, and part them in halves."""
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    scores, rows = flat.search(queries, 2 * K)
    exact = [Hits(r, s) for r, s in zip(rows, scores, strict=True)]
    half = len(queries) // 2
    return Data(vectors, queries[:half], exact[:half], queries[half:], exact[half:])


def tuned_shards(data: Data, factory: str, on_built: Callable[[], object] = lambda: None) -> Searcher:
    """Build shards that share what is trained, call ``on_built``, and tune them."""
    rng = np.random.default_rng(0)
    shard = rng.integers(0, SHARDS, len(data.vectors))
    nlist = int(factory.split(",")[0].removeprefix("IVF"))
    sample = rng.permutation(len(data.vectors))[: POINTS_PER_LIST * nlist]
    trained = train_index(data.vectors[np.sort(sample)], factory, THREADS)
    shards = []
    for number in range(SHARDS):
        rows = np.flatnonzero(shard == number)
        index = build_shard(data.vectors[rows], factory, THREADS, rows, faiss.clone_index(trained))
        shards.append(Shard(index, rows))
    searcher = Searcher(shards, threads=THREADS)
    on_built()
    searcher.effort = least_effort(searcher, data.tuning, data.tuning_exact, K, TARGET)
    return searcher
