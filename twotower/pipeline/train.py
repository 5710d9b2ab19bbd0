"""A dataset to a checkpoint: what a checkpoint is called, made of and chosen by, whoever trains it.

A training is made here in this process, or by whoever ``engine`` says. Run again, it goes on from its last
saved state; a finished one is recognised.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from twotower.artefacts import building, fingerprint, finished, locked, read_manifest, remove, sync_tree
from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.errors import StoppedError
from twotower.model.checkpoint import KIND, WEIGHTS, Checkpoint, TrainedManifest, write_checkpoint
from twotower.pipeline.ingest import choose_ingest, make_source, memory_here
from twotower.pipeline.runner import uses_gpu
from twotower.pipeline.watch import Watch
from twotower.pipeline.worker import BEST, WorkerSettings, read_state, run_worker, write_state
from twotower.progress import say, stage
from twotower.training.collectives import World
from twotower.training.examples import Fit
from twotower.training.journal import check_metrics
from twotower.training.loop import Trainer

_NOT_IN_NAME = {
    # How a training is run, not what comes out of it: changed between two runs, the second one goes on.
    "checkpoint_every_steps",
    "fit",
    "max_failures",
    "metrics",
    "num_workers",
    "threads_per_worker",
    "tower_chunk_size",
}


@dataclass(frozen=True)
class Training:
    """A training that is to be made."""

    config: Config
    dataset: Dataset
    settings: WorkerSettings
    """What its workers are told."""
    folder: Path
    """Of its unfinished state: ``runs(config) / NAME``, removed when it is finished."""


Engine = Callable[[Training], AbstractContextManager[Path]]
"""Makes a training and yields the folder of its last state, as ``write_state`` filled it."""


@dataclass(frozen=True)
class Checkpoints:
    """Three fits of one model, each the folder of a checkpoint; one and the same for ``train.fit: train``.

    Example:
        >>> checkpoints = tt.train(config, data)
        >>> checkpoints.served.parent == config.checkpoints
        True
    """

    chosen: Path
    """Of the train split: its epochs are compared on validation."""
    evaluated: Path
    """Of train and validation, for as many epochs: its quality is measured on test."""
    served: Path
    """Of every interaction, for as many epochs."""


def checkpoint_id(config: Config, dataset: Dataset, fit: Fit, epochs: int) -> str:
    """Return the name of the checkpoint of these inputs: the same inputs, the same name."""
    parts = {
        "dataset": dataset.fingerprint,
        "seed": config.seed,
        "model": config.model.model_dump(mode="json"),
        "train": config.train.model_dump(mode="json", exclude=_NOT_IN_NAME),
        "fit": fit,
        "epochs": epochs,
    }
    return f"{fit}-{fingerprint(parts)}"


def runs(config: Config) -> Path:
    """Return the folder of unfinished trainings."""
    return config.checkpoints / ".runs"


def stop_file(run: Path) -> Path:
    """Return the file that asks the workers of a run to stop after their step, and leave their state."""
    return run.with_name(f"{run.name}.stop")


@contextlib.contextmanager
def in_this_process(training: Training) -> Iterator[Path]:
    """Train in this process, as the only worker, and yield the folder of the last state.

    ``train.threads_per_worker`` threads train; the caller's own setting is restored. Whoever interrupts it
    (Ctrl-C) and calls it again goes on from the last epoch, or ``train.checkpoint_every_steps``.

    Raises:
        TrainingError: it can not go on, and would not in another attempt.
        StoppedError: somebody made the file ``WorkerSettings.stop``.
    """
    config, dataset, settings = training.config, training.dataset, training.settings
    states = FolderStates(training.folder / "one-process")
    gpu = uses_gpu(config.cluster.use_gpu)
    world = World(device=torch.device("cuda" if gpu else "cpu"))
    source = make_source(config, dataset, world, settings.fit, choose_ingest(config, dataset, memory_here))
    batch = config.train.batch_size(dataset.train_positives)
    say(f"this process on {'gpu' if gpu else 'cpu'}, global batch {batch}")
    Path(settings.stop).unlink(missing_ok=True)
    with Watch(Path(settings.progress), settings.epochs):
        stopped = run_worker(settings, config, dataset, world, source, states)
    if stopped:
        raise StoppedError("stopped after its state was saved; run it again to go on")
    yield states.written()


class FolderStates:
    """States in a folder of this machine, each whole or not there."""

    def __init__(self, folder: Path) -> None:
        """Keep states in ``folder``, which is made."""
        self._folder = folder
        self._partial = folder / ".partial"
        folder.mkdir(parents=True, exist_ok=True)
        remove(self._partial)

    @contextlib.contextmanager
    def latest(self) -> Iterator[Path | None]:
        """Yield the folder of the last state; None where there is none yet."""
        states = self._states()
        yield states[-1] if states else None

    def written(self) -> Path:
        """Return the folder of the last state, which there is."""
        return self._states()[-1]

    def save(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Write the state, and remove the ones before it."""
        self._partial.mkdir()
        write_state(trainer, self._partial)
        sync_tree(self._partial)
        before = self._states()
        number = int(before[-1].name) + 1 if before else 0
        os.replace(self._partial, self._folder / f"{number:012d}")
        for old in before:
            remove(old)

    def _states(self) -> list[Path]:
        return sorted(path for path in self._folder.iterdir() if path.name.isdecimal())


