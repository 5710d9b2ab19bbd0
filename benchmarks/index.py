"""Building: what four shards cost over one index, and whether sharding changes an answer.

``sharded_over_single_cpu``: CPU seconds, of all threads, from reading encoded parts to written files, of four
shards that share what is trained, over one index of the same factory. ``flat_shards_equal``: the share of
queries whose ids over four Flat shards are those of one Flat index, but for scores closer than 1e-6.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt

from benchmarks import measure
from benchmarks.vectors import FloatArray, make
from twotower.index.build import build_shard, read_trained, train_index, write_index
from twotower.index.hits import Hits
from twotower.index.parts import Part, load_shard, save_array, write_part
from twotower.index.recall import NEAR_TIE
from twotower.index.search import Searcher, Shard

DIM = 128
K = 100
THREADS = 2
SHARDS = 4
PARTS = 8
POINTS_PER_LIST = 64


def main() -> None:
    """Measure, print and write."""
    quick = measure.start(__doc__ or "", THREADS)
    num_items, nlist, repeats = (50_000, 256, 1) if quick else (1_000_000, 4_096, 3)
    factory = f"IVF{nlist},SQ8"
    vectors, queries = make(num_items, DIM, num_queries=256)
    ratios: list[float] = []
    rows: list[list[object]] = [["build", "CPU seconds", "wall seconds"]]
    with tempfile.TemporaryDirectory() as folder:
        parts = {n: _parts(Path(folder) / f"parts-{n}", vectors, n) for n in (1, SHARDS)}
        for turn in range(repeats):
            cpu = {}
            for number in (1, SHARDS) if turn % 2 else (SHARDS, 1):
                wall, before = time.perf_counter(), time.process_time()
                _build(parts[number], number, factory, nlist, Path(folder) / f"index-{turn}-{number}")
                cpu[number] = time.process_time() - before
                took = time.perf_counter() - wall
                rows.append([f"{number} x {factory}", f"{cpu[number]:.1f}", f"{took:.1f}"])
            ratios.append(cpu[SHARDS] / cpu[1])
    equal = _share_equal(vectors, queries)
    figures = {"sharded_over_single_cpu": statistics.median(ratios), "flat_shards_equal": equal}
    measure.finish("index", figures, rows, quick)


def _parts(folder: Path, vectors: FloatArray, num_shards: int) -> list[Part]:
    """Write the vectors as encoders do, in parts whose rows are grouped by shard."""
    folder.mkdir()
    shard = _shard_of(len(vectors), num_shards)
    return [
        write_part(folder, rows, shard[rows], vectors[rows], num_shards)
        for rows in np.array_split(np.arange(len(vectors)), PARTS)
    ]


def _build(parts: list[Part], num_shards: int, factory: str, nlist: int, folder: Path) -> None:
    """Train once, fill and write each shard: what the tasks of a build do, one after the other."""
    folder.mkdir()
    total = sum(part.num_rows for part in parts)
    drawn = np.sort(np.random.default_rng(0).permutation(total)[: POINTS_PER_LIST * nlist])
    ends = np.cumsum([part.num_rows for part in parts])
    pieces = [
        part.vectors()[drawn[(drawn >= end - part.num_rows) & (drawn < end)] - (end - part.num_rows)]
        for part, end in zip(parts, ends, strict=True)
    ]
    write_index(train_index(np.concatenate(pieces), factory, THREADS), folder / "trained.faiss")
    for number in range(num_shards):
        item_rows, vectors = load_shard(parts, number)
        trained = read_trained(folder / "trained.faiss")
        index = build_shard(vectors, factory, THREADS, item_rows, trained)
        write_index(index, folder / f"{number}.faiss")
        save_array(folder / f"{number}.npy", item_rows)


def _share_equal(vectors: FloatArray, queries: FloatArray) -> float:
    """Return the share of queries with the same ids over shards as over one index, near-ties apart."""
    shard = _shard_of(len(vectors), SHARDS)
    searcher = Searcher(
        [
            Shard(build_shard(vectors[rows], "Flat", THREADS), rows)
            for rows in (np.flatnonzero(shard == n) for n in range(SHARDS))
        ],
        threads=THREADS,
    )
    whole = faiss.IndexFlatIP(DIM)
    whole.add(vectors)
    faiss.omp_set_num_threads(THREADS)
    scores, labels = whole.search(queries, K + 50)
    return share_equal(searcher.search(queries, K), scores, labels, K)


def share_equal(found: Sequence[Hits], scores: FloatArray, labels: npt.NDArray[np.int64], k: int) -> float:
    """Return the share of queries whose hits are the exact ones, near-ties apart.

    Args:
        found: hits of each query.
        scores: of exact search, more than k of each query, best first.
        labels: their item rows.
        k: hits that there must be.
    """
    equal = 0
    for hits, theirs, ids in zip(found, scores, labels, strict=True):
        edge = theirs[k - 1]
        # Every id above the edge by more than rounding must come, and none from below it.
        must, may = set(ids[theirs > edge + NEAR_TIE]), set(ids[theirs >= edge - NEAR_TIE])
        mine = set(hits.item_rows)
        close = np.abs(hits.scores - theirs[:k]) <= NEAR_TIE if len(mine) == k else np.zeros(1)
        equal += bool(len(mine) == k and must <= mine <= may and close.all())
    return equal / len(found)


def _shard_of(count: int, num_shards: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, num_shards, count).astype(np.int32)


if __name__ == "__main__":
    main()
