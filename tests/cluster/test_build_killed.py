"""A build that is killed at any point, and run again."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from tests.apart import Apart
from tests.generations import catalogue_vectors, untrained_checkpoint
from twotower.config import parse_config
from twotower.data.dataset import Dataset
from twotower.generations.generation import Generation
from twotower.generations.store import Store

# The job kills itself before it renames something to the name in the last argument, if there is one.
JOB = """
import os, signal, sys
from pathlib import Path
from twotower.cluster.build import build_generation
from twotower.config import load_config
from twotower.data.dataset import Dataset
from twotower.generations.store import Store

_, config_path, dataset_path, checkpoint_path, fatal = sys.argv

def watch(event, arguments):
    if fatal and event == "os.rename" and Path(os.fspath(arguments[1])).name == fatal:
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
config = load_config(config_path)
path = build_generation(config, Dataset.open(dataset_path), Path(checkpoint_path))
Store(config.store).publish(path.name)
"""

DEADLINE_S = 240


@pytest.fixture
def job(
    ray_local: None, small_values: Callable[..., dict[str, Any]], small_dataset: Dataset, tmp_path: Path
) -> tuple[Store, Callable[..., Apart]]:
    values = small_values(tmp_path)
    config = parse_config(values)
    checkpoint = untrained_checkpoint(config, small_dataset, tmp_path / "checkpoint")
    (tmp_path / "config.yaml").write_text(json.dumps(values))

    def start(fatal: str = "") -> Apart:
        arguments = [tmp_path / "config.yaml", small_dataset.path, checkpoint.path, fatal]
        return Apart(JOB, *arguments, RAY_ADDRESS=ray.get_runtime_context().gcs_address)

    return Store(config.store), start


def kill_when(process: Apart, appeared: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not appeared():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "what should appear did not"
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def assert_consistent(store: Store) -> None:
    """What is listed is whole, and what CURRENT names is listed."""
    for name in store.generations():
        Generation.open(store.path(name), verify=True)
    assert store.current() in {None, *store.generations()}


def test_a_killed_build_is_finished_by_the_next_one(job: Any, small_dataset: Dataset) -> None:
    store, start = job
    work = store.root / ".work"

    kill_when(start(), lambda: any(work.glob("*/parts/*.vectors.npy")))
    assert store.generations() == []
    assert store.current() is None

    kill_when(start(), lambda: any(work.glob("*/shards/*/index.faiss")))
    assert store.generations() == []
    assert store.current() is None

    # The last file of the generation, and the pointer.
    for fatal, finished in (("manifest.json", 0), ("CURRENT", 1)):
        process = start(fatal)
        _, shown = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == -signal.SIGKILL, shown
        assert_consistent(store)
        assert len(store.generations()) == finished
        assert store.current() is None

    process = start()
    _, shown = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, shown
    assert "is there already" in shown
    (name,) = store.generations()
    assert store.current() == name
    generation = Generation.open(store.path(name), verify=True)
    vectors = catalogue_vectors(generation.checkpoint(), small_dataset)
    np.testing.assert_allclose(generation.searcher().vectors(np.arange(210)), vectors, atol=1e-6)
    # Nothing of the killed runs is left.
    assert [p.name for p in work.iterdir()] == [f"{name}.lock"]
    assert sorted(p.name for p in (store.root / "generations").iterdir()) == [f".{name}.lock", name]
