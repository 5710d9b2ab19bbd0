"""Jobs give way to serving: what works through data has the lower priority."""

import contextlib
import copy
import os
import threading
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from twotower.cluster.pool import work_through
from twotower.cluster.priority import NICENESS, give_way, giving_way
from twotower.cluster.processes import descendants
from twotower.cluster.train import train
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset


def niceness() -> int:
    """Return that of this thread."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def in_a_thread(function):
    """Return what a function returns in a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_a_thread_gives_way_with_those_it_starts_and_without_the_others():
    def own() -> tuple[int, int]:
        give_way()
        return niceness(), in_a_thread(niceness)

    before = niceness()
    assert before < NICENESS
    assert in_a_thread(own) == (NICENESS, NICENESS)
    assert niceness() == before


def test_a_lower_priority_is_kept():
    def own() -> int:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        give_way()
        return niceness()

    assert in_a_thread(own) == 19


@pytest.fixture
def ray_as_deployed(ray_local: None) -> None:
    """A Ray that leaves the priority of its processes alone: who has a lower one gave way himself."""
    name = "RAY_worker_niceness"
    assert os.environ[name] == "0"


class Tells:
    """An actor that tells its niceness."""

    def __init__(self, device: str, threads: int) -> None:
        pass

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.table({"niceness": [niceness()]})


def test_actors_and_tasks_of_jobs_give_way(ray_as_deployed: None, small_config: Config) -> None:
    assert ray.get(ray.remote(num_cpus=1)(giving_way(niceness)).remote()) == NICENESS
    (fact,) = work_through(Tells, {}, [{"start": 0}], small_config, gpu=False)
    assert fact["niceness"] == NICENESS


def niceness_of_trainers() -> set[int]:
    """Return the niceness of every thread of the workers of Ray Train that this process started."""
    found = set()
    for process in descendants(os.getpid()):
        folder = Path("/proc") / str(process.pid)
        with contextlib.suppress(OSError):
            if b"RayTrainWorker" in (folder / "cmdline").read_bytes():
                for thread in (folder / "task").iterdir():
                    found.add(os.getpriority(os.PRIO_PROCESS, int(thread.name)))
    return found


def test_training_gives_way(
    ray_as_deployed: None, small_config: Config, small_dataset: Dataset, tmp_path: Path
) -> None:
    values = copy.deepcopy(small_config.to_json())
    values["storage"]["root"] = str(tmp_path)
    values["train"] |= {"num_workers": 1}
    seen: set[int] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.05):
            seen.update(niceness_of_trainers())

    looker = threading.Thread(target=look)
    looker.start()
    try:
        train(parse_config(values), small_dataset, epochs=1)
    finally:
        ended.set()
        looker.join()
    assert NICENESS in seen
