"""Training on Ray Train: workers, checkpoints and resuming around ``training.loop``.

Run again, a training continues from its last reported checkpoint; a finished one is recognised.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.train
import safetensors.torch
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device

from twotower.artefacts import building, fingerprint, has_manifest
from twotower.cluster.failures import own_error
from twotower.cluster.session import session, wants_gpu
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.errors import TrainingError, TwotowerError
from twotower.model.checkpoint import WEIGHTS, weights_of, write_checkpoint
from twotower.progress import bar, say
from twotower.training.collectives import World
from twotower.training.examples import Fit
from twotower.training.loop import EpochReport, Trainer

_POLL_S = 0.5


def checkpoint_id(config: Config, dataset: Dataset, fit: Fit, epochs: int) -> str:
    """Return the name of the checkpoint of these inputs: the same inputs, the same name."""
    parts = {
        "dataset": dataset.fingerprint,
        "seed": config.seed,
        "model": config.model.model_dump(mode="json"),
        "train": config.train.model_dump(mode="json", exclude={"max_failures", "fit"}),
        "fit": fit,
        "epochs": epochs,
    }
    return f"{fit}-{fingerprint(parts)}"


def train(config: Config, dataset: Dataset, fit: Fit = "train", epochs: int | None = None) -> Path:
    """Train by Ray Train and return the directory of the best checkpoint.

    Args:
        config: the configuration.
        dataset: prepared; its directory must be readable by all workers.
        fit: the train split (the best epoch on validation is kept), or every interaction (the last epoch is).
        epochs: epochs to train; all of ``train.epochs`` when not given. The learning rate always follows
            the schedule of ``train.epochs``, so that a refit of fewer epochs repeats the run it refits.

    Returns:
        ``config.checkpoints / ID``; the last epoch's weights are beside it in ``ID-last``.

    Raises:
        TrainingError: training can not start, diverged, or failed more often than ``train.max_failures``.
    """
    epochs = epochs or config.train.epochs
    name = checkpoint_id(config, dataset, fit, epochs)
    directory = config.checkpoints / name
    if has_manifest(directory):
        say(f"checkpoint {name} is there already")
        return directory
    with session(config):
        reported = _fit(config, dataset, fit, epochs, name)
    _publish(config, dataset, fit, reported, directory)
    shutil.rmtree(_run_path(config) / name, ignore_errors=True)
    return directory


def _fit(config: Config, dataset: Dataset, fit: Fit, epochs: int, name: str) -> Path:
    use_gpu = wants_gpu(config)
    threads = str(config.train.threads_per_worker)
    progress = _run_path(config) / f"{name}.progress"
    progress.parent.mkdir(parents=True, exist_ok=True)
    resources = {"CPU": config.cluster.cpus_per_worker} | ({"GPU": 1.0} if use_gpu else {})
    environment = {"OMP_NUM_THREADS": threads}
    if len([node for node in ray.nodes() if node["Alive"]]) == 1:
        # Gloo asks the resolver for this machine's address, often a wrong one on a laptop or in a container.
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    # Without a limit Ray Train retries for ever where the cluster has too few CPUs.
    failures = FailureConfig(  # type: ignore[call-arg]
        max_failures=config.train.max_failures, controller_failure_limit=3
    )
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "config": config.to_json(),
            "dataset": str(dataset.path.absolute()),
            "fit": fit,
            "epochs": epochs,
            "progress": str(progress),
        },
        scaling_config=ScalingConfig(
            num_workers=config.train.num_workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(_run_path(config)),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=failures,
            worker_runtime_env={"env_vars": environment},  # type: ignore[call-arg]
        ),
    )
    kind = "gpu (nccl)" if use_gpu else "cpu (gloo)"
    say(f"{config.train.num_workers} workers on {kind}, global batch {config.train.global_batch_size}")
    with _Watch(progress, epochs):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _explained(error) from error
    if result.checkpoint is None:
        raise TrainingError(f"training {name} ended without a checkpoint; look at {_run_path(config) / name}")
    return Path(result.checkpoint.path)


def train_worker(settings: dict[str, Any]) -> None:
    """Run one Ray Train worker: every rank calls it with the same settings."""
    config = parse_config(settings["config"])
    torch.set_num_threads(config.train.threads_per_worker)
    world = World.current(get_device())
    trainer = Trainer(config, Dataset.open(settings["dataset"]), world, settings["fit"])
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            _restore(trainer, Path(directory))
    progress = Path(settings["progress"])
    while trainer.epoch < settings["epochs"]:
        on_step = _reporter(progress, trainer) if world.rank == 0 else None
        report = trainer.run_epoch(on_step)
        if on_step is not None:
            on_step(0, report.loss)
        # Ray moves the directory to the run's storage before report returns.
        with tempfile.TemporaryDirectory() as directory:
            saved = None
            if world.rank == 0:
                _save(trainer, Path(directory))
                saved = ray.train.Checkpoint.from_directory(directory)
            metrics = {k: v for k, v in asdict(report).items() if v is not None}
            ray.train.report(metrics, checkpoint=saved)


def _save(trainer: Trainer, directory: Path) -> None:
    safetensors.torch.save_file(weights_of(trainer.model), directory / WEIGHTS)
    safetensors.torch.save_file(trainer.best_weights, directory / f"best-{WEIGHTS}")
    torch.save(trainer.state_dict(), directory / "state.pt")


def _restore(trainer: Trainer, directory: Path) -> None:
    state = torch.load(directory / "state.pt", map_location="cpu", weights_only=True)
    weights = safetensors.torch.load_file(directory / WEIGHTS)
    trainer.load_state_dict(state, weights, safetensors.torch.load_file(directory / f"best-{WEIGHTS}"))


def _publish(config: Config, dataset: Dataset, fit: Fit, reported: Path, directory: Path) -> None:
    """Turn Ray's last checkpoint into the checkpoints of the best and the last epoch."""
    state = torch.load(reported / "state.pt", map_location="cpu", weights_only=True)
    history = state["history"]
    for target, file, epoch in (
        (directory.with_name(f"{directory.name}-last"), WEIGHTS, state["epoch"]),
        (directory, f"best-{WEIGHTS}", state["best_epoch"]),
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
                },
            )


