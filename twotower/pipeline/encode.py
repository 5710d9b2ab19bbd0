"""The whole catalogue through the item tower, part by part, by the workers of a runner.

A worker is given rows of a Parquet file; it reads them while it encodes and writes vectors to files, so that
nothing large passes through the driver. Parts are named by what they hold: those that an earlier run
wrote whole are not encoded again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from twotower.config import Config
from twotower.data.dataset import ITEM_ROW
from twotower.data.sources.tables import parquet_rows
from twotower.generations.encoding import encode_table
from twotower.index.build import check_vectors
from twotower.index.parts import Part, check_parts, load_vectors, remove_strays, write_part
from twotower.index.spec import shard_of
from twotower.lifecycle.catalogue import Catalogue
from twotower.model.checkpoint import Checkpoint
from twotower.pipeline.runner import Runner
from twotower.progress import bar
from twotower.training.ahead import made_ahead

__all__ = ["EncodeItems", "encode_catalogue", "load_vectors"]

_PARTS_PER_ENCODER = 4
_PART_ROWS = 131_072
"""Most items of a part: 64 MiB of vectors at 128 dimensions."""
_FEWEST_ROWS = 64


class EncodeItems:
    """Encodes rows of item files and writes the vectors; holds the model once. A worker of a runner."""

    def __init__(
        self,
        checkpoint: str,
        directory: str,
        columns: list[str],
        num_shards: int,
        batch_size: int,
        device: str,
        threads: int,
    ) -> None:
        """Load the model.

        Args:
            checkpoint: its directory.
            directory: where parts are written.
            columns: read from the files.
            num_shards: of the index.
            batch_size: items encoded at once.
            device: for the model.
            threads: CPU threads of torch.
        """
        torch.set_num_threads(threads)
        self._checkpoint = Checkpoint.open(checkpoint, device)
        self._directory = Path(directory)
        self._columns = columns
        self._num_shards = num_shards
        self._batch_size = batch_size
        self._device = device

    def __call__(self, work: pa.Table) -> pa.Table:
        """Write the part that the first row describes, and return how many items it has."""
        part = {name: work[name][0].as_py() for name in work.column_names}
        rows, ids, vectors = [], [], []
        read = parquet_rows(part["path"], part["start"], part["stop"], self._batch_size, self._columns)
        for table in made_ahead(read, depth=1):
            rows.append(table[ITEM_ROW].to_numpy())
            ids.append(table["item_id"].to_pylist())
            vectors.append(encode_table(self._checkpoint, table, self._device))
            check_vectors(vectors[-1])
        shards = shard_of([i for some in ids for i in some], self._num_shards)
        written = write_part(
            self._directory,
            np.concatenate(rows),
            shards,
            np.concatenate(vectors),
            self._num_shards,
            part["name"],
        )
        return pa.table({"items": [written.num_rows]})


def encode_catalogue(
    checkpoint_dir: Path,
    catalogue: Catalogue,
    out_dir: Path,
    config: Config,
    num_shards: int,
    runner: Runner,
    encoder: type[EncodeItems] = EncodeItems,
) -> list[Part]:
    """Encode all items of a catalogue into parts, each item row exactly once.

    Args:
        checkpoint_dir: its item tower encodes.
        catalogue: of the vocabulary that the checkpoint was trained on.
        out_dir: folder for the parts, created; all workers must reach it under this path. What it holds must
            be of the same checkpoint, catalogue and number of shards: whole parts are taken as they are.
        config: for batches, workers and what they reserve.
        num_shards: shards that the rows of a part are grouped by.
        runner: whose workers encode.
        encoder: class of the workers.

    Raises:
        ArtefactError: an item was not encoded, or more than once.
        ConfigError: a vector is zero or not finite.
    """
    out_dir = out_dir.absolute()
    out_dir.mkdir(parents=True, exist_ok=True)
    schema = Checkpoint.open(checkpoint_dir).schema
    present = catalogue.columns
    wanted = dict.fromkeys([ITEM_ROW, "item_id", *schema.item_columns])
    settings: dict[str, Any] = {
        "checkpoint": str(checkpoint_dir.absolute()),
        "directory": str(out_dir),
        "columns": [name for name in wanted if name in present],
        "num_shards": num_shards,
        "batch_size": config.cluster.encode_batch_size,
    }
    work = _work(catalogue, config)
    done = {part["name"]: Part.open(out_dir / str(part["name"])) for part in work}
    missing = [part for part in work if done[part["name"]] is None]
    with bar(catalogue.num_items, "encode", unit="items") as progress:
        progress.update(sum(part.num_rows for part in done.values() if part is not None))
        for fact in runner.work_through(encoder, settings, missing):
            progress.update(fact["items"])
    found = [Part.open(out_dir / str(part["name"])) for part in work]
    parts = [part for part in found if part is not None]
    remove_strays(out_dir, parts)
    check_parts(parts, catalogue.num_items, catalogue.held())
    return parts


def _work(catalogue: Catalogue, config: Config) -> list[dict[str, Any]]:
    """Return the rows of each part: a few parts for each worker, none too large."""
    fair = -(-catalogue.num_items // (_PARTS_PER_ENCODER * config.cluster.num_encoders))
    work: list[dict[str, Any]] = []
    for number, path in enumerate(catalogue.paths):
        footer = pq.read_metadata(path)
        step = min(max(fair, _FEWEST_ROWS), _PART_ROWS)
        if footer.num_rows:
            # Whole row groups, since a part reads those that it has rows of.
            group = footer.row_group(0).num_rows
            step = step if step < group else step // group * group
        for start in range(0, footer.num_rows, step):
            stop = min(start + step, footer.num_rows)
            name = f"{number:05d}-{start:010d}-{stop:010d}"
            work.append({"name": name, "path": path, "start": start, "stop": stop})
    return work
