"""Workers of the Ray of tests are forks, with everything that Ray gives to those that it starts itself."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError

from tests.warm import forks_for
from twotower.cluster.processes import Process, descendants


class Telling:
    """An actor that tells what it runs in."""

    def __init__(self) -> None:
        self.modules = list(sys.modules)

    def facts(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "folder": os.getcwd(),
            "given": os.environ.get("GIVEN"),
            "job": os.environ["RAY_JOB_ID"],
            "modules": self.modules,
            "torch_threads": sys.modules["torch"].get_num_threads(),
        }


def command_line(process: Process) -> str:
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def mine(name: str) -> list[Process]:
    """Return the living processes of this one with a name in their command line."""
    return [p for p in descendants(os.getpid()) if p.alive and name in command_line(p)]


def test_a_fork_has_what_ray_gives_a_worker_and_whoever_asked_for_it_ends_with_it(ray_local: None) -> None:
    def actor() -> tuple[Any, dict[str, Any]]:
        handle = ray.remote(Telling).options(runtime_env={"env_vars": {"GIVEN": "5"}}).remote()
        return handle, ray.get(handle.facts.remote())

    def asking() -> int:
        return len(mine("tests/warm/setup_worker.py"))

    first, facts = actor()
    before = asking()
    second, other = actor()
    assert facts["pid"] != other["pid"]
    forks = {process.pid for process in forks_for(mine("tests/warm/setup_worker.py"))}
    for found in (facts, other):
        assert {"torch", "ray.train", "twotower.training.loop"} <= set(found["modules"])
        assert (found["given"], found["job"]) == ("5", ray.get_runtime_context().get_job_id())
        assert found["pid"] in forks
        assert found["torch_threads"] == 1
    assert sum("ray::Telling" in command_line(p) for p in descendants(os.getpid())) == 2
    os.kill(other["pid"], signal.SIGKILL)
    with pytest.raises(ActorDiedError):
        ray.get(second.facts.remote())
    deadline = time.monotonic() + 60
    while asking() > before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert ray.get(first.facts.remote())["pid"] == facts["pid"]
    ray.kill(first)
