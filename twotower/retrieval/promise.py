"""What a built index promises: how much of the exact top k it finds, and how fast. Runs without Ray."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.index.build import read_index
from twotower.index.choice import choose
from twotower.index.parts import Part, blocks
from twotower.index.recall import index_recall_at_k, least_effort
from twotower.index.search import Searcher, Shard, exact_top_k
from twotower.index.spec import efforts
from twotower.model.checkpoint import Checkpoint
from twotower.retrieval.encoding import real_queries
from twotower.retrieval.generation import read_shard_facts


def measure(
    config: Config,
    dataset: Dataset,
    checkpoint: Checkpoint,
    parts: list[Part],
    directory: Path,
    threads: int,
) -> dict[str, Any]:
    """Return the index facts of the manifest: the least effort that reaches the target, and its index recall.

    The effort is chosen on other queries than the recall is reported on.

    Args:
        config: for the index and the seed of the draw of queries.
        dataset: whose users ask.
        checkpoint: that encoded the parts, and encodes the queries.
        parts: of the whole catalogue, searched exactly.
        directory: with a folder for each shard.
        threads: of a search.
    """
    index = config.index
    dim = checkpoint.embedding_dim
    choice = choose(index, dataset.num_catalogue_items, dim)
    shards = []
    for path in sorted(directory.iterdir()):
        item_rows = np.load(path / "item_rows.npy")
        rows = read_shard_facts(path)["rows"]
        shards.append(Shard(read_index(path / "index.faiss", choice.factory, dim, rows), item_rows))
    searcher = Searcher(shards, threads=threads)
    k = min(index.recall_k, dataset.num_catalogue_items)

    choices = efforts(searcher.shards[0].index)
    wanted = index.num_recall_queries * (2 if len(choices) > 1 else 1)
    queries = real_queries(dataset, checkpoint, wanted, config.seed)
    # Twice k, so that items that tie with the k-th are among them.
    exact = exact_top_k(queries, 2 * k, blocks(parts))
    effort, start = choices[0], 0
    if len(choices) > 1:
        start = len(queries) // 2
        tuned = max(start, 1)
        effort = least_effort(searcher, queries[:tuned], exact[:tuned], k, index.target_index_recall)
    searcher.effort = effort
    recall = index_recall_at_k(searcher.search(queries[start:], k), exact[start:], k)
    times = []
    for query in queries[start:]:
        begin = time.perf_counter()
        searcher.search(query[None], k)
        times.append((time.perf_counter() - begin) * 1e3)
    return {
        "factory": choice.factory,
        "reason": choice.reason,
        "num_shards": len(shards),
        "effort": effort.to_json(),
        "index_recall": recall,
        "target_index_recall": index.target_index_recall,
        "recall_k": k,
        "num_queries": len(times),
        "search_ms": {"p50": float(np.median(times)), "p99": float(np.percentile(times, 99))},
    }


def describe(facts: dict[str, Any]) -> str:
    """Return the result of ``measure`` as one line."""
    enough = facts["index_recall"] >= facts["target_index_recall"]
    verdict = "" if enough else "; it can not be published without force"
    return (
        f"index recall@{facts['recall_k']} {facts['index_recall']:.4f} on {facts['num_queries']} queries "
        f"(target {facts['target_index_recall']}), {facts['search_ms']['p50']:.2f} ms a search{verdict}"
    )
