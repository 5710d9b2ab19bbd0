"""Following a pointer: what is used when, what is refused, and what is left in memory."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve.fused import FusedService
from tests.following import Make, damage, point
from tests.generations import edit_manifest
from twotower.errors import ArtefactError
from twotower.generations.generation import Generation
from twotower.generations.names import CURRENT
from twotower.generations.store import Store
from twotower.hashing import sha256_file
from twotower.retrieval.follower import Follower
from twotower.retrieval.query import Query
from twotower.retrieval.retriever import Retriever


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
        deadline = time.monotonic() + 20
        while any(reference() is not None for reference in references):
            assert time.monotonic() < deadline, references
            time.sleep(0.01)
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


def test_a_start_while_what_is_published_is_damaged(
    store: Store, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b", "c"):
        store.publish(name)
    # What was rolled back is not what answered before.
    store.rollback()
    damage(store.path("b") / "popularity.npy")
    user = make(store)
    assert user.retriever.retrieve(Query(k=3)).generation == "a"
    assert user.follower.held == ["a"]
    # Whoever counts refusals hears of it, once.
    assert [name for name, _ in user.refused] == ["b"]
    assert "popularity.npy is damaged" in user.refused[0][1]
    assert user.follower.refused is not None
    assert user.follower.refused.id == "b"
    user.wait_a_few_polls()
    assert user.loaded == ["a"]
    assert len(user.refused) == len([r for r in caplog.records if r.levelname == "ERROR"]) == 1
    store.publish("c", expected="b")
    user.wait_for("c")
    assert user.follower.refused is None


def test_a_start_while_several_are_damaged(store: Store, make: Make) -> None:
    for name in ("a", "c", "b"):
        store.publish(name)
    damage(store.path("c") / "popularity.npy")
    shutil.rmtree(store.path("b"))
    user = make(store)
    assert user.retriever.generation_id == "a"
    assert [name for name, _ in user.refused] == ["b"]
    shutil.rmtree(store.path("a"))
    with pytest.raises(ArtefactError, match=r"generations/b is not a finished generation"):
        Follower(store, CURRENT, Retriever.ready).open()


def test_a_start_while_manifests_can_not_be_read(store: Store, make: Make) -> None:
    for name in ("a", "b"):
        store.publish(name)
    (store.path("b") / "manifest.json").write_text("{")
    (store.path("c") / "manifest.json").write_text("{")
    assert make(store).retriever.generation_id == "a"


def test_a_start_brings_no_forgotten_users_back(store: Store) -> None:
    for name in ("a", "b"):
        store.publish(name)
    # Made before users were forgotten, and still there.
    store.supersede([store.manifest("a")["vocabulary_hash"]])
    damage(store.path("b") / "popularity.npy")
    assert store.fallbacks() == []
    with pytest.raises(ArtefactError, match=r"popularity.npy is damaged"):
        Follower(store, CURRENT, Retriever.ready).open()


def test_a_start_that_fails_for_a_while(store: Store, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twotower.retrieval.follower._FIRST_RETRY_S", 0.05)
    store.publish("a")
    store.publish("b")
    failing = threading.Event()
    failing.set()

    def load(generation: Generation) -> Retriever:
        if generation.id == "b" and failing.is_set():
            raise MemoryError("no memory left")
        return Retriever.ready(generation)

    user = make(store, load=load)
    assert user.retriever.generation_id == "a"
    assert "MemoryError" in user.refused[0][1]
    failing.clear()
    user.wait_for("b")


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

    monkeypatch.setattr("twotower.retrieval.follower.hashing_aside", lambda: contextlib.nullcontext(reading))
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


def test_loading_takes_short_turns_at_the_usual_priority(store: Store, make: Make) -> None:
    found: list[tuple[int, float]] = []

    def load(generation: Generation) -> Retriever:
        # On Linux a thread has a priority of its own.
        priority = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        found.append((priority, sys.getswitchinterval()))
        return Retriever.ready(generation)

    usual = sys.getswitchinterval()
    store.publish("b")
    user = make(store, load=load)
    store.publish("a")
    user.wait_for("a")
    deadline = time.monotonic() + 20
    while sys.getswitchinterval() != usual:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (first, at_start), (second, at_change) = found
    # A thread of a lower one that has the GIL and no CPU would hold up requests.
    assert second == first
    assert at_start == usual
    assert at_change < usual / 5


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
    status = plain.status()
    assert (status["held"], status["refused"], status["pointer_problem"]) == (["b"], None, None)

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
        while service.status()["refused"] is not None and time.monotonic() < deadline:
            time.sleep(0.005)
        assert json.loads(asyncio.run(service.retrieve(Query(k=3))))["generation"] == "c"
        assert service.status()["refused"] is None
    finally:
        follower.close()


def test_a_service_that_does_not_follow_says_what_it_refused(store: Store) -> None:
    for name in ("a", "b"):
        store.publish(name)
    damage(store.path("b") / "popularity.npy")
    follower = Follower(store, CURRENT, Retriever.ready, poll_s=0)
    service = FusedService(follower.open(), max_k=10, workers=1, settings={})
    before = threading.active_count()
    service.follow(follower)
    assert threading.active_count() == before
    status = service.status()
    assert (status["held"], status["refused"]["id"]) == (["a"], "b")
    service.close()


def test_what_is_not_followed_is_not_said_to_be_tried_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        store.publish(name)
    fetch = store.fetch

    def fails(name: str) -> Path:
        if name == "b":
            raise OSError("the bucket does not answer")
        return fetch(name)

    monkeypatch.setattr(store, "fetch", fails)
    follower = Follower(store, CURRENT, Retriever.ready, poll_s=0)
    assert follower.open().generation_id == "a"
    assert follower.refused is not None
    assert follower.refused.reason.endswith("A restart tries it again")
    follower.close()
