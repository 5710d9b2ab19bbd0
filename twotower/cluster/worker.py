"""What each Ray Train worker runs: ``pipeline.worker`` with Ray's checkpoints and process group."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import get_device

from twotower.cluster.ingest import make_source
from twotower.cluster.priority import give_way
from twotower.config import parse_config
from twotower.data.dataset import Dataset
from twotower.errors import TrainingError
from twotower.pipeline.ingest import Ingest
from twotower.pipeline.worker import WorkerSettings, run_worker, write_state
from twotower.training.collectives import World
from twotower.training.loop import Trainer


@dataclass(frozen=True)
class WorkerResult:
    """How a worker ended; the same on every rank."""

    stopped: bool = False
    """It was asked to stop and has left a checkpoint."""
    error: str | None = None
    """It can not go on, and would not in another attempt."""


def train_worker(given: dict[str, Any]) -> dict[str, Any]:
    """Run one Ray Train worker: every rank calls it with the same dictionary.

    Args:
        given: ``settings`` (a ``WorkerSettings`` as a dictionary), ``config``, ``dataset`` (its directory)
            and ``ingest``.

    Returns:
        ``WorkerResult`` as a dictionary. What Ray Train sees as a failure is tried again from the last
        checkpoint, so an error that would only come again is a result instead.
    """
    give_way()
    settings, config = WorkerSettings(**given["settings"]), parse_config(given["config"])
    ingest: Ingest = given["ingest"]
    try:
        world = World.current(get_device())
        dataset = Dataset.open(given["dataset"])
        source = make_source(config, dataset, world, settings.fit, ingest)
        stopped = run_worker(settings, config, dataset, world, source, _RayStates())
    except TrainingError as error:
        return asdict(WorkerResult(error=str(error)))
    return asdict(WorkerResult(stopped=stopped))


class _RayStates:
    """Ray Train's checkpoints."""

    @contextlib.contextmanager
    def latest(self) -> Iterator[Path | None]:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def save(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        # Ray moves the directory to the run's storage before report returns, which is a barrier.
        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if trainer.world.rank == 0:
                write_state(trainer, Path(folder))
                saved = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=saved)
