"""The whole catalogue through the item tower, on a pool of Ray Data actors.

Actors write vectors to files and return only facts about them. A part counts when its facts arrive at the
driver, so that an attempt that failed after writing leaves nothing behind but a file that is removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch

from twotower import errors
from twotower.cluster.failures import plain_errors
from twotower.cluster.native_log import without_native_log
from twotower.cluster.pool import without_bars
from twotower.cluster.session import wants_gpu
from twotower.config import Config
from twotower.data.dataset import ITEM_ROW, Dataset
from twotower.errors import ArtefactError, TwotowerError
from twotower.index.build import check_vectors
from twotower.index.parts import Part, check_parts, load_vectors, remove_strays, write_part
from twotower.index.spec import shard_of
from twotower.model.checkpoint import Checkpoint
from twotower.progress import bar
from twotower.retrieval.encoding import encode_table, source_columns
from twotower.schema import FeatureSchema

__all__ = ["EncodeItems", "encode_catalogue", "load_vectors"]

_READ_BLOCKS_PER_ENCODER = 4


class EncodeItems:
    """Encodes tables of items and writes the vectors; holds the model once. An actor of Ray Data."""

    def __init__(self, checkpoint: str, directory: str, num_shards: int, device: str, threads: int) -> None:
        """Load the model.

        Args:
            checkpoint: its directory.
            directory: where parts are written.
            num_shards: of the index.
            device: for the model.
            threads: CPU threads of torch.
        """
        torch.set_num_threads(threads)
        self._checkpoint = Checkpoint.open(checkpoint, device)
        self._directory = Path(directory)
        self._num_shards = num_shards
        self._device = device

    def __call__(self, table: pa.Table) -> pa.Table:
        """Write the vectors of a table of items as one part; returns its path and the rows of each shard.

        What is wrong with the items comes back as a row too: Ray Data loses the cause of an exception on
        its way to the driver, and prints its trace.
        """
        try:
            part = self._write(table)
        except TwotowerError as error:
            return _facts("", [], type(error).__name__, str(error))
        return _facts(part.path, part.shard_rows, "", "")

    def _write(self, table: pa.Table) -> Part:
        rows = table[ITEM_ROW].to_numpy()
        vectors = encode_table(self._checkpoint, table, self._device)
        check_vectors(vectors)
        shards = shard_of(table["item_id"].to_pylist(), self._num_shards)
        return write_part(self._directory, rows, shards, vectors, self._num_shards)


def encode_catalogue(
    checkpoint_dir: Path,
    dataset: Dataset,
    out_dir: Path,
    config: Config,
    num_shards: int,
    encoder: type[EncodeItems] = EncodeItems,
) -> list[Part]:
    """Encode all catalogue items into parts, each item row exactly once. Ray must be initialised.

    Args:
        checkpoint_dir: its item tower encodes.
        dataset: whose catalogue; prepared with the checkpoint's vocabulary.
        out_dir: folder for the parts, created; all nodes must reach it under this path.
        config: for batches, actors and what they reserve.
        num_shards: shards that the rows of a part are grouped by.
        encoder: class of the actors.

    Raises:
        ArtefactError: an item was not encoded, or more than once.
        ConfigError: a vector is zero or not finite.
    """
    checkpoint = Checkpoint.open(checkpoint_dir)
    checkpoint.require_dataset(dataset)
    out_dir = out_dir.absolute()
    out_dir.mkdir(parents=True, exist_ok=True)
    cluster = config.cluster
    num_items = dataset.num_catalogue_items
    use_gpu = wants_gpu(config)
    size = cluster.num_encoders
    if use_gpu:
        size = max(1, min(size, int(ray.cluster_resources()["GPU"])))
    # More actors than batches would only load the model.
    size = max(1, min(size, -(-num_items // cluster.encode_batch_size)))
    settings: dict[str, Any] = {
        "checkpoint": str(checkpoint_dir.absolute()),
        "directory": str(out_dir),
        "num_shards": num_shards,
        "device": "cuda" if use_gpu else "cpu",
        "threads": max(1, int(cluster.cpus_per_encoder)),
    }
    parts: list[Part] = []
    with (
        without_bars(),
        plain_errors(),
        without_native_log(),
        bar(num_items, "encode", unit="items") as progress,
    ):
        items = ray.data.read_parquet(
            dataset.item_paths,
            num_cpus=cluster.cpus_per_reader,
            override_num_blocks=max(len(dataset.item_paths), size * _READ_BLOCKS_PER_ENCODER),
        ).select_columns(_needed_columns(dataset, checkpoint.schema))
        facts = items.map_batches(
            encoder,
            fn_constructor_kwargs=settings,
            batch_size=cluster.encode_batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=size),
            num_cpus=cluster.cpus_per_encoder,
            num_gpus=1 if use_gpu else None,
        )
        tables: Iterator[Any] = iter(
            facts.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        )
        for table in tables:
            for fact in table.to_pylist():
                if fact["error"]:
                    raise getattr(errors, fact["error"])(fact["message"])
                parts.append(Part(fact["path"], fact["shard_rows"]))
                progress.update(parts[-1].num_rows)
    remove_strays(out_dir, parts)
    check_parts(parts, num_items)
    return parts


def _facts(path: str, shard_rows: list[int], error: str, message: str) -> pa.Table:
    return pa.table(
        {
            "path": [path],
            "shard_rows": pa.array([shard_rows], pa.list_(pa.int64())),
            "error": [error],
            "message": [message],
        }
    )


def _needed_columns(dataset: Dataset, schema: FeatureSchema) -> list[str]:
    if not dataset.item_paths:
        raise ArtefactError(f"dataset {dataset.path} has no items; prepare it again")
    present = pq.read_schema(dataset.item_paths[0]).names
    wanted = dict.fromkeys([ITEM_ROW, "item_id", *source_columns(schema)])
    return [name for name in wanted if name in present]
