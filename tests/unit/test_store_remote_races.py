"""Stores in a bucket with several at work: publishers, prunes, and pushes that are killed."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.apart import run_apart
from tests.buckets import change, contents, hashes, keys
from tests.generations import edit_manifest
from twotower.errors import RefusedError
from twotower.generations.generation import Generation
from twotower.generations.objects import Objects
from twotower.generations.opening import store_at
from twotower.generations.store import Store


def test_a_publication_that_was_not_logged_is_not_lost(here: Store) -> None:
    here.publish("a")
    here.publish("b")
    objects = Objects(here.where)
    # Its publisher was killed between the pointer and the log.
    objects.delete(["publications/CURRENT/00000002.json"])
    assert [e.id for e in here.publications()] == ["a", "b"]
    here.publish("c")
    assert [e.id for e in here.publications()] == ["a", "b", "c"]
    assert len(keys(here, "publications/")) == 3


def test_of_two_publishers_the_later_is_told(here: Store, elsewhere: Store) -> None:
    shutil.copytree(here.root, elsewhere.root)
    here.publish("a", expected=None)
    with pytest.raises(RefusedError, match="CURRENT names a, not None"):
        elsewhere.publish("b", expected=None)
    assert here.current() == "a"


def test_a_pointer_that_moves_at_the_last_moment_is_not_overwritten(
    here: Store, elsewhere: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bucket decides, not what was read before."""
    shutil.copytree(here.root, elsewhere.root)
    for expected, mine, other in ((None, "a", "b"), ("b", "a", "c")):
        swap = Objects.swap

        def late(objects: Objects, key: str, *rest: Any, other: str = other, swap: Any = swap) -> bool:
            if key == "pointers/CURRENT":
                monkeypatch.setattr(Objects, "swap", swap)
                elsewhere.publish(other)
            return bool(swap(objects, key, *rest))

        monkeypatch.setattr(Objects, "swap", late)
        with pytest.raises(RefusedError, match=f"CURRENT names {other}, not {expected}"):
            here.publish(mine)
        assert here.current() == other
    assert [e.id for e in here.publications()] == ["b", "c"]


