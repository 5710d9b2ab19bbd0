"""Following a pointer: what is used when, what is refused, and what is left in memory."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.service import FusedService
from tests.buckets import change, hashes
from tests.generations import edit_manifest
from twotower.artefacts import sha256_file, write_bytes
from twotower.errors import ArtefactError
from twotower.retrieval import follower as module
from twotower.retrieval.follower import Follower
from twotower.retrieval.generation import Generation
from twotower.retrieval.objects import Objects
from twotower.retrieval.query import Query
from twotower.retrieval.remote import RemoteStore
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.store import CURRENT, Store


class User:
    """What a service is to a follower: it holds one retriever at a time, and remembers the ids."""

    def __init__(self, store: Store, load: Callable[[Generation], Retriever] = Retriever.ready) -> None:
        self.loaded: list[str] = []
        self.gone: list[str] = []
        self.used: list[str] = []
        self._load = load
        self.follower = Follower(store, CURRENT, self.load, 0.01, self.gone.append)
        self.retriever = self.follower.open()
        self.follower.start(self.use)

    def load(self, generation: Generation) -> Retriever:
        self.loaded.append(generation.id)
        return self._load(generation)

    def use(self, retriever: Retriever) -> None:
        self.used.append(retriever.generation_id)
        self.retriever = retriever

    def wait(self, true: Callable[[], Any]) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + 60
        while not true():
            assert time.monotonic() < deadline, (self.loaded, self.used, self.follower.refused)
            time.sleep(0.005)

    def wait_for(self, name: str) -> None:
        """Wait until a generation answers and is alone in memory."""
        self.wait(lambda: self.retriever.generation_id == name and self.follower.held == [name])

    def wait_a_few_polls(self) -> None:
        """Wait until the pointer has certainly been read some times."""
        time.sleep(0.2)


Make = Callable[..., User]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes a user of a store's pointer, whose follower ends with the test."""
    users: list[User] = []

    def start(store: Store, **arguments: Any) -> User:
        users.append(User(store, **arguments))
        return users[-1]

    yield start
    for user in users:
        user.follower.close()


def point(store: Store, name: str) -> None:
    """Let the pointer name a generation, whatever it is worth."""
    write_bytes(store.root / CURRENT, f"{name}\n".encode())


