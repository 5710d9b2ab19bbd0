"""Pruning: what goes, what stays, what becomes free, and who may be at work meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.generations import light_manifest
from twotower.artefacts import building, locked
from twotower.errors import ArtefactError, ConfigError
from twotower.generations.generation import Generation
from twotower.generations.prune import freed_bytes, unwanted
from twotower.generations.store import Store
from twotower.retrieval.query import Query
from twotower.retrieval.retriever import Retriever

OLD = time.time() - 10 * 86_400


def light(store: Store, name: str, num_bytes: int = 1_000) -> Path:
    """A directory that counts as a generation; all that pruning looks at."""
    directory = store.path(name)
    directory.mkdir(parents=True)
    (directory / "data").write_bytes(os.urandom(num_bytes))
    light_manifest(directory, name, name)
    return directory


def age(*paths: Path) -> None:
    for path in paths:
        for each in [*path.rglob("*"), path]:
            os.utime(each, (OLD, OLD))


@pytest.fixture
def plain(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    for name in ("g1", "g2", "g3", "g4", "g5"):
        light(store, name)
    return store


def point(store: Store, name: str, pointer: str = "CURRENT") -> None:
    (store.root / pointer).write_text(f"{name}\n")


def test_the_newest_and_those_in_use_stay(plain: Store) -> None:
    point(plain, "g2")
    point(plain, "g1", "candidate")
    size = sum(p.stat().st_size for name in ("g3",) for p in plain.path(name).iterdir())
    before = sorted(p.name for p in plain.root.rglob("*"))
    dry = plain.prune(2, dry_run=True)
    assert (dry.generations, dry.leftovers, dry.num_bytes) == (["g3"], [], size)
    assert plain.generations() == ["g1", "g2", "g3", "g4", "g5"]
    assert {p.name for p in plain.root.rglob("*")} - set(before) <= {".lock", ".work"}
    assert plain.prune(2) == dry
    assert plain.generations() == ["g1", "g2", "g4", "g5"]
    assert plain.prune(2).generations == []
    assert plain.prune(1).generations == ["g4"]
    assert [p.name for p in (plain.root / "generations").iterdir() if p.name.startswith(".")] == []


def test_at_least_one_stays(plain: Store) -> None:
    for keep in (0, -1):
        with pytest.raises(ConfigError, match="at least 1"):
            plain.prune(keep)
    assert len(plain.generations()) == 5
    assert unwanted(["a", "b"], 5, ()) == []


def test_only_bytes_that_nothing_else_links_become_free(plain: Store) -> None:
    def link(name: str, *others: str) -> None:
        for other in others:
            os.link(plain.path(name) / "data", plain.path(other) / f"data-{name}")

    link("g1", "g2", "g5")
    link("g2", "g1")
    manifests = sum((plain.path(n) / "manifest.json").stat().st_size for n in ("g1", "g2"))
    # Of g1 and g2 together, g1's data stays in g5; g2's is freed with both, once.
    assert plain.prune(3).num_bytes == manifests + 1_000
    assert (plain.path("g5") / "data-g1").stat().st_size == 1_000
    assert freed_bytes([plain.path("g5")]) > 2_000


def test_leftovers_of_killed_builds_go_when_they_are_old(plain: Store) -> None:
    folder, work = plain.root / "generations", plain.root / ".work"
    left = [folder / ".x.partial", work / "x-0123abcd", work / "x-4567abcd"]
    for path in left:
        path.mkdir(parents=True)
        (path / "data").write_bytes(b"12345")
    files = [plain.root / ".CURRENT.17.tmp", folder / ".x.lock", work / "x.lock", folder / ".z.lock"]
    for path in files:
        path.touch()
    (folder / ".g1.lock").touch()
    assert plain.prune(5).leftovers == []
    age(*left, *files, folder / ".g1.lock")
    # The lock of what is there stays until that is gone.
    first = plain.prune(5, dry_run=True)
    assert set(first.leftovers) == {str(p.relative_to(plain.root)) for p in [*left, files[0], files[3]]}
    assert first.num_bytes == 15
    assert all(p.exists() for p in [*left, *files])
    assert plain.prune(5) == first
    assert set(plain.prune(5).leftovers) == {"generations/.x.lock", ".work/x.lock"}
    assert plain.prune(5).leftovers == []
    assert (folder / ".g1.lock").exists()
    assert plain.generations() == ["g1", "g2", "g3", "g4", "g5"]


def test_a_build_that_runs_is_left_alone(plain: Store) -> None:
    work = plain.root / ".work" / "new-12345678"
    work.mkdir(parents=True)
    with locked(plain.root / ".work" / "new.lock"), building(plain.path("new")) as partial:
        (partial / "data").write_bytes(b"half")
        age(partial, work, plain.root / ".work" / "new.lock", partial.with_name(".new.lock"))
        assert plain.prune(5, grace_s=0).leftovers == []
        light_manifest(partial, "new", "g0")
    assert work.is_dir()
    # An update holds the lock of its generation until that is published, however old it looks.
    with locked(plain.root / ".work" / "new.lock"):
        assert "new" not in plain.prune(5).generations
    assert plain.prune(5).generations == ["new"]


_HOLDER = """
import sys, time
from pathlib import Path
from twotower.artefacts import building, locked
from twotower.generations.store import Store
store = Store(sys.argv[1])
with locked(store.root / ".work" / "k.lock"), building(store.path("k")) as partial:
    (partial / "data").write_bytes(b"half")
    work = store.root / ".work" / "k-00000000"
    work.mkdir()
    (work / "part").write_bytes(b"part")
    print("ready", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_is_found(plain: Store) -> None:
    arguments = [sys.executable, "-c", _HOLDER, str(plain.root)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            assert plain.prune(5, grace_s=0).leftovers == []
        finally:
            process.kill()
    assert plain.prune(5).leftovers == []
    pruned = plain.prune(5, grace_s=0)
    assert pruned.leftovers == ["generations/.k.partial", ".work/k-00000000"]
    assert pruned.num_bytes == 8
    # The next build of it finds nothing in its way.
    with locked(plain.root / ".work" / "k.lock"), building(plain.path("k")) as partial:
        light_manifest(partial, "k", "g9")
    assert "k" in plain.generations()


def test_a_lock_file_that_is_removed_locks_nobody_out_or_in(plain: Store) -> None:
    path = plain.root / "generations" / ".n.lock"
    inside: list[int] = []
    overlaps: list[bool] = []
    stop = threading.Event()

    def work(number: int) -> None:
        for _ in range(100):
            with locked(path):
                inside.append(number)
                overlaps.append(len(inside) > 1)
                time.sleep(0.0002)
                inside.remove(number)

    def remove() -> None:
        while not stop.is_set():
            plain.prune(5, grace_s=0)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    pruner = threading.Thread(target=remove)
    for thread in [*workers, pruner]:
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    pruner.join()
    assert len(overlaps) == 300
    assert not any(overlaps)


def test_who_has_a_generation_open_goes_on_reading_it(store: Store) -> None:
    retriever = Retriever.open(store.path("b"))
    query = Query(user_id="u7", k=5, fields=retriever.item_fields)
    expected = retriever.retrieve(query).items
    mapped = Generation.open(store.path("b"))
    first = mapped.seen_item_rows[:10].copy()
    store.publish("c")
    assert store.prune(1).generations == ["b", "a"]
    assert not store.path("b").exists()
    assert retriever.retrieve(query).items == expected
    assert retriever.retrieve(Query(history=[], k=3)).items
    assert (mapped.seen_item_rows[:10] == first).all()
    with pytest.raises(ArtefactError, match="not a finished generation"):
        store.publish("b")


def test_a_generation_that_is_published_meanwhile_is_never_lost(store: Store) -> None:
    """Whoever comes first: the pointer names a generation that is there."""
    for name, keep in (("b", 2), ("a", 1)):
        done = threading.Barrier(2)
        answers: list[object] = []

        def publish(
            name: str = name, done: threading.Barrier = done, answers: list[object] = answers
        ) -> None:
            done.wait()
            try:
                store.publish(name)
            except ArtefactError as error:
                answers.append(error)

        thread = threading.Thread(target=publish)
        thread.start()
        done.wait()
        removed = store.prune(keep).generations
        thread.join()
        current = store.current()
        assert (current == name) == (not answers)
        assert current is None or store.has(current)
        assert not (answers and name not in removed)
