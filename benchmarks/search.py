"""Search: four shards tuned by the library against the best single FAISS index, filters, and merging.

``p50_over_best``: a single query for k = 100 on two threads over four shards of the kind that auto picks,
tuned to index recall 0.95 on other queries, over the fastest point of a sweep of unsharded FAISS indexes that
reaches that recall. ``filtered_over_best_strategy``: the strategy that the measured plan chooses over the
fastest of the three, each at the least effort that reaches 0.95, predicates evaluated anew each time, the
worst of four shares. ``merge_us``: merging eight lists of 100.
``batch_with_20k_seen_over_single``: queries of users who have had 20,000 items, in a batch of 16 over one by
one; ``delta_with_20k_seen_over_single`` and ``delta_batch_with_20k_seen_over_single``: one by one and in a
batch after an update of one item.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from benchmarks import measure
from benchmarks.seen import seen_ratios
from benchmarks.tuned import POINTS_PER_LIST, SHARDS, TARGET, THREADS, Data, K, tuned_shards, with_answers
from benchmarks.vectors import make
from twotower.config.service import IndexConfig
from twotower.index.allowed import Allowed
from twotower.index.attributes import Attributes
from twotower.index.choice import choose
from twotower.index.filter_measure import measure_filters
from twotower.index.filter_plan import SHARES
from twotower.index.hits import Hits, hits_of, merged
from twotower.index.recall import index_recall_at_k
from twotower.index.search import Searcher
from twotower.index.spec import Effort, ivf_of

FloatArray = npt.NDArray[np.float32]

DIM = 128
CATEGORIES = 1_000


@dataclass
class Point:
    """An unsharded index at one setting: it reaches the target on the queries that are reported on."""

    name: str
    search: Callable[[FloatArray], Any]
    threads: int
    recall: float
    p50_ms: float = float("inf")


def main() -> None:
    """Measure, print and write."""
    quick = measure.start(__doc__ or "", THREADS)
    faiss.omp_set_num_threads(THREADS)
    num_items, num_queries = (50_000, 512) if quick else (1_000_000, 2_048)
    vectors, queries = make(num_items, DIM, num_queries=num_queries)
    data = with_answers(vectors, queries)
    factory = choose(IndexConfig(), num_items, DIM).factory
    searcher = tuned_shards(data, factory)
    best, sweep = _sweep(data, quick)
    ours_ms, best_ms, ratio = _compare(searcher, best, data, rounds=4 if quick else 12)
    recall = index_recall_at_k(searcher.search(data.queries, K), data.exact, K)
    rows: list[list[object]] = [["what", "recall@100", "p50 ms", "setting"]]
    rows += [[p.name, f"{p.recall:.4f}", f"{p.p50_ms:.3f}", f"{p.threads} threads"] for p in sweep]
    rows.append([f"best: {best.name}", f"{best.recall:.4f}", f"{best_ms:.3f}", f"{best.threads} threads"])
    rows.append([f"{SHARDS} x {factory}", f"{recall:.4f}", f"{ours_ms:.3f}", f"{searcher.effort}"])
    rows.append(["batch of all queries", "", "", f"{_qps(searcher, data.queries):,.0f} queries/s"])
    seen, lines = seen_ratios(searcher, data, repeats=3 if quick else 9)
    rows += lines
    worst, filtered = _filtered(searcher, data, queries_per_share=24 if quick else 96)
    rows += filtered
    figures = {
        "p50_over_best": ratio,
        "filtered_over_best_strategy": worst,
        "merge_us": _merge_us(),
        **seen,
        "index_recall": recall,
        "search_p50_ms": ours_ms,
    }
    measure.finish("search", figures, rows, quick)


def _sweep(data: Data, quick: bool) -> tuple[Point, list[Point]]:
    """Return the fastest unsharded point that reaches the target, and the fastest of each kind."""
    points = []
    for name, index in _indexes(data, quick):
        found = list(_points(name, index, data))
        for point in found:
            point.p50_ms = _p50_ms(point, data.queries[:200])
        if found:
            points.append(min(found, key=lambda p: p.p50_ms))
    return min(points, key=lambda p: p.p50_ms), points


def _indexes(data: Data, quick: bool) -> Iterable[tuple[str, Any]]:
    """Build the kinds of the sweep, one after the other; lists of one number are trained once."""
    vectors = data.vectors
    flat = faiss.IndexFlatIP(DIM)
    flat.add(vectors)
    yield "Flat", flat
    for nlist in (256, 1024) if quick else (1024, 2048, 4096, 8192):
        codes: Any = faiss.index_factory(DIM, f"IVF{nlist},SQ8", faiss.METRIC_INNER_PRODUCT)
        sample = np.random.default_rng(1).permutation(len(vectors))[: POINTS_PER_LIST * nlist]
        codes.train(vectors[np.sort(sample)])
        whole: Any = faiss.IndexIVFFlat(codes.quantizer, DIM, nlist, faiss.METRIC_INNER_PRODUCT)
        whole.is_trained = True
        for name, index in ((f"IVF{nlist},SQ8", codes), (f"IVF{nlist},Flat", whole)):
            index.add(vectors)
            yield name, index
    factories = ["IVF1024,PQ64x4fs,RFlat"] if quick else ["IVF4096_HNSW32,SQ8", "IVF4096,PQ64x4fs,RFlat"]
    for factory in [*factories, "HNSW16,SQ8"]:
        index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
        sample = np.random.default_rng(1).permutation(len(vectors))[: POINTS_PER_LIST * 4096]
        index.train(vectors[np.sort(sample)])
        index.add(vectors)
        yield factory, index


def _points(name: str, index: Any, data: Data) -> Iterable[Point]:
    """Yield the settings of an index that reach the target with the least effort."""
    for factor in (4.0, 16.0) if "RFlat" in name else (1.0,):
        effort = _least(index, data, factor)
        if effort is None:
            continue
        inverted = ivf_of(index)
        for mode in (0, 1) if inverted is not None else (0,):
            for threads in (1, THREADS):
                label = f"{name} {_label(name, effort)} parallel_mode {mode}"
                yield Point(label, _searching(index, effort, mode), threads, _recall(index, data, effort))


def _label(name: str, effort: Effort) -> str:
    if name.startswith("HNSW"):
        return f"efSearch {effort.ef_search}"
    return "" if name == "Flat" else f"nprobe {effort.nprobe}"


def _least(index: Any, data: Data, factor: float) -> Effort | None:
    steps = sorted({round(1.08**i) for i in range(130)})
    inverted = ivf_of(index)
    if inverted is not None:
        choices = [Effort(nprobe=n, k_factor=factor) for n in steps if n <= inverted.nlist]
    elif isinstance(index, faiss.IndexHNSW):
        choices = [Effort(ef_search=n) for n in steps if 64 <= n <= 2048]
    else:
        return Effort()
    if _recall(index, data, choices[-1]) < TARGET:
        return None
    low, high = -1, len(choices) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if _recall(index, data, choices[middle]) >= TARGET:
            high = middle
        else:
            low = middle
    return choices[high]


def _recall(index: Any, data: Data, effort: Effort) -> float:
    inverted: Any = ivf_of(index)
    if inverted is not None:
        inverted.parallel_mode = 0
    scores, rows = index.search(data.queries, K, params=effort.parameters(index))
    return index_recall_at_k([Hits(r, s) for r, s in zip(rows, scores, strict=True)], data.exact, K)


def _searching(index: Any, effort: Effort, mode: int) -> Callable[[FloatArray], Any]:
    parameters = effort.parameters(index)
    inverted: Any = ivf_of(index)

    def search(query: FloatArray) -> Any:
        if inverted is not None:
            inverted.parallel_mode = mode
        return index.search(query, K, params=parameters)

    return search


def _p50_ms(point: Point, queries: FloatArray) -> float:
    faiss.omp_set_num_threads(point.threads)
    times = _times(point.search, queries)
    faiss.omp_set_num_threads(THREADS)
    return float(np.median(times[len(times) // 4 :])) * 1e3


def _times(search: Callable[[FloatArray], Any], queries: FloatArray) -> npt.NDArray[np.float64]:
    seconds = np.empty(len(queries))
    for number in range(len(queries)):
        query = queries[number : number + 1]
        start = time.perf_counter()
        search(query)
        seconds[number] = time.perf_counter() - start
    return seconds


def _compare(searcher: Searcher, best: Point, data: Data, rounds: int) -> tuple[float, float, float]:
    """Return (our p50, the best's p50, the median of the ratios of both in each round), in milliseconds."""
    queries = data.queries[:256]
    ours, theirs = [], []

    def mine(query: FloatArray) -> Any:
        return searcher.search(query, K)

    for turn in range(rounds):
        order = [(mine, THREADS, ours), (best.search, best.threads, theirs)]
        for search, threads, into in order if turn % 2 else order[::-1]:
            faiss.omp_set_num_threads(threads)
            into.append(float(np.median(_times(search, queries))) * 1e3)
    faiss.omp_set_num_threads(THREADS)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return float(np.median(ours)), float(np.median(theirs)), float(np.median(ratios))


def _qps(searcher: Searcher, queries: FloatArray) -> float:
    searcher.search(queries, K)
    start = time.perf_counter()
    searcher.search(queries, K)
    return len(queries) / (time.perf_counter() - start)


def _merge_us() -> float:
    rng = np.random.default_rng(0)
    scores = [np.sort(rng.random((1, K), dtype=np.float32))[:, ::-1] for _ in range(8)]
    item_rows = [rows[None] for rows in rng.permutation(8 * K).reshape(8, K).astype(np.int64)]
    seconds = []
    for _ in range(5_000):
        start = time.perf_counter()
        hits_of(merged(np.concatenate(scores, axis=1), np.concatenate(item_rows, axis=1), K))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)) * 1e6


