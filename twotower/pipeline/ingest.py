"""How interactions reach training workers: all in the memory of each, or streamed from the dataset's file."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

from twotower.config import Config
from twotower.data.blocks import read_blocks
from twotower.data.dataset import Dataset
from twotower.progress import say
from twotower.training.collectives import World
from twotower.training.examples import Fit, TowerInputs
from twotower.training.loop import Source, memory_source
from twotower.training.stream import ReadBlocks, StreamSource

Ingest = Literal["memory", "stream"]

BYTES_PER_INTERACTION = 100
"""Memory of a worker for each interaction that it holds, at its peak while examples are made of them.

Measured with two million: 58 to 70, and with explicit negatives 94 to 98; 48 to 57 stay, of which 22 are the
columns and at most 8 the order of an epoch."""

_SHARE_OF_NODE = 0.5
"""Part of a machine's memory that interactions may take; models, batches and others need the rest."""


def choose_ingest(config: Config, dataset: Dataset, room: Callable[[], tuple[int, float]]) -> Ingest:
    """Return how the interactions get to the workers, and say it where the choice is ours.

    Args:
        config: ``train.ingest``.
        dataset: prepared.
        room: asked where memory decides: how many workers share a machine, and its memory in bytes.
    """
    if config.train.ingest != "auto":
        return config.train.ingest
    total = int(dataset.counts["interactions"])
    if config.train.negatives.mined.per_query:
        say(f"ingest: memory (mining hard negatives needs all {total:,} interactions there)")
        return "memory"
    workers, memory = room()
    need = workers * total * BYTES_PER_INTERACTION
    chosen: Ingest = "memory" if need <= _SHARE_OF_NODE * memory else "stream"
    say(
        f"ingest: {chosen} ({total:,} interactions in the memory of {workers} workers take "
        f"{need / 2**30:.1f} GiB on a node of {memory / 2**30:.1f}; up to {_SHARE_OF_NODE:.0%} may be taken)"
    )
    return chosen


def make_source(
    config: Config, dataset: Dataset, world: World, fit: Fit, ingest: Ingest, read: ReadBlocks | None = None
) -> Callable[[TowerInputs], Source]:
    """Return what makes a training's source of batches, in a worker.

    Args:
        config: of the training.
        dataset: prepared.
        world: this process's place.
        fit: the split that is trained on.
        ingest: in memory or streamed.
        read: reads the blocks of a stream; this process reads them itself when it is not given.
    """
    if ingest == "memory":
        return lambda inputs: memory_source(config, dataset, inputs, world, fit)
    path = dataset.path / "interactions.parquet"
    reader = read or (lambda blocks: read_blocks(path, blocks))
    return lambda inputs: StreamSource(dataset, inputs, config, world, fit, reader)


def memory_here() -> tuple[int, float]:
    """Return one worker, and the memory of this machine in bytes."""
    return 1, float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
