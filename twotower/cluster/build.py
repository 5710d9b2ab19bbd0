"""A checkpoint and a dataset to a generation: encode, build each shard on Ray, measure, write.

Workers write into a work folder of this run alone; the driver moves what is complete. A killed build leaves
work folders and an unfinished directory, which the next build of the same generation removes.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from twotower.artefacts import building, fingerprint, has_manifest, locked
from twotower.cluster.encode import encode_catalogue, source_columns
from twotower.cluster.failures import plain_errors
from twotower.cluster.session import session
from twotower.config import Config
from twotower.data.dataset import ITEM_ROW, Dataset
from twotower.data.histories import Histories
from twotower.errors import ArtefactError
from twotower.index.build import build_shard, check_item_rows, read_index, write_index
from twotower.index.parts import Part, blocks, load_shard, save_array
from twotower.index.recall import index_recall_at_k, least_effort
from twotower.index.search import Searcher, Shard, exact_top_k
from twotower.index.spec import efforts, empty_index
from twotower.model.checkpoint import Checkpoint
from twotower.model.features import QueryFeatures, encode_columns, profile_values
from twotower.progress import bar, say
from twotower.retrieval.generation import (
    finish,
    read_shard_facts,
    write_item_table,
    write_shard_facts,
    write_tables,
)
from twotower.retrieval.store import Store

_VERSION = 1
"""Changes whenever the same inputs give another generation."""

_READ_ROWS = 65_536
_QUERY_BATCH = 1_024


def generation_id(config: Config, dataset: Dataset, checkpoint: Checkpoint) -> str:
    """Return the name of the generation of these inputs: the same inputs, the same name."""
    return fingerprint(
        {
            "dataset": dataset.fingerprint,
            "checkpoint": checkpoint.fingerprint,
            "index": config.index.model_dump(mode="json"),
            "seed": config.seed,
            "version": _VERSION,
        }
    )


def build_generation(config: Config, dataset: Dataset, checkpoint_dir: Path) -> Path:
    """Build the generation of a checkpoint over a dataset's catalogue and return its directory.

    Args:
        config: the configuration.
        dataset: catalogue, users and all their interactions; all nodes must reach its directory.
        checkpoint_dir: trained on the dataset's vocabulary; all nodes must reach it.

    Returns:
        ``config.store / "generations" / ID``. It is not published. The same inputs are built once.

    Raises:
        ConfigError: ``index.factory`` can not hold this catalogue.
        ArtefactMismatchError: the checkpoint is of another vocabulary.
        ArtefactError: encoding or building lost an item.
    """
    checkpoint = Checkpoint.open(checkpoint_dir)
    checkpoint.require_dataset(dataset)
    empty_index(config.index.factory, checkpoint.embedding_dim)
    name = generation_id(config, dataset, checkpoint)
    directory = Store(config.store).path(name)
    with locked(config.store / ".work" / f"{name}.lock"):
        # A finished generation may be in use: it is never replaced.
        if has_manifest(directory):
            say(f"generation {name} is there already")
            return directory
        with building(directory) as partial, _work_folder(config.store, name) as work, session(config):
            parts = encode_catalogue(checkpoint_dir, dataset, work / "parts", config, config.index.num_shards)
            build_shards(config, dataset, checkpoint, parts, work / "shards")
            say("users and tables")
            write_tables(partial, config, dataset, checkpoint)
            facts = measure(config, dataset, checkpoint, parts, work / "shards")
            os.replace(work / "shards", partial / "shards")
            created = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
            finish(partial, name, created, dataset, checkpoint, facts)
    say(f"generation {name}: {dataset.num_catalogue_items:,} items in {config.index.num_shards} shards")
    return directory


def build_shards(
    config: Config, dataset: Dataset, checkpoint: Checkpoint, parts: list[Part], directory: Path
) -> None:
    """Build and write every shard, one Ray task each.

    Args:
        config: for the index and what a task reserves.
        dataset: for the item tables.
        checkpoint: that encoded the parts.
        parts: of the whole catalogue.
        directory: gets a folder for each shard; all nodes must reach it under this path.

    Raises:
        ConfigError: the index can not be built from a shard.
        ArtefactError: the shards do not hold as many items as the catalogue.
    """
    num_shards = config.index.num_shards
    cpus = config.cluster.cpus_per_encoder
    task = ray.remote(num_cpus=cpus)(write_shard)
    pending = [
        task.remote(
            parts,
            number,
            config.index.factory,
            str(dataset.path.absolute()),
            ["title", *source_columns(checkpoint.schema)],
            checkpoint.fingerprint,
            str(directory.absolute() / f"{number:05d}"),
            max(1, int(cpus)),
        )
        for number in range(num_shards)
    ]
    rows = 0
    with plain_errors(), bar(num_shards, "index", unit="shards") as progress:
        while pending:
            done, pending = ray.wait(pending)
            rows += sum(ray.get(done))
            progress.update(len(done))
    if rows != dataset.num_catalogue_items:
        raise ArtefactError(
            f"the shards hold {rows} items, the catalogue has {dataset.num_catalogue_items}; build again"
        )


def write_shard(
    parts: list[Part],
    number: int,
    factory: str,
    dataset_path: str,
    columns: list[str],
    checkpoint_fingerprint: str,
    directory: str,
    threads: int,
) -> int:
    """Build one shard's index and write it with its item rows and item table; returns its number of items.

    Args:
        parts: of the whole catalogue.
        number: of the shard.
        factory: FAISS factory string.
        dataset_path: directory of the dataset.
        columns: of the item table, beside the id; those that it does not have are passed over.
        checkpoint_fingerprint: of what encoded the parts.
        directory: of the shard, created.
        threads: FAISS threads.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    item_rows, vectors = load_shard(parts, number)
    check_item_rows(item_rows)
    write_index(build_shard(vectors, factory, threads), path / "index.faiss")
    save_array(path / "item_rows.npy", item_rows)
    write_item_table(path / "items.arrow", shard_items(Dataset.open(dataset_path), item_rows, columns))
    write_shard_facts(path, len(item_rows), checkpoint_fingerprint)
    return len(item_rows)


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
        raise ArtefactError(
            f"the items of dataset {dataset.path} are not those that were encoded; prepare it again"
        )
    return table.select(wanted)


