"""How interactions reach training workers: all in the memory of each, or streamed through Ray Data.

A streaming worker runs its own Ray Data pipeline over the blocks of its share of an epoch: tasks read ranges
of rows of the Parquet file, and their tables arrive in order. Shuffling and batches are the source's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ExecutionOptions, ExecutionResources, TaskPoolStrategy

from twotower.cluster.pool import without_bars
from twotower.cluster.priority import give_way
from twotower.cluster.session import wants_gpu
from twotower.config import Config
from twotower.data.blocks import Block, block_of, read_table
from twotower.data.dataset import Dataset
from twotower.data.interactions import Interactions
from twotower.pipeline import ingest
from twotower.pipeline.ingest import Ingest
from twotower.training.collectives import World
from twotower.training.examples import Fit, TowerInputs
from twotower.training.loop import Source
from twotower.training.stream import ReadBlocks

_READERS = 2
"""Reading tasks of a worker at a time; one reads as fast as several workers train."""

_BYTES_AHEAD = 64 << 20
"""Object store memory of a worker's pipeline."""


def choose_ingest(config: Config, dataset: Dataset) -> Ingest:
    """Return how the interactions get to the workers, and say it where the choice is ours.

    Ray must be running: what counts is the memory that its nodes offer.

    Args:
        config: ``train.ingest`` and the workers.
        dataset: prepared.
    """

    def room() -> tuple[int, float]:
        nodes = [(_workers_on(node, config), node["Resources"].get("memory", 0.0)) for node in ray.nodes()]
        # Without a node that has room yet, the cluster will grow by ones that nothing is known of.
        return min((n for n in nodes if n[0]), key=lambda n: n[1] / n[0], default=(0, 0.0))

    return ingest.choose_ingest(config, dataset, room)


def make_source(
    config: Config, dataset: Dataset, world: World, fit: Fit, chosen: Ingest
) -> Callable[[TowerInputs], Source]:
    """Return what makes a training's source of batches, in a worker; a stream is read through Ray Data."""
    read = block_reader(dataset.path / "interactions.parquet") if chosen == "stream" else None
    return ingest.make_source(config, dataset, world, fit, chosen, read)


def block_reader(path: Path) -> ReadBlocks:
    """Return a function that reads blocks of a file of interactions through Ray Data, in the order given.

    Args:
        path: readable on every node.
    """

    def read(blocks: list[Block]) -> Iterator[Interactions]:
        ranges = [{"start": block.start, "end": block.end} for block in blocks]
        with without_bars():
            dataset = ray.data.from_items(ranges, override_num_blocks=len(ranges))
            # Its own copy of the options: pipelines of other jobs in this process keep theirs.
            dataset.context.execution_options = ExecutionOptions(
                preserve_order=True,
                resource_limits=ExecutionResources.for_limits(object_store_memory=_BYTES_AHEAD),
            )
            tables = iter(
                dataset.map_batches(
                    partial(_read_rows, path=path),
                    batch_size=1,
                    batch_format="pyarrow",
                    compute=TaskPoolStrategy(size=_READERS),
                    # A task that waited for a CPU would wait for ever where the workers have them all.
                    num_cpus=0,
                ).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
            )
        # Ray Data may join the tables of several tasks, or cut one.
        rest: pa.Table | None = None
        for block in blocks:
            while rest is None or rest.num_rows < len(block):
                table = next(tables, None)
                if table is None:
                    # Not a TrainingError: a failure of one rank alone, worth another attempt of all.
                    raise RuntimeError(f"Ray Data ended before rows {block.start} to {block.end} of {path}")
                rest = table if rest is None else pa.concat_tables([rest, table])
            yield block_of(rest.slice(0, len(block)))
            rest = rest.slice(len(block))

    return read


def _read_rows(ranges: pa.Table, path: Path) -> pa.Table:
    """Return the rows of the file that some ranges name, one after the other."""
    give_way()
    return pa.concat_tables([read_table(path, part["start"], part["end"]) for part in ranges.to_pylist()])


def _workers_on(node: dict[str, Any], config: Config) -> int:
    """Return how many training workers a node may get."""
    if not node["Alive"]:
        return 0
    resources = node["Resources"]
    room = int(resources.get("CPU", 0) // config.cluster.cpus_per_worker)
    if wants_gpu(config):
        room = min(room, int(resources.get("GPU", 0)))
    return min(room, config.train.num_workers)
