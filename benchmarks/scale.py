"""Ten times as many items: search and build at 1M items over 100k, by the factory that auto picks at 1M.

``search_p50_10x``: p50 of a single query, k = 100, two threads, over four shards that are tuned to index
recall 0.95 at both sizes. ``build_10x``: seconds from vectors to shards in memory.
"""

from __future__ import annotations

import statistics
import time

import faiss

from benchmarks import measure
from benchmarks.tuned import SHARDS, THREADS, Data, K, tuned_shards, with_answers
from benchmarks.vectors import make
from twotower.config.service import IndexConfig
from twotower.index.choice import choose
from twotower.index.recall import index_recall_at_k
from twotower.index.search import Searcher

DIM = 128
TIMED = 256


def main() -> None:
    """Measure, print and write."""
    quick = measure.start(__doc__ or "", THREADS)
    faiss.omp_set_num_threads(THREADS)
    sizes = (20_000, 200_000) if quick else (100_000, 1_000_000)
    factory = choose(IndexConfig(), sizes[1], DIM).factory
    built = {size: _built(size, factory) for size in sizes}
    rounds: dict[int, list[float]] = {size: [] for size in sizes}
    for turn in range(4 if quick else 16):
        for size in sizes if turn % 2 else sizes[::-1]:
            data, searcher, _ = built[size]
            rounds[size].append(_p50_ms(searcher, data))
    small, large = sizes
    recalls = {
        size: index_recall_at_k(searcher.search(data.queries, K), data.exact, K)
        for size, (data, searcher, _) in built.items()
    }
    rows: list[list[object]] = [["items", "index", "recall@100", "p50 ms", "build s", "effort"]]
    for size, (_, searcher, seconds) in built.items():
        p50 = f"{statistics.median(rounds[size]):.3f}"
        name = f"{SHARDS} x {factory}"
        rows.append([f"{size:,}", name, f"{recalls[size]:.4f}", p50, f"{seconds:.1f}", searcher.effort])
    figures = {
        "search_p50_10x": statistics.median(b / a for a, b in zip(rounds[small], rounds[large], strict=True)),
        "build_10x": built[large][2] / built[small][2],
        "index_recall_small": recalls[small],
        "index_recall_large": recalls[large],
    }
    measure.finish("scale", figures, rows, quick)


def _built(size: int, factory: str) -> tuple[Data, Searcher, float]:
    """Return the data of a size, tuned shards over it, and the seconds that building took, tuning apart."""
    data = with_answers(*make(size, DIM, num_queries=1_024))
    begin = time.perf_counter()
    built: list[float] = []
    searcher = tuned_shards(data, factory, on_built=lambda: built.append(time.perf_counter() - begin))
    return data, searcher, built[0]


def _p50_ms(searcher: Searcher, data: Data) -> float:
    seconds = []
    for number in range(TIMED):
        query = data.queries[number : number + 1]
        begin = time.perf_counter()
        searcher.search(query, K)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds) * 1e3


if __name__ == "__main__":
    main()