def damage(path: Path) -> None:
    """Change one byte of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_what_the_pointer_names_answers_without_a_restart(store: Store, make: Make) -> None:
    store.publish("b")
    user = make(store)
    assert user.retriever.generation_id == "b"
    for name in ("a", "c"):
        store.publish(name)
        user.wait_for(name)
        assert user.retriever.retrieve(Query(k=3)).generation == name
    assert store.rollback().id == "a"
    user.wait_for("a")
    # Publishing the old id is rolling back.
    store.publish("b")
    user.wait_for("b")
    assert user.used == ["a", "c", "a", "b"]
    user.wait(lambda: user.gone == ["b", "a", "c", "a"])
    assert user.follower.refused is None


def test_nothing_is_loaded_while_the_pointer_stays(store: Store, make: Make) -> None:
    store.publish("b")
    user = make(store)
    store.publish("a", "CANDIDATE")
    user.wait_a_few_polls()
    assert user.loaded == ["b"]


def test_nothing_is_published(store: Store) -> None:
    follower = Follower(store, "CANDIDATE", Retriever.ready)
    with pytest.raises(ArtefactError, match="has no pointer CANDIDATE; run jobs"):
        follower.open()


def test_the_old_one_is_freed_without_a_garbage_collection(store: Store, make: Make) -> None:
    store.publish("b")
    user = make(store)
    user.retriever.retrieve_batch([Query(k=5, user_id="1"), Query(k=5, allow_items=["1", "2"]), Query(k=3)])
    parts = (
        user.retriever,
        user.retriever.generation,
        user.retriever._model,
        user.retriever._searcher,
        user.retriever._searcher.units[0],
        user.retriever._inputs,
        user.retriever._items,
        user.retriever.generation.item_ids,
    )
    references = [weakref.ref(part) for part in parts]
    del parts
    assert all(reference() is not None for reference in references)
    gc.collect()
    # Ray Serve takes what a replica has loaded out of the collector's hands.
    gc.disable()
    try:
        store.publish("a")
        user.wait_for("a")
        assert [reference() for reference in references] == [None] * len(references)
    finally:
        gc.enable()


def test_requests_that_read_the_old_one_keep_it(store: Store, make: Make) -> None:
    store.publish("b")
    user = make(store)
    request = user.retriever
    store.publish("a")
    user.wait(lambda: user.retriever.generation_id == "a")
    assert user.follower.held == ["b", "a"]
    assert request.retrieve(Query(k=3)).generation == "b"
    assert user.gone == []
    del request
    user.wait_for("a")
    user.wait(lambda: user.gone == ["b"])


def test_a_damaged_generation_is_refused(store: Store, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    store.publish("b")
    user = make(store)
    damage(store.path("a") / "shards" / "00001" / "index.faiss")
    caplog.set_level(logging.INFO)
    point(store, "a")
    user.wait(lambda: user.follower.refused)
    user.wait_a_few_polls()
    refused = user.follower.refused
    assert refused is not None
    assert refused.id == "a"
    assert "shards/00001/index.faiss is damaged" in refused.reason
    assert str(store.root) not in refused.reason
    # Once, with the path, for the person who has to mend it.
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert len(errors) == 1
    assert str(store.path("a")) in errors[0]
    assert user.loaded == ["b"]
    assert user.follower.held == ["b"]
    assert user.retriever.retrieve(Query(k=3)).generation == "b"
    # Another one is used, and the refusal is over.
    store.publish("c", expected="a")
    user.wait_for("c")
    assert user.follower.refused is None


def test_back_to_the_one_in_use_ends_a_refusal(store: Store, make: Make) -> None:
    store.publish("b")
    user = make(store)
    (store.path("a") / "popularity.npy").unlink()
    point(store, "a")
    user.wait(lambda: user.follower.refused)
    point(store, "b")
    user.wait(lambda: user.follower.refused is None)
    assert user.loaded == ["b"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: (path / "popularity.npy").unlink(), "popularity.npy can not be read"),
        (lambda path: edit_manifest(path, id="z"), "holds generation z, not a"),
        (lambda path: edit_manifest(path, checkpoint_fingerprint="0" * 64), "different trainings"),
        (lambda path: (path / "manifest.json").write_text("{"), "the log says why"),
        (lambda path: shutil.rmtree(path), "the log says why"),
    ],
    ids=["missing file", "other id", "other towers", "broken manifest", "not there"],
)
def test_reasons(store: Store, make: Make, change: Callable[[Path], Any], reason: str) -> None:
    store.publish("b")
    user = make(store)
    change(store.path("a"))
    point(store, "a")
    user.wait(lambda: user.follower.refused)
    assert user.follower.refused is not None
    assert reason in user.follower.refused.reason
    assert str(store.root) not in user.follower.refused.reason
    assert user.retriever.generation_id == "b"


def test_a_first_generation_that_is_damaged_is_an_error(store: Store) -> None:
    store.publish("b")
    damage(store.path("b") / "popularity.npy")
    with pytest.raises(ArtefactError, match=r"popularity.npy is damaged"):
        Follower(store, CURRENT, Retriever.ready).open()


@pytest.mark.parametrize("end", ["corrupt", "vanished", "unreadable"])
def test_a_pointer_that_can_not_be_read(
    store: Store, make: Make, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    store.publish("b")
    user = make(store)
    pointer = store.root / CURRENT
    pointer.unlink()
    if end == "corrupt":
        pointer.write_text("../../somewhere\n")
    elif end == "unreadable":
        pointer.mkdir()
    user.wait(lambda: user.follower.problem)
    user.wait_a_few_polls()
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 1
    assert str(store.root) not in str(user.follower.problem)
    assert user.retriever.retrieve(Query(k=3)).generation == "b"
    if end == "unreadable":
        pointer.rmdir()
    point(store, "a")
    user.wait_for("a")
    assert user.follower.problem is None


def held_up(names: list[str]) -> tuple[Callable[[Generation], Retriever], dict[str, threading.Event]]:
    """A way of loading that waits, for each of some generations, until it may go on."""
    may = {name: threading.Event() for name in names}

    def load(generation: Generation) -> Retriever:
        if generation.id in may:
            assert may[generation.id].wait(60)
        return Retriever.ready(generation)

    return load, may


def test_the_newest_wins(store: Store, make: Make) -> None:
    store.publish("b")
    load, may = held_up(["a"])
    user = make(store, load=load)
    store.publish("a")
    user.wait(lambda: user.loaded == ["b", "a"])
    store.publish("c")
    may["a"].set()
    user.wait_for("c")
    assert user.used == ["c"]


def test_what_is_rolled_back_while_it_loads_is_not_used(store: Store, make: Make) -> None:
    store.publish("b")
    load, may = held_up(["a"])
    user = make(store, load=load)
    store.publish("a")
    user.wait(lambda: user.loaded == ["b", "a"])
    store.rollback()
    may["a"].set()
    user.wait_a_few_polls()
    assert user.used == []
    assert user.follower.held == ["b"]
    store.publish("a")
    user.wait_for("a")


def test_a_pointer_that_is_set_faster_than_generations_load_is_followed(store: Store, make: Make) -> None:
    store.publish("b")
    load, may = held_up(["a", "c"])
    user = make(store, load=load)
    store.publish("a")
    user.wait(lambda: user.loaded == ["b", "a"])
    store.publish("c")
    may["a"].set()
    user.wait(lambda: user.loaded == ["b", "a", "c"])
    store.publish("a")
    may["c"].set()
    # The first was passed over, the second is used although it is not the newest any more.
    user.wait_for("a")
    assert user.used == ["c", "a"]


def test_what_may_pass_is_tried_again(
    store: Store, make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(module, "_LAST_RETRY_S", 0.04)
    store.publish("b")
    failures: list[int] = []

    def load(generation: Generation) -> Retriever:
        if generation.id == "a" and len(failures) < 3:
            failures.append(1)
            raise MemoryError(f"no room for {generation.path}")
        return Retriever.ready(generation)

    user = make(store, load=load)
    store.publish("a")
    user.wait(lambda: user.follower.refused)
    refused = user.follower.refused
    assert refused is not None
    assert refused.id == "a"
    assert "MemoryError" in refused.reason
    assert str(store.root) not in refused.reason
    user.wait_for("a")
    assert user.loaded == ["b", "a", "a", "a", "a"]
    assert len([r for r in caplog.records if r.levelname == "ERROR"]) == 1
    # The stack of an error holds what had been loaded.
    assert not any(record.exc_info for record in caplog.records)


def test_nonsense_is_not_tried_again(store: Store, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_RETRY_S", 0.0)
    store.publish("b")

    def load(generation: Generation) -> Retriever:
        if generation.id == "a":
            raise ArtefactError("the canary query of nobody failed")
        return Retriever.ready(generation)

    user = make(store, load=load)
    store.publish("a")
    user.wait(lambda: user.follower.refused)
    user.wait_a_few_polls()
    assert user.loaded == ["b", "a"]


def test_a_bucket_that_lacks_a_file_is_asked_again(
    here: RemoteStore, elsewhere: RemoteStore, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FIRST_RETRY_S", 0.02)
    here.publish("b")
    user = make(elsewhere)
    assert user.retriever.generation_id == "b"
    change(here, "a", "users/history_times.npy")
    here.publish("a", "CANDIDATE")
    (key,) = hashes(here, "a") - hashes(here, "b")
    objects = Objects(here.where)
    content, pointer = objects.get(key), objects.get("pointers/CANDIDATE")
    assert content is not None
    assert pointer is not None
    objects.delete([key])
    objects.put("pointers/CURRENT", pointer.data.replace(b"CANDIDATE", b"CURRENT"))
    user.wait(lambda: user.follower.refused or user.used)
    assert user.follower.refused is not None
    assert "can not be fetched" in user.follower.refused.reason
    assert user.retriever.generation_id == "b"
    objects.put(key, content.data)
    user.wait_for("a")
    assert user.follower.refused is None


def test_files_that_are_shared_are_not_read_again(
    store: Store, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in store.path("b").rglob("*.faiss"):
        other = store.path("a") / path.relative_to(store.path("b"))
        assert other.read_bytes() == path.read_bytes()
        other.unlink()
        os.link(path, other)
    store.publish("b")
    user = make(store)
    read: list[Path] = []

    def reading(path: Path) -> str:
        read.append(path)
        return sha256_file(path)

    monkeypatch.setattr("twotower.retrieval.files.sha256_file", reading)
    point(store, "a")
    user.wait_for("a")
    names = {path.name for path in read}
    assert "index.faiss" not in names
    assert "popularity.npy" in names
    # Once the one in use was pruned, nobody knows what its files were: all are read.
    shutil.rmtree(store.path("a"))
    read.clear()
    point(store, "b")
    user.wait_for("b")
    assert "index.faiss" in {path.name for path in read}


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
def test_loading_has_a_low_priority(store: Store, make: Make) -> None:
    found: list[int] = []

    def load(generation: Generation) -> Retriever:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return Retriever.ready(generation)

    store.publish("b")
    user = make(store, load=load)
    store.publish("a")
    user.wait_for("a")
    assert found[1] == min(found[0] + 10, 19) > found[0]
    # Requests keep theirs.
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == found[0]


def test_closing_ends_the_thread(store: Store, make: Make) -> None:
    store.publish("b")
    user = make(store)
    before = {thread for thread in threading.enumerate() if thread.name == "follower"}
    assert before
    user.follower.close()
    assert not [thread for thread in before if thread.is_alive()]
    store.publish("a")
    user.wait_a_few_polls()
    assert user.retriever.generation_id == "b"


def test_a_service_says_what_it_follows(store: Store) -> None:
    store.publish("b")
    plain = FusedService(Retriever.open(store.path("b")), max_k=10, workers=1, settings={})
    assert plain.status() == {"held": ["b"], "refused": None, "pointer_problem": None}

    follower = Follower(store, CURRENT, Retriever.ready, 0.01)
    service = FusedService(follower.open(), max_k=10, workers=1, settings={})
    service.follow(follower)
    try:
        damage(store.path("a") / "popularity.npy")
        point(store, "a")
        deadline = time.monotonic() + 60
        while service.status()["refused"] is None and time.monotonic() < deadline:
            time.sleep(0.005)
        described = service.describe()
        assert described["id"] == "b"
        assert described["held"] == ["b"]
        assert described["refused"]["id"] == "a"
        store.publish("c", expected="a")
        while service.front.generation_id != "c" and time.monotonic() < deadline:
            time.sleep(0.005)
        assert json.loads(asyncio.run(service.retrieve(Query(k=3))))["generation"] == "c"
        assert service.status()["refused"] is None
    finally:
        follower.close()