def _filtered(searcher: Searcher, data: Data, queries_per_share: int) -> tuple[float, list[list[object]]]:
    """Return the worst ratio of the planned strategy over the fastest, and a line for each share."""
    rng = np.random.default_rng(3)
    attributes = _attributes(data, rng)
    searcher.plan = measure_filters(
        searcher, data.tuning[:128], data.blocks, K, TARGET, seed=0, draw=attributes.drawn
    )
    worst = 0.0
    rows: list[list[object]] = [["share", "planned", "recall@100", "p50 ms of each"]]
    for share in SHARES:
        cases = []
        for number in range(queries_per_share):
            query = data.queries[number : number + 1]
            predicate = _predicate(share, number, rng)
            cases.append((query, predicate, _exact_among(data, query, attributes.allowed(predicate))))
        settings: dict[str, Effort | None] = {"selector": None, "over_fetch": None, "gather": Effort()}
        for strategy in ("selector", "over_fetch"):
            if strategy == "selector" or share >= 0.05:
                settings[strategy] = _least_filtered(searcher, attributes, cases, strategy)
        runs: dict[str, list[tuple[float, float]]] = {}
        ways: list[tuple[str, Any, Effort | None]] = [("plan", None, None)]
        ways += [(name, name, effort) for name, effort in settings.items() if effort is not None]
        for case in cases:
            # In a new order each time: the first finds what the query reads out of the caches.
            for place in rng.permutation(len(ways)):
                name, strategy, effort = ways[place]
                # Gathering half of the items takes seconds: a few queries say so.
                if name == "gather" and share > 0.05 and len(runs.get("gather", [])) > 3:
                    continue
                run = _run(searcher, attributes, *case, strategy, effort)
                runs.setdefault(name, []).append(run)
        p50 = {
            name: float(np.median([seconds for seconds, _ in found])) * 1e3 for name, found in runs.items()
        }
        recall = float(np.mean([recall for _, recall in runs["plan"]]))
        fastest = min(ms for name, ms in p50.items() if name != "plan")
        worst = max(worst, p50["plan"] / fastest)
        chosen = searcher.plan.choose(int(share * len(data.vectors)), len(data.vectors), K)
        shown = ", ".join(f"{name} {ms:.3f}" for name, ms in p50.items())
        rows.append([share, chosen.strategy if chosen else "", f"{recall:.4f}", shown])
    return worst, rows


