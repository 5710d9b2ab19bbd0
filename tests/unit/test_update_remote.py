"""Updates of a store in a bucket that stops answering: what the pointer names is never removed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.buckets import keys
from tests.shop import build_store
from tests.updates import copied
from twotower.artefacts import has_manifest
from twotower.config import Config
from twotower.errors import RefusedError, UnavailableError
from twotower.generations.generation import Generation
from twotower.generations.objects import Objects
from twotower.generations.opening import store_at
from twotower.generations.store import Store
from twotower.lifecycle.update import update_items

POINTER = "pointers/CURRENT"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return build_store(tmp_path_factory.mktemp("update_remote"))[0]


@pytest.fixture
def store(shop: Config, bucket: str, tmp_path: Path) -> Store:
    store = store_at(bucket, copied(shop, tmp_path / "runs").store)
    store.publish("g1")
    return store


def local(store: Store) -> set[str]:
    """The ids of the finished generations in the local folder."""
    return {p.name for p in (store.root / "generations").iterdir() if has_manifest(p)}


def assert_whole(store: Store, name: str, root: Path) -> None:
    """A machine that has nothing can serve it."""
    Generation.open(store_at(store.where, root).fetch(name), verify=True)


def silent(
    monkeypatch: pytest.MonkeyPatch, method: str, prefix: str, after: bool = False
) -> Callable[[], None]:
    """Leave requests for keys of a prefix without an answer, carried out or not; returns what ends that."""
    plain = getattr(Objects, method)

    def call(self: Objects, key: str, *rest: Any) -> Any:
        if not key.startswith(prefix):
            return plain(self, key, *rest)
        if after:
            plain(self, key, *rest)
        raise UnavailableError(f"{self.url}: {key} failed: no answer")

    monkeypatch.setattr(Objects, method, call)
    return lambda: monkeypatch.setattr(Objects, method, plain)


def test_an_update_that_is_published_and_not_logged_is_done(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    end = silent(monkeypatch, "swap", "publications/CURRENT/00000002")
    update = update_items(store, deletes=["1001"])
    assert update.published
    assert store.current() == update.generation
    assert f"CURRENT names generation {update.generation}, which is not logged yet" in capsys.readouterr().err
    assert local(store) == {"g1", update.generation}
    assert_whole(store, update.generation, tmp_path / "fresh")
    end()
    again = update_items(store, deletes=["1002"])
    assert [e.id for e in store.publications()] == ["g1", update.generation, again.generation]
    assert len(keys(store, "publications/")) == 3


def test_what_a_pointer_names_is_not_removed_when_the_last_look_fails(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A prune has removed its manifest at that moment: the local copy is the only whole one."""
    swap, ends = Objects.swap, []

    def pruned(self: Objects, key: str, *rest: Any) -> bool:
        done = bool(swap(self, key, *rest))
        if key == POINTER:
            (name,) = local(store) - {"g1"}
            self.delete([f"generations/{name}/manifest.json"])
            ends.append(silent(monkeypatch, "exists", "generations/"))
        return done

    monkeypatch.setattr(Objects, "swap", pruned)
    with pytest.raises(UnavailableError, match="names generation .* now, but it is not known") as caught:
        update_items(store, deletes=["1001"])
    name = str(store.current())
    assert local(store) == {"g1", name}
    assert f"python -m jobs.generations publish {name} --pointer CURRENT" in str(caught.value)
    # What the message says to do makes it whole.
    monkeypatch.setattr(Objects, "swap", swap)
    for end in ends:
        end()
    store.publish(name)
    assert_whole(store, name, tmp_path / "fresh")


@pytest.mark.parametrize("after", [True, False], ids=["carried out", "not carried out"])
def test_where_the_pointer_is_not_known_the_same_update_again_settles_it(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, after: bool
) -> None:
    end = silent(monkeypatch, "swap", POINTER, after)
    with pytest.raises(UnavailableError, match="it is not known whether CURRENT names generation"):
        update_items(store, deletes=["1001"])
    end()
    (name,) = local(store) - {"g1"}
    assert store.current() == (name if after else "g1")
    update = update_items(store, deletes=["1001"])
    assert (update.generation, update.deleted) == (name, 0 if after else 1)
    assert store.current() == name
    assert_whole(store, name, tmp_path / "fresh")


def test_what_could_not_be_pushed_is_published_by_the_same_update(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    end = silent(monkeypatch, "upload", "objects/")
    with pytest.raises(UnavailableError, match="no answer"):
        update_items(store, deletes=["1001"])
    assert store.current() == "g1"
    (name,) = local(store) - {"g1"}
    end()
    assert update_items(store, deletes=["1001"]).generation == name == store.current()
    assert_whole(store, name, tmp_path / "fresh")


def test_what_was_refused_and_is_not_named_is_removed(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = store_at(store.where, tmp_path / "other")
    swap = Objects.swap

    def late(self: Objects, key: str, *rest: Any) -> bool:
        if key == POINTER:
            monkeypatch.setattr(Objects, "swap", swap)
            update_items(other, deletes=["1002"])
        return bool(swap(self, key, *rest))

    monkeypatch.setattr(Objects, "swap", late)
    # What was made is gone, so that there is nothing to publish again.
    with pytest.raises(RefusedError, match=r"another publisher was faster.*\. Run the update again"):
        update_items(store, deletes=["1001"])
    assert local(store) == {"g1"}
    assert store.current() in local(other)


def test_what_was_refused_and_is_named_all_the_same_is_kept(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = Store.publish

    def late(self: Store, name: str, *rest: Any, **named: Any) -> Any:
        publish(self, name, "candidate")
        raise RefusedError("another publisher was faster")

    monkeypatch.setattr(Store, "publish", late)
    with pytest.raises(RefusedError):
        update_items(store, deletes=["1001"])
    assert local(store) == {"g1", str(store.current("candidate"))}
