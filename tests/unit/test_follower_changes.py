"""Following a pointer that changes while something loads, and trying again what may pass."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.buckets import change, hashes
from tests.following import Make, point
from tests.generations import edit_manifest
from twotower.errors import ArtefactError
from twotower.generations.generation import Generation
from twotower.generations.objects import Objects
from twotower.generations.store import Store
from twotower.retrieval import follower as module
from twotower.retrieval.retriever import Retriever


def held_up(names: list[str]) -> tuple[Callable[[Generation], Retriever], dict[str, threading.Event]]:
    """A way of loading that waits, for each of some generations, until it may go on."""
    may = {name: threading.Event() for name in names}

    def load(generation: Generation) -> Retriever:
        if generation.id in may:
            assert may[generation.id].wait(60)
        return Retriever.ready(generation)

    return load, may


@pytest.mark.slow
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
    # Whoever else holds it for this process is told.
    user.wait(lambda: user.gone == ["a"])
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


def test_a_pointer_that_is_set_faster_than_generations_are_fetched_and_loaded_is_followed(
    store: Store, make: Make
) -> None:
    """Both times that one looks whether it is still named, after fetching and after loading, it is not."""
    store.publish("b")
    # As many as are never named again before something else answers.
    names = [f"a{i}" for i in range(7)]
    for name in names:
        shutil.copytree(store.path("a"), store.root / "generations" / name)
        edit_manifest(store.path(name), id=name)
    following: list[bool] = []

    def move() -> None:
        if following:
            point(store, names[(names.index(store.published("CURRENT")) + 1) % len(names)])

    class SlowStore(Store):
        def fetch(self, generation_id: str) -> Path:
            path = super().fetch(generation_id)
            move()
            return path

    def load(generation: Generation) -> Retriever:
        move()
        return Retriever.ready(generation)

    user = make(SlowStore(store.root), load=load)
    following.append(True)
    point(store, names[0])
    user.wait(lambda: len(user.used) >= 3)
    following.clear()


def test_an_error_of_a_callback_does_not_end_following(
    store: Store, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    store.publish("b")
    user = make(store)
    failures: list[str] = []

    def failing(name: str) -> None:
        failures.append(name)
        raise OSError(errno.ENOSPC, "No space left on device")

    user.follower._gone = failing
    store.publish("a")
    user.wait(lambda: failures)
    store.publish("c")
    user.wait_for("c")
    assert "No space left" in caplog.text


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


def test_a_disk_that_fails_while_a_file_is_opened_is_asked_again(
    store: Store, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FIRST_RETRY_S", 0.02)
    store.publish("b")
    user = make(store)
    failing = threading.Event()
    failing.set()
    load = np.load

    def fails(path: Any, *arguments: Any, **more: Any) -> Any:
        if failing.is_set() and store.path("a") in Path(path).parents:
            raise OSError(errno.EIO, "Input/output error")
        return load(path, *arguments, **more)

    monkeypatch.setattr(np, "load", fails)
    store.publish("a")
    user.wait(lambda: user.follower.refused)
    assert user.follower.refused is not None
    # Not that it should be built again.
    assert user.follower.refused.reason.startswith("it can not be loaded (OSError)")
    assert user.retriever.generation_id == "b"
    failing.clear()
    user.wait_for("a")


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
    here: Store, elsewhere: Store, make: Make, monkeypatch: pytest.MonkeyPatch
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