def _attributes(data: Data, rng: np.random.Generator) -> Attributes:
    """Three attributes: a category and a number by chance, and a number that leans to a direction."""
    count = len(data.vectors)
    lean = data.vectors @ data.vectors[0] + 0.3 * rng.standard_normal(count).astype(np.float32)
    table = pa.table(
        {
            "category": [f"c{n}" for n in rng.integers(0, CATEGORIES, count).tolist()],
            "number": rng.random(count),
            "lean": np.argsort(np.argsort(lean)) / count,
        }
    )
    return Attributes([(table, np.arange(count), [])], count, answer_bytes=0)


def _predicate(share: float, number: int, rng: np.random.Generator) -> dict[str, Any]:
    if number % 3 == 0:
        values = rng.choice(CATEGORIES, max(1, round(share * CATEGORIES)), replace=False)
        return {"category": {"any_of": [f"c{v}" for v in values.tolist()]}}
    start = float(rng.random() * (1 - share))
    return {("number", "lean")[number % 2]: {"gte": start, "lt": start + share}}


def _exact_among(data: Data, query: FloatArray, allowed: Allowed) -> Hits:
    rows = allowed.rows()
    scores = (data.vectors @ query[0])[rows]
    first = np.argsort(-scores)[: 2 * K]
    return Hits(rows[first], scores[first])


def _run(
    searcher: Searcher,
    attributes: Attributes,
    query: FloatArray,
    predicate: dict[str, Any],
    exact: Hits,
    strategy: Any,
    effort: Effort | None,
) -> tuple[float, float]:
    """Return (seconds, recall) of one filtered search, the predicate included."""
    start = time.perf_counter()
    allowed = attributes.allowed(predicate)
    found = searcher.search(query, K, None, effort, strategy is None, allowed, strategy)
    seconds = time.perf_counter() - start
    return seconds, index_recall_at_k(found, [exact], K)


def _least_filtered(
    searcher: Searcher, attributes: Attributes, cases: list[Any], strategy: str
) -> Effort | None:
    choices = searcher.efforts()

    def recall(effort: Effort) -> float:
        return float(np.mean([_run(searcher, attributes, *case, strategy, effort)[1] for case in cases]))

    if recall(choices[-1]) < TARGET:
        return None
    low, high = -1, len(choices) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if recall(choices[middle]) >= TARGET:
            high = middle
        else:
            low = middle
    return choices[high]


if __name__ == "__main__":
    main()
