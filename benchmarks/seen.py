"""Queries of users who have had 20,000 items: in a batch, and after an update of one item; for ``search``."""

from __future__ import annotations

import dataclasses

import numpy as np

from benchmarks import measure
from benchmarks.tuned import Data, K
from twotower.index.build import build_shard
from twotower.index.search import Searcher, Shard

SEEN = 20_000
BATCH = 16


def seen_ratios(searcher: Searcher, data: Data, repeats: int) -> tuple[dict[str, float], list[list[object]]]:
    """Return figures over the same queries one by one, without an update, and a line for each way to ask.

    Args:
        searcher: over the vectors of ``data``; its rows are their places.
        data: vectors and queries.
        repeats: rounds.
    """
    rng = np.random.default_rng(5)
    seen = [np.sort(rng.choice(len(data.vectors), SEEN, replace=False)) for _ in range(BATCH)]
    queries = data.queries[:BATCH]
    changed = np.array([int(np.setdiff1d(np.arange(len(data.vectors)), np.concatenate(seen))[0])])
    # On one thread: the work is compared, not how well it is shared out.
    built = Searcher(searcher.shards, searcher.effort)
    updated = Searcher(
        [
            *(dataclasses.replace(shard, dead=changed) for shard in searcher.shards),
            Shard(build_shard(data.vectors[changed], "Flat"), changed),
        ],
        searcher.effort,
    )

    def one_by_one(asked: Searcher) -> None:
        for q in range(BATCH):
            asked.search(queries[q : q + 1], K, seen[q : q + 1])

    samples = measure.times(
        {
            "one by one": lambda: one_by_one(built),
            "a batch": lambda: built.search(queries, K, seen),
            "one by one, an item changed": lambda: one_by_one(updated),
            "a batch, an item changed": lambda: updated.search(queries, K, seen),
        },
        repeats,
    )
    alone, batch, delta, delta_batch = samples.values()
    figures = {
        "batch_with_20k_seen_over_single": batch.over(alone),
        "delta_with_20k_seen_over_single": delta.over(alone),
        "delta_batch_with_20k_seen_over_single": delta_batch.over(alone),
    }
    rows: list[list[object]] = [[f"{SEEN:,} seen, {BATCH} queries", "", "ms a query", ""]]
    rows += [[name, "", f"{s.median / BATCH * 1e3:.3f}", f"+- {s.spread:.0%}"] for name, s in samples.items()]
    return figures, rows
