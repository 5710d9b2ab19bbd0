"""One shard of a generation on disk, and the measurement of all of them. Runs without Ray.

Symbols: N catalogue items, n items of a shard.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.config import AttributeConfig, Config
from twotower.data.attributes import attribute_columns
from twotower.data.dataset import ITEM_ROW, Dataset
from twotower.errors import ArtefactError
from twotower.index.build import (
    build_shard,
    check_item_rows,
    read_index,
    read_trained,
    train_index,
    write_index,
)
from twotower.index.choice import choose
from twotower.index.parts import Part, blocks, load_shard, save_array
from twotower.index.recall import index_recall_at_k, least_effort
from twotower.index.search import Searcher, Shard, exact_top_k
from twotower.index.spec import efforts, empty_index, ivf_of
from twotower.model.checkpoint import Checkpoint
from twotower.retrieval.encoding import real_queries
from twotower.retrieval.generation import read_shard_facts, write_items, write_shard_facts

_READ_ROWS = 65_536
_TRAIN_POINTS = 65_536
"""Vectors that train an index without inverted lists, and the least for one with them."""


def write_shard(
    parts: list[Part],
    number: int,
    factory: str,
    dataset_path: str,
    columns: list[str],
    attributes: dict[str, AttributeConfig],
    checkpoint_fingerprint: str,
    directory: str,
    threads: int,
    trained: str | None = None,
) -> int:
    """Build one shard's index and write it with its item rows and item table; returns its number of items.

    Args:
        parts: of the whole catalogue.
        number: of the shard.
        factory: FAISS factory string.
        dataset_path: directory of the dataset.
        columns: of the item table, beside the id; those that it does not have are passed over.
        attributes: that queries can filter by.
        checkpoint_fingerprint: of what encoded the parts.
        directory: of the shard, created.
        threads: FAISS threads.
        trained: file of an empty index that was trained for all shards; None trains this one alone.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    item_rows, vectors = load_shard(parts, number)
    check_item_rows(item_rows)
    shared = read_trained(Path(trained)) if trained is not None and len(vectors) else None
    write_index(build_shard(vectors, factory, threads, item_rows, shared), path / "index.faiss")
    save_array(path / "item_rows.npy", item_rows)
    items = shard_items(
        Dataset.open(dataset_path), item_rows, [*columns, *attribute_columns(attributes).values()]
    )
    write_items(path, items, attributes)
    write_shard_facts(path, len(item_rows), checkpoint_fingerprint, factory)
    return len(item_rows)


def train_shards(
    parts: list[Part], factory: str, points: int | None, seed: int, path: str, threads: int
) -> str | None:
    """Train what all shards share on vectors drawn over all parts, and write it; returns the path.

    Args:
        parts: of the whole catalogue.
        factory: FAISS factory string.
        points: vectors drawn; None takes 64 for each inverted list.
        seed: of the draw.
        path: of the file written.
        threads: FAISS threads.

    Returns:
        None for a factory that needs no training; nothing is written then.

    Raises:
        ConfigError: there are too few vectors.
    """
    dim = parts[0].vectors().shape[1]
    index = empty_index(factory, dim)
    if index.is_trained:
        return None
    ivf = ivf_of(index)
    total = sum(p.num_rows for p in parts)
    wanted = points or max(64 * (0 if ivf is None else ivf.nlist), _TRAIN_POINTS)
    drawn = np.sort(np.random.default_rng(seed).permutation(total)[:wanted])
    ends = np.cumsum([p.num_rows for p in parts])
    cuts = np.searchsorted(drawn, ends)
    pieces, begin = [], 0
    for part, end, cut in zip(parts, ends, cuts, strict=True):
        pieces.append(part.vectors()[drawn[begin:cut] - (end - part.num_rows)])
        begin = cut
    trained = train_index(np.concatenate(pieces), factory, threads)
    if trained is None:
        return None
    write_index(trained, Path(path))
    return path


def shard_items(dataset: Dataset, item_rows: npt.NDArray[np.int64], columns: list[str]) -> pa.Table:
    """Return the item table of a shard in the order of its ascending item rows, without reading the whole."""
    present = pq.read_schema(dataset.item_paths[0]).names
    wanted = [c for c in dict.fromkeys(["item_id", *columns]) if c in present and c != ITEM_ROW]
    pieces = []
    for path in dataset.item_paths:
        for batch in pq.ParquetFile(path).iter_batches(_READ_ROWS, columns=[ITEM_ROW, *wanted]):
            mine = np.isin(batch.column(ITEM_ROW).to_numpy(), item_rows)
            pieces.append(pa.Table.from_batches([batch]).filter(pa.array(mine)))
    table = pa.concat_tables(pieces).sort_by(ITEM_ROW)
    if not np.array_equal(table[ITEM_ROW].to_numpy(), item_rows):
        raise ArtefactError(f"the items of dataset {dataset.path} are not those encoded; prepare it again")
    return table.select(wanted)


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
