"""What a built index reaches: how much of the exact top k it finds, and how fast. Runs without Ray.

Real queries, of users through the query tower, are parted in two: one half tunes the search, the other half
is reported on, so that the figures hold for queries that nobody tuned for.

Symbols: Q queries, K results.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.config import Config
from twotower.generations.encoding import real_queries
from twotower.generations.files import ATTRIBUTES, read_shard_facts
from twotower.generations.generation import Generation
from twotower.generations.items import mapped_table
from twotower.index.attributes import Attributes
from twotower.index.build import read_index
from twotower.index.choice import choose, finds_more
from twotower.index.filter_measure import measure_filters
from twotower.index.gpu import gpus
from twotower.index.hits import IntArray
from twotower.index.parts import Part, blocks
from twotower.index.recall import index_recall_at_k
from twotower.index.search import Searcher, Shard, exact_top_k
from twotower.index.spec import CAGRA, Effort
from twotower.index.tuning import curve, least_effort, search_times
from twotower.model.checkpoint import Checkpoint
from twotower.progress import say

_FILTER_QUERIES = 128
"""Queries that each strategy of searching among some of the items is measured with, at most."""
_LEAST_FILTER_QUERIES = 16


def measure(
    config: Config,
    tables: Generation,
    checkpoint: Checkpoint,
    parts: list[Part],
    directory: Path,
    threads: int,
) -> dict[str, Any]:
    """Return ``index`` of the manifest: the least effort that reaches the target, what it finds and takes.

    Searches are timed one by one with as many threads as the service has, and the plan of filtered searches
    is measured where attributes are declared.

    Args:
        config: for the index, the threads of the service and the seed of the draw of queries.
        tables: whose users ask; it needs no shards and no manifest yet.
        checkpoint: that encoded the parts, and encodes the queries.
        parts: of the whole catalogue, searched exactly.
        directory: with a folder for each shard.
        threads: of searches that are not timed.
    """
    index = config.index
    num_items = sum(part.num_rows for part in parts)
    choice = choose(index, num_items, checkpoint.embedding_dim)
    shards, memory_bytes = _open(directory, choice.factory, checkpoint.embedding_dim)
    searcher = Searcher(shards, threads=threads)
    k = min(index.recall_k, num_items)
    if k < index.recall_k:
        say(f"index recall is measured at {k}: the catalogue has no {index.recall_k} items (index.recall_k)")

    tunable = len(searcher.efforts()) > 1
    wanted = index.num_recall_queries * (2 if tunable or index.attributes else 1)
    queries = real_queries(tables, checkpoint, wanted, config.seed)
    if len(queries) < wanted:
        say(f"index recall is measured with the {len(queries)} users there are, not {wanted}")
    # Twice k, so that items that tie with the k-th are among them.
    exact = exact_top_k(queries, 2 * k, blocks(parts))
    # One query alone both tunes and is reported on.
    half = len(queries) // 2 if wanted > index.num_recall_queries else 0
    tuning, reporting = slice(0, max(half, 1)), slice(half, None)
    target = index.target_index_recall
    searchers = [searcher]
    if choice.factory == CAGRA and gpus():
        # A CPU walks the same graph in another way: what is measured must hold on both.
        searchers.append(Searcher(shards, threads=threads, on=()))
    if tunable:
        found = [least_effort(s, queries[tuning], exact[tuning], k, target) for s in searchers]
        searcher.effort = max(found, key=lambda effort: effort.ef_search)
    recall = min(
        index_recall_at_k(s.search(queries[reporting], k, effort=searcher.effort), exact[reporting], k)
        for s in searchers
    )

    searcher.threads = config.serve.threads
    points = curve(searcher, queries[reporting], exact[reporting], k, searcher.effort)
    times = search_times(searcher, queries[reporting], k, searcher.effort)
    filters = None
    asked = queries[tuning][:_FILTER_QUERIES]
    if index.attributes and len(asked) >= _LEAST_FILTER_QUERIES:
        attributes = Attributes(_attribute_tables(directory), searcher.num_rows)
        plan = measure_filters(
            searcher, asked, lambda: blocks(parts), k, target, config.seed, attributes.drawn
        )
        filters = plan.to_json()
    return {
        "factory": choice.factory,
        "reason": choice.reason,
        "num_shards": len(shards),
        "effort": searcher.effort.to_json(),
        "index_recall": recall,
        "target_index_recall": target,
        "recall_k": k,
        "num_queries": len(times),
        "num_tuning_queries": half if tunable else 0,
        "search_ms": {"p50": float(np.median(times)), "p99": float(np.percentile(times, 99))},
        "max_search_ms": index.max_search_ms,
        "search_threads": config.serve.threads,
        "memory_bytes": memory_bytes,
        "curve": [point.to_json() for point in points],
        "filters": filters,
    }


def describe(facts: dict[str, Any]) -> list[str]:
    """Return the result of ``measure`` as lines: recall, the measured curve, what would find more."""
    recall, target, limit = facts["index_recall"], facts["target_index_recall"], facts["max_search_ms"]
    lines = [
        f"index recall@{facts['recall_k']} {recall:.4f} on {facts['num_queries']} queries (target {target}), "
        f"{facts['search_ms']['p50']:.2f} ms a search (p99 {facts['search_ms']['p99']:.2f}), "
        f"{facts['memory_bytes'] / 1e6:,.1f} MB"
    ]
    lines += [f"  {line}" for line in curve_table(facts)]
    if recall < target:
        lines.append(f"below its target: it is not published without --force. {finds_more(facts['factory'])}")
    if limit is not None and facts["search_ms"]["p50"] > limit:
        lines.append(f"slower than index.max_search_ms ({limit}): it is not published without --force")
    return lines


def curve_table(facts: Mapping[str, Any]) -> list[str]:
    """Return the measured points of recall over effort as lines; none where there is only one.

    Args:
        facts: ``index`` of a manifest.
    """
    points = facts.get("curve") or []
    if len(points) < 2:
        return []
    # What an index does not have stays as it is.
    fixed = Effort().to_json()
    shown = [n for n in points[0]["effort"] if any(p["effort"][n] != fixed.get(n) for p in points)]
    lines = [f"{'effort':<28} {'recall':>6} {'p50 ms':>8}"]
    for point in points:
        effort = ", ".join(f"{name} {point['effort'][name]:g}" for name in shown)
        mark = "  <- chosen" if point["effort"] == facts["effort"] else ""
        lines.append(f"{effort:<28} {point['index_recall']:.4f} {point['search_ms']:8.3f}{mark}")
    return lines


def _attribute_tables(directory: Path) -> list[tuple[pa.Table, IntArray, IntArray]]:
    """Return the attributes and item rows of the shards in a folder, of which none is dead."""
    tables = []
    for path in sorted(directory.iterdir()):
        item_rows = np.load(path / "item_rows.npy")
        tables.append((mapped_table(path / ATTRIBUTES, len(item_rows)), item_rows, item_rows[:0]))
    return tables


def _open(directory: Path, factory: str, dim: int) -> tuple[list[Shard], int]:
    """Return the shards in a folder, and the bytes of their indexes."""
    shards, num_bytes = [], 0
    for path in sorted(directory.iterdir()):
        rows = read_shard_facts(path)["rows"]
        file = path / "index.faiss"
        shards.append(Shard(read_index(file, factory, dim, rows), np.load(path / "item_rows.npy")))
        num_bytes += file.stat().st_size
    return shards, num_bytes
