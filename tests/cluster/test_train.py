"""Training end to end through Ray Train's TorchTrainer on a local Ray."""

import contextlib
import copy
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
import safetensors.torch
import yaml

from twotower.artefacts import has_manifest
from twotower.cluster.processes import descendants
from twotower.cluster.train import train
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.errors import ArtefactError, ArtefactMismatchError, TrainingError
from twotower.model.checkpoint import Checkpoint
from twotower.training.collectives import World
from twotower.training.loop import Trainer

MINED_EVERY = 30


def variant(config: Config, root: Path, **train: object) -> Config:
    values = copy.deepcopy(config.to_json())
    values["storage"]["root"] = str(root)
    values["train"] |= train
    return parse_config(values)


TRAIN = {
    "epochs": 2,
    "global_batch_size": 96,
    "num_workers": 2,
    "checkpoint_every_steps": 6,
    "metrics": {"every_steps": 1},
    "negatives": {
        "uniform": 9,
        "memory": 100,
        "memory_start": 10,
        "mined": {"per_query": 2, "skip": 3, "window": 20, "every_steps": MINED_EVERY},
    },
}


@pytest.fixture(scope="module")
def trained(
    ray_local: None, small_config: Config, small_dataset: Dataset, tmp_path_factory
) -> tuple[Config, Path]:
    config = variant(small_config, tmp_path_factory.mktemp("trained"), **TRAIN)
    return config, train(config, small_dataset)


def losses(config: Config) -> dict[int, float]:
    """Return the loss of every step in the metrics of the only training of a configuration."""
    (lines,) = (config.home / "logs").glob("*/metrics.jsonl")
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_two_workers_of_ray_train_what_one_process_without_ray_does(
    trained: tuple[Config, Path], small_dataset: Dataset
) -> None:
    found: dict[int, float] = {}
    trainer = Trainer(trained[0], small_dataset, World(), "train")
    trainer.run_epoch(lambda report: found.update({report.step: report.loss}))
    wanted = losses(trained[0])
    assert len(found) > MINED_EVERY
    for step, loss in found.items():
        # Of scores that are nearly equal, each world may mine another.
        assert loss == pytest.approx(wanted[step], rel=1e-5 if step <= MINED_EVERY else 1e-3), step


def test_a_finished_run_leaves_best_and_last_checkpoints(
    trained: tuple[Config, Path], small_dataset: Dataset
) -> None:
    config, path = trained
    best, last = Checkpoint.open(path), Checkpoint.open(path.with_name(f"{path.name}-last"))
    history = best.manifest["history"]
    assert [h["epoch"] for h in history] == [1, 2]
    assert all(0 < h["validation_recall"] <= 1 for h in history)
    recalls = [h["validation_recall"] for h in history]
    assert best.manifest["epoch"] == recalls.index(max(recalls)) + 1
    assert last.manifest["epoch"] == 2
    assert best.config == config
    best.require_dataset(small_dataset)
    assert sorted(p.name for p in path.iterdir()) == [
        "config.json",
        "features.json",
        "manifest.json",
        "model.safetensors",
    ]
    assert train(config, small_dataset) == path  # recognised, not trained again


def test_a_wrong_byte_and_another_vocabulary_are_named(
    trained: tuple[Config, Path], small_dataset: Dataset, tmp_path: Path
) -> None:
    import shutil

    copied = tmp_path / "copy"
    shutil.copytree(trained[1], copied)
    weights = copied / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtefactError, match="model.safetensors has SHA-256 .* the file is damaged"):
        Checkpoint.open(copied)
    with pytest.raises(ArtefactError, match="has no manifest.json"):
        Checkpoint.open(tmp_path)

    checkpoint = Checkpoint.open(trained[1])
    manifest = json.loads((checkpoint.path / "manifest.json").read_text())
    other = Dataset(
        small_dataset.path, small_dataset.manifest | {"vocabulary_hash": "feed"}, small_dataset.schema
    )
    with pytest.raises(ArtefactMismatchError, match=f"{manifest['vocabulary_hash']}.*feed"):
        checkpoint.require_dataset(other)


def test_a_refit_on_everything_runs_the_chosen_epochs_from_where_it_is_told_to(
    trained: tuple[Config, Path], small_dataset: Dataset, tmp_path: Path
) -> None:
    start, slowly = str(trained[1]), {"learning_rate": 1e-6}
    config = variant(trained[0], tmp_path, init_from=start, num_workers=1, optimizer=slowly)
    path = train(config, small_dataset, fit="all", epochs=1)
    manifest = Checkpoint.open(path).manifest
    assert manifest["fit"] == "all"
    (epoch,) = manifest["history"]
    assert epoch["epoch"] == 1
    assert epoch["validation_recall"] is None
    assert epoch["loss"] < Checkpoint.open(trained[1]).manifest["history"][0]["loss"] - 0.1


def processes_of(actor: str) -> list[int]:
    found = []
    for process in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            if f"ray::{actor}" in Path(f"/proc/{process.pid}/cmdline").read_text():
                found.append(process.pid)
    return sorted(found)


