"""Search and building on GPUs against the CPU.

Exact search over 10M vectors: ``flat_equal`` is the share of queries whose answers on the GPU are the CPU's,
near-ties apart, ``p50_ms`` the median of a single query for k = 100. ``build_over_cpu``: wall seconds, from
vectors to written files, of four shards of the kind that auto picks at 1M, with a GPU over without, with all
threads of the machine. ``qps_N``: single queries a second of N threads over one searcher, ``threads_equal``
the share of their answers that one thread gets too. ``filters_equal``: the same for searches among 50 % to
0.1 % of the items, the worst of all strategies. ``cagra_*``: a graph built on the GPU, tuned to index recall
0.95, searched on the GPU and on the CPU.

Needs a GPU and the GPU build of FAISS; without them it says so and measures nothing.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from benchmarks import measure
from benchmarks.index import share_equal
from benchmarks.vectors import FloatArray, make
from twotower.config.service import IndexConfig
from twotower.index.allowed import Allowed
from twotower.index.build import build_shard, train_index, write_index
from twotower.index.choice import choose
from twotower.index.filter_plan import SHARES
from twotower.index.gpu import Gpu, gpus
from twotower.index.recall import index_recall_at_k
from twotower.index.search import Searcher, Shard, exact_top_k
from twotower.index.spec import CAGRA, Effort, ivf_of
from twotower.index.tuning import least_effort, search_times

DIM = 128
K = 100
TARGET = 0.95
SHARDS = 4
POINTS_PER_LIST = 64
THREADS = (1, 4, 8)
STRATEGIES = ("gather", "selector", "over_fetch")

Table = list[list[object]]


def main() -> None:
    """Measure where there is a GPU."""
    cpus = os.cpu_count() or 1
    quick = measure.start(__doc__ or "", cpus)
    if not gpus():
        print("benchmarks.gpu_search: no GPU that FAISS can use, nothing measured", file=sys.stderr)
        return
    faiss.omp_set_num_threads(cpus)
    large, middle = (200_000, 50_000) if quick else (10_000_000, 1_000_000)
    figures, table = measured(large, middle, gpus(), cpus, 1 if quick else 3)
    measure.finish("gpu_search", figures, table, quick)


def measured(
    large: int, middle: int, on: Sequence[Gpu], cpus: int, repeats: int
) -> tuple[dict[str, float], Table]:
    """Return the figures and the table.

    Args:
        large: vectors that are searched exactly.
        middle: vectors that are built, filtered and searched by threads.
        on: GPUs.
        cpus: FAISS threads.
        repeats: of each build.
    """
    figures: dict[str, float] = {}
    table: Table = [["what", "GPU", "CPU"]]
    vectors, queries = make(large, DIM, num_queries=256)
    figures |= _flat(vectors, queries, on, cpus, table)
    del vectors
    vectors, queries = make(middle, DIM, num_queries=512)
    figures |= _builds(vectors, on, cpus, repeats, table)
    searcher = Searcher(_flat_shards(vectors, SHARDS), on=on, threads=1)
    figures |= _threads(searcher, queries, table)
    figures |= _filters(searcher, vectors, queries[:32], table)
    figures |= _cagra(vectors, queries, on, cpus, table)
    return figures, table


def _flat_shards(vectors: FloatArray, number: int) -> list[Shard]:
    rows = np.array_split(np.arange(len(vectors)), number)
    return [Shard(build_shard(vectors[r[0] : r[-1] + 1], "Flat"), r) for r in rows]


def _flat(
    vectors: FloatArray, queries: FloatArray, on: Sequence[Gpu], cpus: int, table: Table
) -> dict[str, float]:
    shards = _flat_shards(vectors, len(on))
    theirs, ours = Searcher(shards, on=(), threads=cpus), Searcher(shards, on=on, threads=cpus)
    # Exact hits by another way than the searcher's.
    whole = faiss.IndexFlatIP(DIM)
    whole.add(vectors)
    faiss.omp_set_num_threads(cpus)
    scores, labels = whole.search(queries, K + 50)
    del whole
    equal = share_equal(ours.search(queries, K), scores, labels, K)
    singly = [ours.search(query[None], K)[0] for query in queries]
    equal = min(equal, share_equal(singly, scores, labels, K))
    p50 = float(np.median(search_times(ours, queries, K, Effort())))
    cpu = float(np.median(search_times(theirs, queries[:16], K, Effort())))
    table.append([f"Flat, {len(vectors):,} x {DIM}, one query, ms", f"{p50:.2f}", f"{cpu:.2f}"])
    return {"flat_equal": equal, "p50_ms": p50, "cpu_p50_ms": cpu}


def _builds(
    vectors: FloatArray, on: Sequence[Gpu], cpus: int, repeats: int, table: Table
) -> dict[str, float]:
    factory = choose(IndexConfig(), len(vectors), DIM).factory
    with tempfile.TemporaryDirectory() as folder:
        samples = measure.times(
            {
                "gpu": lambda: _build(vectors, factory, cpus, Path(folder), on),
                "cpu": lambda: _build(vectors, factory, cpus, Path(folder), [None]),
            },
            repeats,
        )
    label = f"{SHARDS} shards, {len(vectors):,} x {DIM}, {factory}"
    table.append([label, str(samples["gpu"]), str(samples["cpu"])])
    return {"build_over_cpu": samples["gpu"].over(samples["cpu"])}


def _build(
    vectors: FloatArray, factory: str, cpus: int, folder: Path, on: Sequence[Gpu | None]
) -> list[Shard]:
    """Train once, fill and write each shard: what the tasks of a build do, one after the other."""
    inverted = ivf_of(faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT))
    points = POINTS_PER_LIST * (1 if inverted is None else int(inverted.nlist))
    drawn = np.sort(np.random.default_rng(0).permutation(len(vectors))[:points])
    trained = train_index(vectors[drawn], factory, cpus, on[0])
    shards = []
    for number, rows in enumerate(np.array_split(np.arange(len(vectors)), SHARDS)):
        own = None if trained is None else faiss.clone_index(trained)
        gpu = on[number % len(on)]
        index = build_shard(vectors[rows[0] : rows[-1] + 1], factory, cpus, rows, own, gpu)
        write_index(index, folder / f"{number}.faiss")
        shards.append(Shard(index, rows))
    return shards


def _threads(searcher: Searcher, queries: FloatArray, table: Table) -> dict[str, float]:
    def one(query: FloatArray) -> npt.NDArray[np.int64]:
        return searcher.search(query[None], K)[0].item_rows

    alone = [one(query) for query in queries]
    figures, equal = {}, 1.0
    for number in THREADS:
        with ThreadPoolExecutor(number) as pool:
            list(pool.map(one, queries[:number]))
            begin = time.perf_counter()
            found = list(pool.map(one, queries))
            figures[f"qps_{number}"] = len(queries) / (time.perf_counter() - begin)
        same = [np.array_equal(a, b) for a, b in zip(alone, found, strict=True)]
        equal = min(equal, float(np.mean(same)))
        label = f"single queries a second, {SHARDS} Flat shards, {number} threads"
        table.append([label, f"{figures[f'qps_{number}']:,.0f}", ""])
    return {**figures, "threads_equal": equal}


def _filters(searcher: Searcher, vectors: FloatArray, queries: FloatArray, table: Table) -> dict[str, float]:
    rng = np.random.default_rng(1)
    equal = 1.0
    for share in SHARES:
        mask = rng.random(len(vectors)) < share
        allowed = Allowed.of_mask(mask)
        rows = np.flatnonzero(mask)
        if len(rows) < K + 50:
            continue
        exact = exact_top_k(queries, K + 50, [(rows, vectors[rows])])
        scores, labels = np.stack([h.scores for h in exact]), np.stack([h.item_rows for h in exact])
        for strategy in STRATEGIES:
            search = _among(searcher, allowed, strategy)
            search(queries[0])
            found, times = [], []
            for query in queries:
                begin = time.perf_counter()
                found.append(search(query))
                times.append(time.perf_counter() - begin)
            equal = min(equal, share_equal(found, scores, labels, K))
            label = f"among {share:.1%}, {strategy}, ms"
            table.append([label, f"{float(np.median(times)) * 1e3:.2f}", ""])
    return {"filters_equal": equal}


def _among(searcher: Searcher, allowed: Allowed, strategy: Any) -> Callable[[FloatArray], Any]:
    return lambda query: searcher.search(query[None], K, allowed=allowed, strategy=strategy)[0]


def _cagra(
    vectors: FloatArray, queries: FloatArray, on: Sequence[Gpu], cpus: int, table: Table
) -> dict[str, float]:
    if not hasattr(faiss, "GpuIndexCagra"):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        shards = _build(vectors, CAGRA, cpus, Path(folder), on)
        built = time.perf_counter() - begin
    exact = exact_top_k(queries, 2 * K, _blocks(vectors))
    half = len(queries) // 2
    figures: dict[str, float] = {"cagra_build_s": built}
    cells = []
    for name, where in (("gpu", on), ("cpu", ())):
        searcher = Searcher(shards, on=where, threads=cpus)
        searcher.effort = least_effort(searcher, queries[:half], exact[:half], K, TARGET)
        recall = index_recall_at_k(searcher.search(queries[half:], K), exact[half:], K)
        p50 = float(np.median(search_times(searcher, queries[half:], K, searcher.effort)))
        figures |= {f"cagra_{name}_recall": recall, f"cagra_{name}_p50_ms": p50}
        cells.append(f"{p50:.2f} at recall {recall:.3f}, effort {searcher.effort.ef_search}")
    table.append([f"CAGRA, {SHARDS} shards, built in {built:.1f} s, one query, ms", *cells])
    return figures


def _blocks(vectors: FloatArray) -> Iterable[tuple[npt.NDArray[np.int64], FloatArray]]:
    for start in range(0, len(vectors), 32_768):
        block = vectors[start : start + 32_768]
        yield np.arange(start, start + len(block)), block


if __name__ == "__main__":
    main()
