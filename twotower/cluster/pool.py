"""A pool of Ray Data actors that works through small descriptions of work and answers with small facts.

What is large (vectors, users, lists) is read from and written to files by the actors; only descriptions
and facts pass through the driver.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.data
import torch

from twotower.cluster.failures import plain_errors
from twotower.cluster.session import quiet, wants_gpu
from twotower.config import Config


def work_through(
    worker: type[Any], settings: dict[str, Any], parts: Sequence[dict[str, int]], config: Config, gpu: bool
) -> Iterator[dict[str, Any]]:
    """Yield the facts of each part, in any order.

    Args:
        worker: class of the actors, importable; called with a table of one row (a part), it returns a table.
        settings: keyword arguments of its constructor; ``device`` and ``threads`` are added to them.
        parts: descriptions of the work, all with the same keys.
        config: for the size of the pool and what each actor reserves.
        gpu: let each actor have a GPU where the configuration and the cluster do.

    Raises:
        TwotowerError: an actor raised one.
    """
    if not parts:
        return
    cluster = config.cluster
    use_gpu = gpu and wants_gpu(config)
    size = min(cluster.num_encoders, len(parts))
    if use_gpu:
        size = max(1, min(size, int(ray.cluster_resources()["GPU"])))
    quiet()
    context = ray.data.DataContext.get_current()
    shown = context.enable_progress_bars
    context.enable_progress_bars = False
    try:
        results = ray.data.from_arrow(
            [pa.table({k: [v] for k, v in part.items()}) for part in parts]
        ).map_batches(
            worker,
            fn_constructor_kwargs={
                **settings,
                "device": "cuda" if use_gpu else "cpu",
                "threads": max(1, int(cluster.cpus_per_encoder)),
            },
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=size),
            num_cpus=cluster.cpus_per_encoder,
            num_gpus=1 if use_gpu else None,
        )
        with plain_errors():
            for batch in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                yield from pa.table(batch).to_pylist()
    finally:
        context.enable_progress_bars = shown


def ranges(count: int, config: Config) -> list[dict[str, int]]:
    """Return ``start`` and ``stop`` of the parts of ``count`` users: a few for each actor, none too large."""
    fair = -(-count // (4 * config.cluster.num_encoders))
    step = max(1, min(config.cluster.encode_batch_size, max(fair, 64)))
    return [{"start": start, "stop": min(start + step, count)} for start in range(0, count, step)]


def pin_threads(threads: int) -> None:
    """Give torch so many CPU threads in this process."""
    torch.set_num_threads(threads)