def wait_for_step(config: Config, step: int, alive: Callable[[], bool] = lambda: True) -> None:
    deadline = time.monotonic() + 120
    while not any(
        f'"step": {step},' in file.read_text() for file in (config.home / "logs").glob("*/metrics.jsonl")
    ):
        assert alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start_job(
    config: Config, dataset: Dataset, folder: Path, stderr: IO[str] | int = subprocess.PIPE
) -> subprocess.Popen[str]:
    """Start ``jobs.train`` with a Ray of its own, in a process group of its own."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config.to_json()))
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.train", "--config", str(file), "--dataset", str(dataset.path)],
        env=os.environ | {"RAY_ADDRESS": "local"},
        stderr=stderr,
        text=True,
        process_group=0,
    )


@pytest.mark.slow
def test_a_killed_worker_starts_again_from_a_step_and_ends_as_if_undisturbed(
    trained: tuple[Config, Path], small_dataset: Dataset, tmp_path: Path, capfd
) -> None:
    config = variant(trained[0], tmp_path)
    killed: list[int] = []
    managers: list[int] = []
    before = processes_of("DatasetManager")  # of a stream that another test has read

    def kill() -> None:
        wait_for_step(config, 55)
        managers.extend(processes_of("DatasetManager"))
        killed.append(processes_of("RayTrainWorker")[-1])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    path = train(config, small_dataset)
    killer.join()
    assert killed
    assert set(managers) <= set(before), "Ray Train manages datasets that there are not"
    again = re.search(r"goes on from step (\d+), in epoch 2/2", capfd.readouterr().err)
    assert again, "nobody said that the workers were started again"
    assert int(again[1]) >= 48
    assert Checkpoint.open(path).fingerprint == Checkpoint.open(trained[1]).fingerprint
    assert losses(config) == losses(trained[0])


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_that_another_number_of_workers_goes_on_from(
    trained: tuple[Config, Path], small_dataset: Dataset, tmp_path: Path
) -> None:
    config = variant(trained[0], tmp_path, checkpoint_every_steps=None)
    job = start_job(config, small_dataset, tmp_path)
    # The memory of negatives is full and others have been mined.
    wait_for_step(config, 32, lambda: job.poll() is None)
    # To the whole group, as `timeout` does: the workers are no part of it.
    os.killpg(job.pid, signal.SIGTERM)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 143, said
    assert "run it again to go on" in said
    before, wanted = losses(config), losses(trained[0])
    # However many steps it takes until both workers have heard of it.
    assert 32 <= max(before) < max(wanted)
    train(variant(config, tmp_path, num_workers=1), small_dataset)
    found = losses(config)
    assert found.keys() == wanted.keys()
    assert all(found[step] == wanted[step] for step in before)
    first = max(before) + 1
    assert found[first] == pytest.approx(wanted[first], rel=1e-5)
    assert all(found[step] == pytest.approx(wanted[step], rel=1e-3) for step in found)


def test_a_training_that_diverges_is_not_tried_again(
    ray_local: None, small_config: Config, small_dataset: Dataset, tmp_path: Path
) -> None:
    config = variant(
        small_config, tmp_path, optimizer={"learning_rate": 1e30}, checkpoint_every_steps=1, max_failures=3
    )
    with pytest.raises(TrainingError, match=r"^step \d of epoch 1 has loss \S+ .* learning rate 1e\+30"):
        train(config, small_dataset)
    kept = [p.parent for p in (config.checkpoints / ".runs").glob("*/checkpoint_*/state.pt")]
    assert kept, "the last good checkpoint is gone"
    for path in kept:
        weights = safetensors.torch.load_file(path / "model.safetensors")
        assert all(t.isfinite().all() for t in weights.values())


def test_a_worker_s_own_error_reaches_the_person(
    trained: tuple[Config, Path], small_dataset: Dataset, tmp_path: Path
) -> None:
    config = variant(trained[0], tmp_path, init_from=str(trained[1]), num_workers=1, max_failures=0)
    values = config.to_json()
    values["model"]["embedding_dim"] = 28
    with pytest.raises(TrainingError, match=r"^train\.init_from \(.*\) is of another model: tensor"):
        train(parse_config(values), small_dataset)


@pytest.mark.slow
def test_a_training_that_is_killed_interrupted_and_killed_at_its_end_ends_as_if_undisturbed(
    trained: tuple[Config, Path], small_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = variant(trained[0], tmp_path)
    path = config.checkpoints / trained[1].name
    runs = config.checkpoints / ".runs"

    job = start_job(config, small_dataset, tmp_path)
    deadline = time.monotonic() + 120
    while not list(runs.glob("*/checkpoint_*/state.pt")):
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    assert not has_manifest(path)

    file = tmp_path / "said"
    with file.open("w") as stderr:
        job = start_job(config, small_dataset, tmp_path, stderr)
    deadline = time.monotonic() + 120
    while "goes on from step" not in file.read_text():
        assert job.poll() is None, file.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    started = descendants(job.pid)
    os.killpg(job.pid, signal.SIGINT)
    job.wait(timeout=60)
    said = file.read_text()
    assert job.returncode == 130, said
    assert said.strip().splitlines()[-1] == "jobs.train: interrupted; run it again to go on"
    assert "Traceback" not in said
    deadline = time.monotonic() + 60
    while any(process.alive for process in started):
        assert time.monotonic() < deadline, "processes of Ray outlived the job"
        time.sleep(0.05)
    assert not has_manifest(path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("twotower.pipeline.train._publish", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, small_dataset)
    assert not has_manifest(path)
    assert list(runs.glob("train-*"))
    (logs,) = (config.home / "logs").iterdir()
    steps = (logs / "metrics.jsonl").read_text()

    assert train(config, small_dataset) == path
    # The same seed, data and number of workers.
    assert Checkpoint.open(path).fingerprint == Checkpoint.open(trained[1]).fingerprint
    assert losses(config) == losses(trained[0])
    assert (logs / "metrics.jsonl").read_text() == steps, "it was trained twice"
    assert not list(runs.glob("train-*"))
