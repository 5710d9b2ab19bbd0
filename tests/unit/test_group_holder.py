"""What the replica of a shard group holds: the generations that gateways need, and what is published."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pytest

from tests.following import damage, point
from tests.shop import build_store
from tests.updates import copied
from twotower.config import Config
from twotower.errors import ArtefactError, DamagedError
from twotower.generations.files import file_facts
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.hashing import sha256_file
from twotower.retrieval.holder import LEASE_S, RETRY_S, GroupHolder


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config, _, _ = build_store(tmp_path_factory.mktemp("holder"))
    return config


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def wait_for(
    holder: GroupHolder,
    held: Collection[str],
    refused: Collection[str] = (),
    failed: Collection[str] = (),
) -> None:
    deadline = time.monotonic() + 20
    wanted = set(held), set(refused), set(failed)
    while (set(holder.held), set(holder.refused), set(holder.failed)) != wanted:
        assert time.monotonic() < deadline, (holder.held, holder.refused, holder.failed)
        time.sleep(0.01)


@pytest.fixture
def store(shop: Config, tmp_path: Path) -> Store:
    """A store with three generations, of which the last has a damaged shard."""
    store = Store(copied(shop, tmp_path).store)
    for name in ("g2", "g3"):
        path = store.root / "generations" / name
        shutil.copytree(store.path("g1"), path)
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, "id": name}))
    for name in Generation.open(store.path("g3"), verify=False).shard_groups(2)[0]:
        victim = store.path("g3") / "shards" / name / "index.faiss"
        content = bytearray(victim.read_bytes())
        content[-3] ^= 1
        victim.write_bytes(content)
    return store


def test_a_holder_holds_what_gateways_need(store: Store) -> None:
    clock = Clock()
    holder = GroupHolder(store, 0, 2, clock=clock)
    holder.load("g1")
    assert set(holder.held) == {"g1"}
    holder.need("a", ["g1", "g2"])
    wait_for(holder, {"g1", "g2"})
    holder.need("b", ["g1"])
    assert set(holder.held) == {"g1", "g2"}
    holder.need("a", ["g2"])
    assert set(holder.held) == {"g1", "g2"}
    clock.now = LEASE_S / 2
    holder.need("a", ["g2"])
    # Gateway b has not been heard of for too long.
    clock.now = LEASE_S + 1
    holder.need("a", ["g2"])
    assert set(holder.held) == {"g2"}


def test_a_holder_says_what_it_can_not_hold(store: Store) -> None:
    holder = GroupHolder(store, 0, 2)
    holder.load("g1")
    holder.need("a", ["g1", "g3", "none"])
    wait_for(holder, {"g1"}, {"g3", "none"})
    assert "index.faiss is damaged" in holder.refused["g3"]
    holder.need("a", ["g1", "g2"])
    wait_for(holder, {"g1", "g2"})
    # The other group's files are whole: only a group's own are read.
    other = GroupHolder(store, 1, 2)
    other.load("g3")
    assert set(other.held) == {"g3"}


class FailingStore(Store):
    """A store whose disk may fail."""

    error: Exception | None = None
    fetched = 0

    def fetch(self, generation_id: str) -> Path:
        self.fetched += 1
        if self.error is not None:
            raise self.error
        return super().fetch(generation_id)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_a_holder_tries_again_what_could_not_be_read(store: Store, error: Exception) -> None:
    clock = Clock()
    disk = FailingStore(store.root)
    holder = GroupHolder(disk, 0, 2, clock=clock)
    disk.error = error
    holder.need("a", ["g1", "g3"])
    wait_for(holder, set(), failed={"g1", "g3"})
    assert type(error).__name__ in holder.failed["g1"]
    disk.error = None
    # Not at once: whoever asks meanwhile is told.
    clock.now = RETRY_S - 1
    holder.need("a", ["g1", "g3"])
    assert set(holder.failed) == {"g1", "g3"}
    assert disk.fetched == 2
    clock.now = RETRY_S
    holder.need("a", ["g1", "g3"])
    wait_for(holder, {"g1"}, {"g3"})
    # What was damaged is not read again.
    fetched = disk.fetched
    clock.now = 3 * RETRY_S
    holder.need("a", ["g1", "g3"])
    assert set(holder.refused) == {"g3"}
    assert disk.fetched == fetched


def test_a_holder_looks_again_for_what_is_not_there_yet(store: Store) -> None:
    class LateStore(FailingStore):
        def fetch(self, generation_id: str) -> Path:
            try:
                return super().fetch(generation_id)
            finally:
                self.error = None

    late = LateStore(store.root)
    late.error = ArtefactError("there is no generation g1 yet")
    holder = GroupHolder(late, 0, 2)
    holder.need("a", ["g1"])
    wait_for(holder, {"g1"})
    assert late.fetched == 2


@pytest.mark.parametrize("change", [damage, Path.unlink], ids=["damaged", "missing"])
@pytest.mark.parametrize("name", ["config.json", "item_ids.arrow", "tombstones.npy"])
def test_a_holder_verifies_what_it_reads_beside_its_shards(
    store: Store, name: str, change: Callable[[Path], None]
) -> None:
    path = store.path("g2")
    if name == "tombstones.npy":
        np.save(path / name, np.array([3]))
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][name] = file_facts(path / name)
        (path / "manifest.json").write_text(json.dumps(manifest))
    GroupHolder(store, 0, 2).load("g2")
    change(path / name)
    with pytest.raises(DamagedError, match=name):
        GroupHolder(store, 0, 2).load("g2")


def test_a_holder_whose_thread_can_not_be_started_tries_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = GroupHolder(store, 0, 2)
    with monkeypatch.context() as patch:

        def no_thread(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError, match="new thread"):
            holder.need("a", ["g1"])
    holder.need("a", ["g1"])
    wait_for(holder, {"g1"})


def test_a_holder_begins_with_what_is_published(store: Store) -> None:
    def began(pointer: str = "CURRENT") -> set[str]:
        holder = GroupHolder(store, 0, 2)
        holder.begin(pointer)
        assert not holder.refused
        return set(holder.held)

    assert began("NOWHERE") == set()
    for name in ("g1", "g2"):
        store.publish(name, force=True)
    assert began() == {"g2"}
    # Damaged in this group.
    point(store, "g3")
    assert began() == {"g2"}


def test_a_holder_forgets_a_failure_that_nobody_waits_for(store: Store) -> None:
    disk = FailingStore(store.root)
    holder = GroupHolder(disk, 0, 2, clock=Clock())
    disk.error = OSError(errno.EIO, "Input/output error")
    holder.need("a", ["g1"])
    wait_for(holder, set(), failed={"g1"})
    holder.need("a", [])
    disk.error = None
    holder.need("a", ["g1"])
    wait_for(holder, {"g1"})


def test_what_answers_keeps_the_cpus_while_another_is_verified(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside: list[Path] = []

    def noted(path: Path) -> str:
        aside.append(path)
        return sha256_file(path)

    monkeypatch.setattr("twotower.retrieval.holder.hashing_aside", lambda: contextlib.nullcontext(noted))
    holder = GroupHolder(store, 0, 2)
    holder.load("g1")
    assert not aside
    holder.need("a", ["g1", "g2"])
    wait_for(holder, {"g1", "g2"})
    assert {path.name for path in aside} > {"index.faiss", "item_rows.npy"}
    assert all(path.is_relative_to(store.path("g2")) for path in aside)