def measure(
    config: Config, dataset: Dataset, checkpoint: Checkpoint, parts: list[Part], directory: Path
) -> dict[str, Any]:
    """Return the index facts of the manifest: the least effort that reaches the target, and its index recall.

    The effort is chosen on other queries than the recall is reported on.
    """
    index = config.index
    dim = checkpoint.embedding_dim
    shards = []
    for path in sorted(directory.iterdir()):
        item_rows = np.load(path / "item_rows.npy")
        rows = read_shard_facts(path)["rows"]
        shards.append(Shard(read_index(path / "index.faiss", index.factory, dim, rows), item_rows))
    searcher = Searcher(shards, threads=max(1, int(config.cluster.cpus_per_encoder)))
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
    below = "" if recall >= index.target_index_recall else ": it can not be published without force"
    say(
        f"index recall@{k} {recall:.4f} of {len(times)} real queries (target {index.target_index_recall}){below}; "
        f"one search takes {np.median(times):.2f} ms"
    )
    return {
        "factory": index.factory,
        "num_shards": len(shards),
        "effort": effort.to_json(),
        "index_recall": recall,
        "target_index_recall": index.target_index_recall,
        "recall_k": k,
        "num_queries": len(times),
        "search_ms": {"p50": float(np.median(times)), "p99": float(np.percentile(times, 99))},
    }


def real_queries(dataset: Dataset, checkpoint: Checkpoint, count: int, seed: int) -> npt.NDArray[np.float32]:
    """Return the query embeddings of users drawn from those with a history, as of now, [Q, D] float32.

    Args:
        dataset: whose users, with all their interactions.
        checkpoint: its query tower encodes.
        count: the most users drawn.
        seed: of the draw.
    """
    schema = checkpoint.schema
    histories = Histories.of(dataset.interactions, capped=max(schema.max_history, 1))
    users = np.flatnonzero(np.diff(histories.offsets))
    if len(users) == 0:
        users = np.arange(dataset.num_users)
    users = np.random.default_rng(seed).permutation(users)[:count]
    columns = encode_columns(schema.query, dataset.user_table())
    features = QueryFeatures(
        schema, profile_values(schema, encode_columns(schema.item, dataset.item_table()))
    )
    vectors = []
    for start in range(0, len(users), _QUERY_BATCH):
        rows = users[start : start + _QUERY_BATCH]
        past = histories.before(rows, None, schema.max_history)
        batch = features(rows, {name: column[rows] for name, column in columns.items()}, *past)
        vectors.append(checkpoint.model.encode_queries(batch).numpy())
    return np.concatenate(vectors)


@contextlib.contextmanager
def _work_folder(store: Path, name: str) -> Iterator[Path]:
    """Yield a folder of this run; those of killed runs are removed."""
    parent = (store / ".work").absolute()
    for left in parent.glob(f"{name}-*"):
        # A worker of the killed run may be writing still.
        shutil.rmtree(left, ignore_errors=True)
    folder = parent / f"{name}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
