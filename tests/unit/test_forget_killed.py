"""Forgetting that is killed at any point: the next run ends with what one that was left alone ends with."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests.apart import run_apart
from tests.forgetting import COLOUR, GONE, ITEM, files_with, make_shop
from tests.updates import write_config
from twotower.config import Config, load_config
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.lifecycle.forget import REQUEST, forget_users

pytestmark = pytest.mark.slow

# The job kills itself before the rename of that number, or says in a file how many there were.
JOB = """
import os, signal, sys
from pathlib import Path

_, config_path, user, fatal, told = sys.argv
count = 0

def watch(event, arguments):
    global count
    if event == "os.rename":
        count += 1
        if count == int(fatal):
            os.kill(os.getpid(), signal.SIGKILL)

from twotower.config import load_config
from twotower.lifecycle.forget import forget_users
from twotower.generations.store import Store

sys.addaudithook(watch)
config = load_config(config_path)
forget_users(config, Store(config.store), [user])
Path(told).write_text(str(count))
"""


def start(config: Path, fatal: int, told: Path) -> subprocess.CompletedProcess[str]:
    return run_apart(JOB, config, GONE, fatal, told)


def state(config: Config) -> dict[str, bytes]:
    """All files but locks, and those that hold the time or a random salt."""
    return {
        p.relative_to(config.home).as_posix(): p.read_bytes()
        for p in sorted(config.home.rglob("*"))
        if p.is_file()
        and not p.name.endswith(".lock")
        and p.name not in ("publications.jsonl", "superseded.json")
    }


def consistent(config: Config) -> None:
    """Whatever a reader can see is whole, and pointers name what is there."""
    store = Store(config.store)
    for name in store.generations():
        Generation.open(store.path(name), verify=True)
    assert set(store.pointers()) == {"CURRENT", "candidate"}
    assert set(store.pointers().values()) <= set(store.generations())


def restored(config: Config, source: Path, root: Path) -> Config:
    subprocess.run(["cp", "-a", f"{source}/.", str(root)], check=True)
    return load_config(None, [f"storage.root={root}", f"name={config.name}"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    root = tmp_path_factory.mktemp("killed")
    config, _ = make_shop(root)
    return config, root / "runs"


@pytest.fixture(scope="module")
def alone(
    made: tuple[Config, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, bytes], int]:
    """What a run that was left alone ends with, and how many renames it takes."""
    root = tmp_path_factory.mktemp("alone")
    config = restored(*made, root / "runs")
    file = write_config(config, root / "config.yaml")
    done = start(file, 0, root / "told")
    assert done.returncode == 0, done.stderr
    return state(config), int((root / "told").read_text())


@pytest.mark.parametrize("part", [0.0, 0.08, 0.2, 0.35, 0.5, 0.62, 0.74, 0.82, 0.88, 0.92, 0.95, 0.98, 1.0])
def test_a_killed_run_is_finished_by_the_next_one(
    made: tuple[Config, Path], alone: tuple[dict[str, bytes], int], tmp_path: Path, part: float
) -> None:
    expected, renames = alone
    assert renames > 30
    config = restored(*made, tmp_path / "runs")
    file = write_config(config, tmp_path / "config.yaml")
    done = start(file, 1 + round(part * (renames - 1)), tmp_path / "told")
    assert done.returncode == -signal.SIGKILL, done.stderr
    consistent(config)
    assert files_with(config.home, GONE)
    store = Store(config.store)
    # Asked for the same, or for nothing: the first is what a person does who saw it die.
    if part < 0.5:
        forget_users(config, store, [GONE], ignore_missing=False)
    else:
        assert (config.home / REQUEST).exists()
        forget_users(config, store, [])
    consistent(config)
    assert files_with(config.home, GONE, COLOUR, ITEM) == set()
    assert state(config) == expected


def test_a_killed_run_is_finished_before_another_user_is_forgotten(
    made: tuple[Config, Path], alone: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    """Checkpoints are past the first user then, and datasets are not."""
    config = restored(*made, tmp_path / "runs")
    file = write_config(config, tmp_path / "config.yaml")
    assert start(file, round(0.5 * alone[1]), tmp_path / "told").returncode == -signal.SIGKILL
    done = forget_users(config, Store(config.store), ["14"])
    assert (done.users, done.missing, done.left) == (2, 0, [])
    assert files_with(config.home, GONE, COLOUR, ITEM) == set()
