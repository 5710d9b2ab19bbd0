"""What each Ray Train worker runs: ``training.loop`` with checkpoints, metrics and a way to stop it."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
import safetensors.torch
import torch
from ray.train.torch import get_device

from twotower.cluster.ingest import Ingest, make_source
from twotower.cluster.priority import give_way
from twotower.cluster.watch import Progress, progress_writer
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.errors import TrainingError
from twotower.model.checkpoint import WEIGHTS, Checkpoint, weights_of
from twotower.training.checks import require_same_model
from twotower.training.collectives import World
from twotower.training.examples import Fit
from twotower.training.journal import Journal
from twotower.training.loop import StepReport, Trainer

STATE = "state.pt"
BEST = f"best-{WEIGHTS}"


@dataclass(frozen=True)
class WorkerSettings:
    """What the driver tells every worker."""

    name: str
    """The checkpoint's name."""
    config: dict[str, Any]
    dataset: str
    fit: Fit
    epochs: int
    ingest: Ingest
    progress: str
    """File that rank 0 writes its progress to."""
    stop: str
    """File that is there once somebody has asked the training to stop."""
    logs: str
    """Folder of the metrics."""


@dataclass(frozen=True)
class WorkerResult:
    """How a worker ended; the same on every rank."""

    stopped: bool = False
    """It was asked to stop and has left a checkpoint."""
    error: str | None = None
    """It can not go on, and would not in another attempt."""


class _Stopped(Exception):
    """Leaves the loop after the checkpoint of a stop."""


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Run one Ray Train worker: every rank calls it with the same ``WorkerSettings`` as a dictionary.

    Returns:
        ``WorkerResult`` as a dictionary. What Ray Train sees as a failure is tried again from the last
        checkpoint, so an error that would only come again is a result instead.
    """
    give_way()
    worker = WorkerSettings(**settings)
    config = parse_config(worker.config)
    torch.set_num_threads(config.train.threads_per_worker)
    try:
        _train(worker, config)
    except _Stopped:
        return asdict(WorkerResult(stopped=True))
    except TrainingError as error:
        # Every rank sees the same data, loss and gradients, so every rank ends here.
        return asdict(WorkerResult(error=str(error)))
    return asdict(WorkerResult())


def _train(worker: WorkerSettings, config: Config) -> None:
    world = World.current(get_device())
    dataset = Dataset.open(worker.dataset)
    source = make_source(config, dataset, world, worker.fit, worker.ingest)
    trainer = Trainer(config, dataset, world, worker.fit, source)
    resumed = _restore(trainer)
    reporter = _Reporter(worker, config, trainer, resumed) if world.rank == 0 else None
    stop = Path(worker.stop)
    every = config.train.checkpoint_every_steps

    def on_step(report: StepReport) -> None:
        if reporter is not None:
            reporter.step(report)
        # At its end an epoch leaves a checkpoint anyway.
        inside = report.done < trainer.source.rows_per_epoch
        if report.stopping or (inside and every is not None and report.step % every == 0):
            _save(trainer, {"step": report.step, "loss": report.loss})
        if report.stopping:
            raise _Stopped

    with contextlib.nullcontext() if reporter is None else reporter.journal:
        while trainer.epoch < worker.epochs and not trainer.finished:
            report = trainer.run_epoch(on_step, stop.exists if world.rank == 0 else lambda: False)
            if reporter is not None:
                reporter.epoch()
            metrics = {k: v for k, v in asdict(report).items() if v is not None}
            _save(trainer, {"step": trainer.step, **metrics})


class _Reporter:
    """Rank 0's words to people: the progress file and the metrics."""

    def __init__(self, worker: WorkerSettings, config: Config, trainer: Trainer, resumed: bool) -> None:
        self._trainer = trainer
        self._write = progress_writer(Path(worker.progress))
        self._resumed_from = trainer.step if resumed else None
        self._done = trainer.epoch_done
        self.journal = Journal(Path(worker.logs), config.train.metrics, worker.name, trainer.step)

    def step(self, report: StepReport) -> None:
        values = {
            "loss": report.loss,
            "temperature": report.temperature,
            "learning_rate": report.learning_rate,
            "gradient_norm": report.gradient_norm,
        }
        self.journal.step(report.step, report.epoch, report.done - self._done, values)
        self._done = report.done
        self._progress(report.epoch, report.done, report.loss)

    def epoch(self) -> None:
        report = self._trainer.history[-1]
        self.journal.epoch(asdict(report), self._trainer.step)
        self._done = 0
        self._progress(report.epoch, self._trainer.source.rows_per_epoch, report.loss)

    def _progress(self, epoch: int, done: int, loss: float) -> None:
        total = self._trainer.source.rows_per_epoch
        history = [asdict(r) for r in self._trainer.history]
        self._write(Progress(epoch, done, total, loss, history, self._resumed_from))


def _save(trainer: Trainer, metrics: dict[str, Any]) -> None:
    """Report metrics and a checkpoint, written by rank 0 since all ranks have the same state; a barrier."""
    # Ray moves the directory to the run's storage before report returns.
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        saved = None
        if trainer.world.rank == 0:
            safetensors.torch.save_file(weights_of(trainer.model), directory / WEIGHTS)
            safetensors.torch.save_file(trainer.best_weights, directory / BEST)
            torch.save(trainer.state_dict(), directory / STATE)
            saved = ray.train.Checkpoint.from_directory(directory)
        ray.train.report(metrics, checkpoint=saved)


def _restore(trainer: Trainer) -> bool:
    """Load the run's last checkpoint, or what it starts from; return whether there was a checkpoint."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        start = trainer.config.train.init_from
        if start is not None:
            weights = weights_of(Checkpoint.open(start).model)
            require_same_model(trainer.model, weights, f"train.init_from ({start})")
            trainer.model.load_state_dict(weights)
        return False
    with checkpoint.as_directory() as folder:
        directory = Path(folder)
        state = torch.load(directory / STATE, map_location="cpu", weights_only=True)
        weights = safetensors.torch.load_file(directory / WEIGHTS)
        trainer.load_state_dict(state, weights, safetensors.torch.load_file(directory / BEST))
    return True