def _run_path(config: Config) -> Path:
    return config.checkpoints / ".runs"


def _reporter(path: Path, trainer: Trainer) -> Callable[[int, float], None]:
    """Return a callback that now and then replaces the progress file; the driver draws it."""
    last = 0.0

    def write(done: int, loss: float) -> None:
        nonlocal last
        total = len(trainer.examples)
        if 0 < done < total and time.monotonic() - last < _POLL_S:
            return
        last = time.monotonic()
        line = {
            "epochs": trainer.epoch + done / total,
            "total": total,
            "loss": loss,
            "history": [asdict(r) for r in trainer.history],
        }
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(line))
        temporary.replace(path)

    return write


class _Watch:
    """Draws the progress file of the workers as one bar an epoch, while the driver waits for Ray Train."""

    def __init__(self, path: Path, epochs: int) -> None:
        self._path = path
        self._epochs = epochs
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._path.unlink(missing_ok=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        shown = 0
        progress = None
        while True:
            stopping = self._stop.is_set()
            state = self._read()
            if state is not None:
                if progress is None:
                    progress = bar(state["total"] * self._epochs, "train", unit="examples")
                progress.n = round(state["epochs"] * state["total"])
                epoch = min(int(state["epochs"]) + 1, self._epochs)
                progress.set_postfix(
                    epoch=f"{epoch}/{self._epochs}", loss=f"{state['loss']:.3f}", refresh=False
                )
                progress.update(0)
                for report in state["history"][shown:]:
                    say(_line(EpochReport(**report)))
                shown = len(state["history"])
            if stopping:
                break
            self._stop.wait(_POLL_S)
        if progress is not None:
            progress.close()

    def _read(self) -> dict[str, Any] | None:
        try:
            state: dict[str, Any] = json.loads(self._path.read_text())
        except FileNotFoundError:
            return None
        return state


def _line(report: EpochReport) -> str:
    text = f"epoch {report.epoch}: loss {report.loss:.4f}  temperature {report.temperature:.4f}"
    if report.validation_recall is not None and report.validation_ndcg is not None:
        text += f"  validation recall {report.validation_recall:.4f} ndcg {report.validation_ndcg:.4f}"
    return f"{text}  ({report.seconds:.1f} s)"


def _explained(error: Exception) -> TwotowerError:
    """Return the worker's own error where it is one for people, without Ray's frames around it."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        own = own_error(failure)
        if own is not None:
            return own
    first = next(iter(failures.values()), error)
    return TrainingError(f"training failed: {first}")
