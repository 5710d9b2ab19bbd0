"""Training on Ray Train: starts the workers, watches them, stops them on SIGTERM, publishes the checkpoints.

Run again, a training continues from its last reported checkpoint, on any number of workers; a finished one is
recognised.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.train
import safetensors.torch
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer

from twotower.artefacts import building, fingerprint, finished, read_manifest
from twotower.cluster.ingest import choose_ingest
from twotower.cluster.session import session, wants_gpu
from twotower.cluster.watch import Watch
from twotower.cluster.worker import BEST, STATE, WorkerResult, WorkerSettings, train_worker
from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.errors import StoppedError, TrainingError, TwotowerError
from twotower.faults import explain
from twotower.model.checkpoint import KIND, WEIGHTS, Checkpoint, TrainedManifest, write_checkpoint
from twotower.progress import say
from twotower.training.examples import Fit
from twotower.training.journal import check_metrics

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


def train(
    config: Config,
    dataset: Dataset,
    fit: Fit = "train",
    epochs: int | None = None,
    callbacks: Sequence[UserCallback] = (),
    chosen: dict[str, Any] | None = None,
) -> Path:
    """Train by Ray Train and return the directory of the best checkpoint.

    Args:
        config: the configuration.
        dataset: prepared; its directory must be readable by all workers.
        fit: the train split (the best epoch on validation is kept), or more (the last epoch is).
        epochs: epochs to train; all of ``train.epochs`` when not given. The learning rate always follows
            the schedule of ``train.epochs``, so that a refit of fewer epochs repeats the run it refits.
        chosen: kept in the manifest, see ``refit``.
        callbacks: told of each report; an epoch's has ``validation_recall``, one inside an epoch has not.

    Returns:
        ``config.checkpoints / ID``; the last epoch's weights are beside it in ``ID-last``, its metrics in
        ``config.home / logs / ID``.

    Raises:
        TrainingError: training can not start, diverged, or failed more often than ``train.max_failures``.
        StoppedError: this process got SIGTERM; the workers have left a checkpoint to go on from.
    """
    epochs = epochs or config.train.epochs
    name = checkpoint_id(config, dataset, fit, epochs)
    directory = config.checkpoints / name
    run = _run_path(config) / name
    if finished(directory, KIND, TrainedManifest):
        say(f"checkpoint {name} is there already")
        # A run that was killed when it had published leaves it.
        shutil.rmtree(run, ignore_errors=True)
        return directory
    check_metrics(config.train.metrics)
    if config.train.init_from is not None:
        Checkpoint.open(config.train.init_from).require_dataset(dataset)
    with session(config), _sigterm_makes(stop_file(_run_path(config) / name)) as asked:
        reported = _fit(config, dataset, fit, epochs, name, callbacks)
        _publish(config, dataset, fit, reported, directory, chosen)
        shutil.rmtree(run, ignore_errors=True)
    if asked.is_set():
        raise StoppedError("stopped by SIGTERM at the end of a training; run it again to go on")
    return directory


def refit(config: Config, dataset: Dataset, chosen: Path, fit: Fit) -> Path:
    """Train once more with more of the data, for as many epochs as were best on validation.

    Args:
        config: the configuration.
        dataset: prepared.
        chosen: the checkpoint of the train split; the course of its training is kept in the new manifest.
        fit: train and validation, or every interaction.

    Returns:
        the directory of the last epoch's checkpoint.

    Raises:
        TrainingError: as ``train``.
        ArtefactError: ``chosen`` is no finished checkpoint.
    """
    manifest = read_manifest(chosen, KIND, TrainedManifest)
    course = {key: manifest[key] for key in ("history", "best_epoch")}
    return train(config, dataset, fit, int(manifest["best_epoch"]), chosen=course)


def stop_file(run: Path) -> Path:
    """Return the file that asks the workers of a run to stop after their step, and leave a checkpoint."""
    return run.with_name(f"{run.name}.stop")


def _fit(
    config: Config, dataset: Dataset, fit: Fit, epochs: int, name: str, callbacks: Sequence[UserCallback]
) -> Path:
    use_gpu = wants_gpu(config)
    run_path = _run_path(config)
    run_path.mkdir(parents=True, exist_ok=True)
    settings = WorkerSettings(
        name=name,
        config=config.to_json(),
        dataset=str(dataset.path.absolute()),
        fit=fit,
        epochs=epochs,
        ingest=choose_ingest(config, dataset),
        progress=str(run_path / f"{name}.progress"),
        stop=str(stop_file(run_path / name)),
        logs=str(config.home / "logs" / name),
    )
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
        train_loop_config=asdict(settings),
        scaling_config=ScalingConfig(
            num_workers=config.train.num_workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(run_path),
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
    with Watch(Path(settings.progress), epochs):
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
        raise TrainingError(f"training {name} ended without a checkpoint; look at {run_path / name}")
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


def _publish(
    config: Config,
    dataset: Dataset,
    fit: Fit,
    reported: Path,
    directory: Path,
    chosen: dict[str, Any] | None,
) -> None:
    """Turn Ray's last checkpoint into the checkpoints of the best and the last epoch."""
    state = torch.load(reported / STATE, map_location="cpu", weights_only=True)
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


def _run_path(config: Config) -> Path:
    return config.checkpoints / ".runs"


def _explained(error: Exception) -> TwotowerError:
    """Return the worker's own error where it is one for people, without Ray's frames around it."""
    told = explain(error)
    if told is not None:
        return told
    failures = getattr(error, "worker_failures", None) or {}
    return TrainingError(f"training failed: {next(iter(failures.values()), error)}")