def train(
    config: Config,
    dataset: Dataset,
    fit: Fit = "train",
    epochs: int | None = None,
    chosen: dict[str, Any] | None = None,
    engine: Engine = in_this_process,
) -> Path:
    """Train and return the directory of the best checkpoint.

    Args:
        config: the configuration.
        dataset: prepared; its directory must be readable by all workers.
        fit: the train split (the best epoch on validation is kept), or more (the last epoch is).
        epochs: epochs to train; all of ``train.epochs`` when not given. The learning rate always follows
            the schedule of ``train.epochs``, so that a refit of fewer epochs repeats the run it refits.
        chosen: kept in the manifest, see ``refit``.
        engine: who trains; this process where it is not given.

    Returns:
        ``config.checkpoints / ID``; the last epoch's weights are beside it in ``ID-last``, its metrics in
        ``config.home / logs / ID``.

    Raises:
        TrainingError: training can not start, diverged, or failed more often than ``train.max_failures``.
        StoppedError: somebody asked it to stop; it has left a state to go on from.
    """
    epochs = epochs or config.train.epochs
    name = checkpoint_id(config, dataset, fit, epochs)
    directory = config.checkpoints / name
    run = runs(config) / name
    # Another process that is asked for the same waits, and finds it finished.
    with locked(run.with_name(f".{name}.lock")):
        if finished(directory, KIND, TrainedManifest):
            say(f"checkpoint {name} is there already")
            # A run that was killed when it had published leaves it.
            shutil.rmtree(run, ignore_errors=True)
            return directory
        check_metrics(config.train.metrics)
        if config.train.init_from is not None:
            Checkpoint.open(config.train.init_from).require_dataset(dataset)
        settings = WorkerSettings(
            name=name,
            fit=fit,
            epochs=epochs,
            progress=str(run.with_name(f"{name}.progress")),
            stop=str(stop_file(run)),
            logs=str(config.home / "logs" / name),
        )
        with engine(Training(config, dataset, settings, run)) as reported:
            _publish(config, dataset, fit, reported, directory, chosen)
            shutil.rmtree(run, ignore_errors=True)
    return directory


def refit(config: Config, dataset: Dataset, chosen: Path, fit: Fit, engine: Engine = in_this_process) -> Path:
    """Train once more with more of the data, for as many epochs as were best on validation.

    Args:
        config: the configuration.
        dataset: prepared.
        chosen: the checkpoint of the train split; the course of its training is kept in the new manifest.
        fit: train and validation, or every interaction.
        engine: who trains.

    Returns:
        the directory of the last epoch's checkpoint.

    Raises:
        TrainingError: as ``train``.
        ArtefactError: ``chosen`` is no finished checkpoint.
    """
    manifest = read_manifest(chosen, KIND, TrainedManifest)
    course = {key: manifest[key] for key in ("history", "best_epoch")}
    return train(config, dataset, fit, int(manifest["best_epoch"]), course, engine)


def train_all(config: Config, dataset: Dataset, engine: Engine = in_this_process) -> Checkpoints:
    """Return the checkpoints that ``train.fit`` asks for, training those that are missing.

    Raises:
        TrainingError: as ``train``.
    """
    stage("train on the train split")
    chosen = train(config, dataset, "train", engine=engine)
    if config.train.fit == "train":
        return Checkpoints(chosen, chosen, chosen)
    stage("refit on train and validation, to be measured on test")
    evaluated = refit(config, dataset, chosen, "known", engine)
    stage("refit on every interaction, to be served")
    return Checkpoints(chosen, evaluated, refit(config, dataset, chosen, "all", engine))


def _publish(
    config: Config,
    dataset: Dataset,
    fit: Fit,
    reported: Path,
    directory: Path,
    chosen: dict[str, Any] | None,
) -> None:
    """Turn the last state of a training into the checkpoints of its best and its last epoch."""
    state = read_state(reported)
    history = state["history"]
    for target, file, epoch in (
        (directory.with_name(f"{directory.name}-last"), WEIGHTS, state["epoch"]),
        (directory, BEST, state["best_epoch"]),
    ):
        with building(target) as partial:
            write_checkpoint(
                partial,
                safetensors.torch.load_file(reported / file),
                dataset,
                config,
                {
                    "fit": fit,
                    "epoch": epoch,
                    "best_epoch": state["best_epoch"],
                    "history": history,
                    "metrics": history[epoch - 1],
                    **({} if chosen is None else {"chosen": chosen}),
                },
            )
