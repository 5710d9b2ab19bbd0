"""Encoding: the catalogue through Ray Data, files to files, over a bare torch loop.

``ray_over_bare``: rows/s of ``pipeline.encode`` on Ray with one actor over a plain loop in this process with
the same batch, features, tower and one thread; the cluster is up, all else counts: starting the actor,
loading the model, grouping by shard, flushing to disk. ``two_over_two``: two actors over two such loops that
run at the same time and share nothing, each on half of the files.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks import measure
from twotower.cluster.native_log import without_native_log
from twotower.cluster.runner import OnRay
from twotower.cluster.session import session
from twotower.config import Config, parse_config
from twotower.data.dataset import ITEM_ROW, Dataset
from twotower.data.prepare import prepare
from twotower.index.parts import save_array
from twotower.lifecycle.catalogue import Catalogue
from twotower.model.checkpoint import Checkpoint, weights_of, write_checkpoint
from twotower.model.features import encode_columns, item_batch
from twotower.model.towers import TwoTower
from twotower.pipeline.encode import encode_catalogue

DIM = 128
BATCH = 8_192
SHARDS = 4
FILES = 8
FITTED = 20_000
"""Items that features are fitted on; the files repeat them, with rows and ids of their own."""


def configuration(root: str, encoders: int) -> Config:
    """Return towers with id, text and category features."""
    return parse_config(
        {
            "storage": {"root": root},
            "data": {
                "source": {
                    "kind": "generated",
                    "num_users": 2_000,
                    "num_items": FITTED,
                    "num_interactions": 50_000,
                }
            },
            "features": {
                "query": [{"name": "history", "type": "history", "dim": DIM}],
                "item": [
                    {"name": "item_id", "type": "id", "dim": DIM},
                    {"name": "genres", "type": "multi_hot", "dim": 16},
                    {"name": "title", "type": "text", "dim": 32},
                    {"name": "year", "type": "categorical", "dim": 8},
                ],
            },
            "model": {"embedding_dim": DIM, "item_tower": {"hidden": [256]}, "query_tower": {"hidden": []}},
            "cluster": {"num_encoders": encoders, "cpus_per_encoder": 1.0, "encode_batch_size": BATCH},
        }
    )


def main() -> None:
    """Measure, print and write."""
    quick = measure.start(__doc__ or "", threads=1)
    num_items, repeats = (100_000, 1) if quick else (4_000_000, 3)
    rows: list[list[object]] = [["what", "rows/s", "seconds"]]
    ratios: dict[str, list[float]] = {"ray_over_bare": [], "two_over_two": []}
    with tempfile.TemporaryDirectory() as root:
        config = configuration(root, 1)
        dataset = prepare(config)
        checkpoint = _checkpoint(config, dataset, Path(root) / "checkpoint")
        catalogue = _catalogue(dataset, Path(root), num_items)
        with without_native_log(), session(config):
            for turn in range(repeats):
                for key, workers in (("ray_over_bare", 1), ("two_over_two", 2)):
                    if workers == 2 and turn:
                        continue
                    seconds = {}
                    for name in ("bare", "ray") if turn % 2 else ("ray", "bare"):
                        out = Path(root) / f"{key}-{name}-{turn}"
                        begin = time.perf_counter()
                        if name == "ray":
                            config = configuration(root, workers)
                            encode_catalogue(checkpoint.path, catalogue, out, config, SHARDS, OnRay(config))
                        else:
                            _bare_loops(checkpoint.path, catalogue.paths, out, workers)
                        seconds[name] = time.perf_counter() - begin
                        rate = f"{num_items / seconds[name]:,.0f}"
                        rows.append([f"{workers} x {name}", rate, f"{seconds[name]:.1f}"])
                    ratios[key].append(seconds["bare"] / seconds["ray"])
    figures = {key: float(np.median(values)) for key, values in ratios.items()}
    measure.finish("encode", figures, rows, quick)


def _checkpoint(config: Config, dataset: Dataset, directory: Path) -> Checkpoint:
    """Write towers as the seed makes them: what they learn makes no difference to their speed."""
    directory.mkdir()
    model = TwoTower(dataset.schema, config.model, config.train.loss.temperature, config.seed)
    write_checkpoint(directory, weights_of(model), dataset, config, {})
    return Checkpoint.open(directory)


def _catalogue(dataset: Dataset, root: Path, num_items: int) -> Catalogue:
    table = dataset.item_table()
    paths = []
    for number, rows in enumerate(np.array_split(np.arange(num_items), FILES)):
        some = table.take(pa.array(rows % FITTED))
        ids = pa.array([f"i{row}" for row in rows.tolist()])
        some = some.set_column(some.column_names.index("item_id"), "item_id", ids)
        paths.append(str(root / f"items-{number}.parquet"))
        pq.write_table(some.append_column(ITEM_ROW, pa.array(rows)), paths[-1], row_group_size=65_536)
    return Catalogue(tuple(paths), num_items, num_items)


def _bare_loops(checkpoint: Path, paths: tuple[str, ...], out: Path, workers: int) -> None:
    """Run the loop here, or in processes that share nothing."""
    out.mkdir()
    if workers == 1:
        _bare_loop(str(checkpoint), list(paths), str(out))
        return
    context = multiprocessing.get_context("spawn")
    shares = [list(paths[n::workers]) for n in range(workers)]
    processes = [
        context.Process(target=_bare_loop, args=(str(checkpoint), share, str(out))) for share in shares
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a bare loop ended with {process.exitcode}")


def _bare_loop(directory: str, paths: list[str], out: str) -> None:
    """Encode files in this process: read, features, tower, write."""
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(directory)
    schema = checkpoint.schema
    columns = [ITEM_ROW, "item_id", *schema.item_columns]
    for path in paths:
        vectors: list[Any] = []
        rows: list[Any] = []
        for batch in pq.ParquetFile(path).iter_batches(BATCH, columns=columns):
            table = pa.Table.from_batches([batch])
            item_rows = table[ITEM_ROW].to_numpy()
            known = np.where(item_rows < schema.num_items, item_rows, -1)
            features = item_batch(schema, known, encode_columns(schema.item, table))
            vectors.append(checkpoint.model.encode_items(features).numpy())
            rows.append(item_rows)
        name = Path(path).stem
        save_array(Path(out) / f"{name}.vectors.npy", np.concatenate(vectors))
        save_array(Path(out) / f"{name}.rows.npy", np.concatenate(rows))


if __name__ == "__main__":
    main()
