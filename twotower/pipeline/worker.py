"""What each worker of a training runs: ``training.loop`` with checkpoints, metrics and a way to stop it.

The same function alone and among many: what differs is where the state of an unfinished training lies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch

from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.model.checkpoint import WEIGHTS, Checkpoint, weights_of
from twotower.pipeline.watch import Progress, progress_writer
from twotower.training.checks import require_same_model
from twotower.training.collectives import World
from twotower.training.examples import Fit, TowerInputs
from twotower.training.journal import Journal
from twotower.training.loop import Source, StepReport, Trainer

STATE = "state.pt"
BEST = f"best-{WEIGHTS}"


@dataclass(frozen=True)
class WorkerSettings:
    """What every worker of a training is told."""

    name: str
    """The checkpoint's name."""
    fit: Fit
    epochs: int
    progress: str
    """File that rank 0 writes its progress to."""
    stop: str
    """File that is there once somebody has asked the training to stop."""
    logs: str
    """Folder of the metrics."""


class States(Protocol):
    """Where the state of an unfinished training lies, so that another run goes on from it."""

    def latest(self) -> contextlib.AbstractContextManager[Path | None]:
        """Yield a folder with what ``write_state`` wrote last; None where there is none yet."""

    def save(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Keep the state, and tell whoever watches what it comes to.

        Collective: all ranks; rank 0 writes, since all have the same state.
        """


def run_worker(
    worker: WorkerSettings,
    config: Config,
    dataset: Dataset,
    world: World,
    make_source: Callable[[TowerInputs], Source],
    states: States,
) -> bool:
    """Train as one rank until the last epoch, early stopping, or somebody asks to stop.

    Args:
        worker: the same on every rank.
        config: of the training.
        dataset: prepared.
        world: this process's place.
        make_source: makes the source of batches.
        states: where the training goes on from, and leaves its state.

    Returns:
        whether the training was asked to stop before its end, and has left its state.

    Raises:
        TrainingError: it can not go on, and would not in another attempt. Every rank sees the same data,
            loss and gradients, so that every rank raises it.
    """
    trainer = Trainer(config, dataset, world, worker.fit, make_source)
    resumed = _restore(trainer, states)
    reporter = _Reporter(worker, config, trainer, resumed) if world.rank == 0 else None
    stop = Path(worker.stop)
    every = config.train.checkpoint_every_steps

    def on_step(report: StepReport) -> None:
        if reporter is not None:
            reporter.step(report)
        # At its end an epoch leaves its state anyway.
        inside = report.done < trainer.source.rows_per_epoch
        if report.stopping or (inside and every is not None and report.step % every == 0):
            states.save(trainer, {"step": report.step, "loss": report.loss})
        if report.stopping:
            raise _Stopped

    with contextlib.suppress(_Stopped), contextlib.nullcontext() if reporter is None else reporter.journal:
        while trainer.epoch < worker.epochs and not trainer.finished:
            report = trainer.run_epoch(on_step, stop.exists if world.rank == 0 else lambda: False)
            if reporter is not None:
                reporter.epoch()
            metrics = {k: v for k, v in asdict(report).items() if v is not None}
            states.save(trainer, {"step": trainer.step, **metrics})
        return False
    return True


class _Stopped(Exception):
    """Leaves the loop after the state of a stop was saved."""


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


def write_state(trainer: Trainer, directory: Path) -> None:
    """Write everything that a training goes on from into an empty folder."""
    safetensors.torch.save_file(weights_of(trainer.model), directory / WEIGHTS)
    safetensors.torch.save_file(trainer.best_weights, directory / BEST)
    torch.save(trainer.state_dict(), directory / STATE)


def read_state(directory: Path) -> dict[str, Any]:
    """Return what ``Trainer.state_dict`` returned, of a folder that ``write_state`` filled."""
    state: dict[str, Any] = torch.load(directory / STATE, map_location="cpu", weights_only=True)
    return state


def _restore(trainer: Trainer, states: States) -> bool:
    """Load the last state, or what the training starts from; return whether there was a state."""
    with states.latest() as directory:
        if directory is not None:
            weights = safetensors.torch.load_file(directory / WEIGHTS)
            best = safetensors.torch.load_file(directory / BEST)
            trainer.load_state_dict(read_state(directory), weights, best)
            return True
    start = trainer.config.train.init_from
    if start is not None:
        weights = weights_of(Checkpoint.open(start).model)
        require_same_model(trainer.model, weights, f"train.init_from ({start})")
        trainer.model.load_state_dict(weights)
    return False