def test_publishers_at_once_leave_one_history(here: Store, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        here.push(name)
    barrier = threading.Barrier(3)
    won: list[str] = []
    lost: list[str] = []

    def publish(name: str) -> None:
        store = store_at(here.where, shutil.copytree(here.root, tmp_path / f"root-{name}"))
        barrier.wait()
        try:
            store.publish(name)
            won.append(name)
        except RefusedError as error:
            lost.append(str(error))

    threads = [threading.Thread(target=publish, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log = here.publications()
    assert {e.id for e in log} == set(won)
    assert len(won) + len(lost) == 3
    assert all("another publisher was faster" in message for message in lost)
    assert [e.previous for e in log] == [None, *(e.id for e in log[:-1])]
    assert here.current() == log[-1].id


def test_an_answer_that_was_lost_is_no_defeat(here: Store) -> None:
    objects = Objects(here.where)
    assert objects.swap("pointers/x", b"1", None)
    assert objects.swap("pointers/x", b"1", None)
    assert not objects.swap("pointers/x", b"2", None)
    now = objects.get("pointers/x")
    assert objects.swap("pointers/x", b"2", now)
    assert not objects.swap("pointers/x", b"3", now)
    assert objects.swap("pointers/x", b"2", now)


def test_a_prune_counts_references(here: Store, elsewhere: Store) -> None:
    change(here, "b")
    change(here, "a", "users/seen_offsets.npy")
    for name in ("b", "a", "c"):
        here.push(name)
    here.publish("c")
    here.publish("b", pointer="candidate")
    only_a = hashes(here, "a") - hashes(here, "b") - hashes(here, "c")
    assert len(only_a) == 1
    size = here.path("a").joinpath("users/seen_offsets.npy").stat().st_size
    before = keys(here, "")
    # What is younger than the grace period may be part of a push.
    assert elsewhere.prune(1, dry_run=True).num_bytes == 0
    dry = here.prune(1, grace_s=0, dry_run=True)
    assert dry.generations == ["a"]
    assert keys(here, "") == before
    assert here.has("a")
    done = elsewhere.prune(1, grace_s=0)
    assert (done.generations, done.leftovers, done.num_bytes) == (["a"], [], size)
    assert set(keys(here, "objects/")) == hashes(here, "b") | hashes(here, "c")
    assert set(before) - set(keys(here, "")) == only_a | {"generations/a/manifest.json"}
    assert elsewhere.generations() == ["b", "c"]
    # The cache of this folder follows, and keeps what pointers name.
    assert here.prune(1, grace_s=0).generations == ["a"]
    assert sorted(p.name for p in (here.root / "generations").iterdir()) == ["b", "c"]
    for name in ("b", "c"):
        Generation.open(elsewhere.fetch(name), verify=True)


def test_what_is_published_while_it_is_pruned_survives(
    here: Store, elsewhere: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(here, "b")
    for name in ("b", "a", "c"):
        here.push(name)
    shutil.copytree(here.root, elsewhere.root)
    delete = Objects.delete

    def late(objects: Objects, names: list[str]) -> None:
        monkeypatch.setattr(Objects, "delete", delete)
        # The pointer is set after the prune has read the pointers, before or after the removal.
        if before:
            elsewhere.publish("b")
            delete(objects, names)
        else:
            delete(objects, names)
            elsewhere.publish("b", pointer="candidate")

    for before in (True, False):
        monkeypatch.setattr(Objects, "delete", late)
        assert "b" not in here.prune(1, grace_s=0).generations
        assert set(keys(here, "objects/")) >= hashes(elsewhere, "b")
        Generation.open(store_at(here.where, here.root.parent / f"fresh-{before}").fetch("b"))
        Objects(here.where).delete(["pointers/CURRENT"])


def test_a_push_puts_back_what_a_prune_took_under_its_hands(
    here: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.push("a")
    Objects(here.where).delete(["generations/a/manifest.json"])
    swap = Objects.swap

    def late(objects: Objects, key: str, *rest: Any) -> bool:
        monkeypatch.setattr(Objects, "swap", swap)
        # All of them: the push found them and sent nothing.
        objects.delete(keys(here, "objects/"))
        return bool(swap(objects, key, *rest))

    monkeypatch.setattr(Objects, "swap", late)
    here.push("a")
    assert set(keys(here, "objects/")) == hashes(here, "a")


def test_another_generation_of_that_id_is_taken_from_the_bucket(here: Store, elsewhere: Store) -> None:
    """Two machines build the same inputs; the first to push says what the id means."""
    shutil.copytree(here.root, elsewhere.root)
    edit_manifest(elsewhere.path("a"), created="9")
    here.publish("a")
    with pytest.raises(RefusedError, match="made elsewhere of the same inputs"):
        elsewhere.push("a")
    elsewhere.publish("a", pointer="other")
    assert contents(elsewhere.path("a")) == contents(here.path("a"))
    # Where it was changed on purpose, copies follow.
    change(here, "a")
    here.push("a", replace=True)
    assert contents(elsewhere.fetch("a")) == contents(here.path("a"))


_PUSHER = """
import os, signal, sys
from twotower.generations.objects import Objects
from twotower.generations.opening import store_at
stage, url, cache = sys.argv[1:]
done = 0
def killing(name):
    plain = getattr(Objects, name)
    def call(self, key, *rest):
        global done
        done += key.startswith(stage)
        # The publication that went before is logged first.
        if done == {"objects/": 5, "publications/": 2}.get(stage, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, key, *rest)
    setattr(Objects, name, call)
for name in ("upload", "swap"):
    killing(name)
store_at(url, cache).publish("b")
"""


@pytest.mark.parametrize("stage", ["objects/", "generations/", "pointers/", "publications/"])
def test_a_push_that_is_killed_changes_nothing(here: Store, elsewhere: Store, stage: str) -> None:
    here.publish("a")
    for file in contents(here.path("b")):
        if file.endswith(".npy"):
            change(here, "b", file)
    done = run_apart(_PUSHER, stage, here.where, here.root)
    assert done.returncode == -9, done.stderr
    published = stage == "publications/"
    assert elsewhere.current() == ("b" if published else "a")
    assert elsewhere.generations() == (["a"] if stage in ("objects/", "generations/") else ["b", "a"])
    assert contents(elsewhere.fetch("a")) == contents(here.path("a"))
    if stage == "generations/":
        left = set(keys(here, "objects/")) - hashes(here, "a")
        assert left == hashes(here, "b") - hashes(here, "a")
        assert set(elsewhere.prune(1, grace_s=0, dry_run=True).leftovers) == left
    here.publish("b")
    assert contents(elsewhere.fetch("b")) == contents(here.path("b"))
    assert [e.id for e in here.publications()] == ["a", "b"]
