"""``pipeline.train`` on Ray Train: starts the workers, watches them, stops them on SIGTERM.

Run again, a training continues from its last reported checkpoint, on any number of workers; a finished one is
recognised.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer

from twotower.cluster.ingest import choose_ingest
from twotower.cluster.session import session, wants_gpu
from twotower.cluster.worker import WorkerResult, train_worker
from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.errors import StoppedError, TrainingError, TwotowerError
from twotower.faults import explain
from twotower.pipeline import train as step
from twotower.pipeline.train import Engine, Training
from twotower.pipeline.watch import Watch
from twotower.progress import say
from twotower.training.examples import Fit


def train(
    config: Config,
    dataset: Dataset,
    fit: Fit = "train",
    epochs: int | None = None,
    callbacks: Sequence[UserCallback] = (),
) -> Path:
    """Train by Ray Train and return the directory of the best checkpoint.

    Args:
        config: the configuration.
        dataset: prepared; its directory must be readable by all workers.
        fit: as ``pipeline.train.train`` takes it.
        epochs: as ``pipeline.train.train`` takes it.
        callbacks: told of each report; an epoch's has ``validation_recall``, one inside an epoch has not.

    Returns: as ``pipeline.train.train``.

    Raises:
        TrainingError: training can not start, diverged, or failed more often than ``train.max_failures``.
        StoppedError: this process got SIGTERM; the workers have left a checkpoint to go on from.
    """
    return step.train(config, dataset, fit, epochs, engine=on_ray(callbacks))


def refit(config: Config, dataset: Dataset, chosen: Path, fit: Fit) -> Path:
    """Train once more with more of the data by Ray Train, see ``pipeline.train.refit``."""
    return step.refit(config, dataset, chosen, fit, on_ray())


def on_ray(callbacks: Sequence[UserCallback] = (), address: str | None = None) -> Engine:
    """Return what makes a training by Ray Train.

    Args:
        callbacks: told of each report.
        address: of a cluster, as ``session`` takes it.
    """
    return lambda training: _engine(training, callbacks, address)


@contextlib.contextmanager
def _engine(training: Training, callbacks: Sequence[UserCallback], address: str | None) -> Iterator[Path]:
    with session(training.config, address), _sigterm_makes(Path(training.settings.stop)) as asked:
        yield _fit(training, callbacks)
    if asked.is_set():
        raise StoppedError("stopped by SIGTERM at the end of a training; run it again to go on")


def _fit(training: Training, callbacks: Sequence[UserCallback]) -> Path:
    config, dataset, settings = training.config, training.dataset, training.settings
    use_gpu = wants_gpu(config)
    told = {
        "settings": asdict(settings),
        "config": config.to_json(),
        "dataset": str(dataset.path.absolute()),
        "ingest": choose_ingest(config, dataset),
    }
    resources = {"CPU": config.cluster.cpus_per_worker} | ({"GPU": 1.0} if use_gpu else {})
    environment = {"OMP_NUM_THREADS": str(config.train.threads_per_worker)}
    if len([node for node in ray.nodes() if node["Alive"]]) == 1:
        # Gloo asks the resolver for this machine's address, often a wrong one on a laptop or in a container.
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    # Without a limit Ray Train retries for ever where the cluster has too few CPUs.
    failures = FailureConfig(  # type: ignore[call-arg]
        max_failures=config.train.max_failures, controller_failure_limit=3
    )
    trainer = TorchTrainer(
        train_worker,  # type: ignore[arg-type]
        train_loop_config=told,
        scaling_config=ScalingConfig(
            num_workers=config.train.num_workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            # Ray Train keeps its checkpoints in storage_path / name: the training's folder.
            name=training.folder.name,
            storage_path=str(training.folder.parent),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=failures,
            callbacks=list(callbacks),  # type: ignore[arg-type]
            worker_runtime_env={"env_vars": environment},  # type: ignore[call-arg]
        ),
    )
    # The workers read the data themselves, and what manages Ray Train's datasets would be a process more.
    defaults = trainer._create_default_callbacks  # type: ignore[attr-defined]
    trainer._create_default_callbacks = lambda: [  # type: ignore[attr-defined]
        callback for callback in defaults() if type(callback).__name__ != "DatasetsCallback"
    ]
    # Ray's handler would end the process with exit code 0 at Ctrl-C, and stay for the stages that follow.
    trainer._register_sigint_handler = lambda controller: None  # type: ignore[attr-defined]
    kind = "gpu (nccl)" if use_gpu else "cpu (gloo)"
    batch = config.train.batch_size(dataset.train_positives)
    say(f"{config.train.num_workers} workers on {kind}, global batch {batch}")
    with Watch(Path(settings.progress), settings.epochs):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _explained(error) from error
    ended = WorkerResult(**(result.return_value or {}))  # type: ignore[attr-defined]
    if ended.error is not None:
        raise TrainingError(ended.error)
    if ended.stopped:
        raise StoppedError("stopped by SIGTERM after a checkpoint; run it again to go on")
    if result.checkpoint is None:
        raise TrainingError(f"training {settings.name} ended without a checkpoint; look at {training.folder}")
    return Path(result.checkpoint.path)


@contextlib.contextmanager
def _sigterm_makes(flag: Path) -> Iterator[threading.Event]:
    """Let SIGTERM make a file that the workers look for, and set the event; a second one acts as before."""
    asked = threading.Event()
    flag.unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():
        # Python delivers signals to the main thread alone.
        yield asked
        return
    before = signal.getsignal(signal.SIGTERM)

    def ask(signum: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, before)
        asked.set()
        flag.parent.mkdir(parents=True, exist_ok=True)
        flag.touch()
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\n   SIGTERM: the workers stop after this step and leave a checkpoint\n")

    signal.signal(signal.SIGTERM, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
        flag.unlink(missing_ok=True)


def _explained(error: Exception) -> TwotowerError:
    """Return the worker's own error where it is one for people, without Ray's frames around it."""
    told = explain(error)
    if told is not None:
        return told
    failures = getattr(error, "worker_failures", None) or {}
    return TrainingError(f"training failed: {next(iter(failures.values()), error)}")
