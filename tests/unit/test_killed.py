"""Killed before any change it makes and run again, everything ends as if it had been left alone."""

from __future__ import annotations

import http.server
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.generations import light_manifest
from tests.killing import files_below, killed_before
from twotower.artefacts import MANIFEST, building, discard, write_bytes, write_json, write_manifest
from twotower.data.sources.download import fetch_zip
from twotower.errors import ArtefactError
from twotower.evaluation.sweep import carry_over
from twotower.generations.files import FACTS, list_files
from twotower.generations.shards import shard_folders, write_shard
from twotower.generations.store import Store
from twotower.index.parts import write_part


def add(store: Store, *names: str) -> None:
    """Build light generations of two files each."""
    for name in names:
        with building(store.path(name)) as partial:
            (partial / "users").mkdir()
            (partial / "users" / "data").write_bytes(name.encode() * 100)
            (partial / "more").write_bytes(name.encode())
            light_manifest(partial, name, name)


def each_kill(again: Callable[[], object], fresh: Callable[[], Path], work: Callable[[], object]) -> int:
    """Kill work before each of its changes in turn, run it again, and compare what is left; returns how many.

    Args:
        again: what is done after a kill, and must end as the work alone does.
        fresh: makes what the work begins with, and returns the folder to compare.
        work: what is killed.
    """
    expected = None
    number = 0
    while True:
        number += 1
        root = fresh()
        if not killed_before(number, work):
            expected = files_below(root)
            break
    for place in range(1, number):
        root = fresh()
        assert killed_before(place, work)
        again()
        assert files_below(root) == expected, place
    return number - 1


def test_a_killed_prune(tmp_path: Path) -> None:
    store, template = Store(tmp_path / "store"), tmp_path / "template"
    add(Store(template), "g1", "g2", "g3")

    def fresh() -> Path:
        shutil.rmtree(store.root, ignore_errors=True)
        shutil.copytree(template, store.root)
        return store.root

    assert each_kill(lambda: store.prune(1), fresh, lambda: store.prune(1)) > 8
    # The same generation built again is nobody's obstacle, however the prune before it ended.
    for place in (2, 3, 5, 8):
        fresh()
        assert killed_before(place, lambda: store.prune(1))
        add(store, "g1")
        assert "g1" in store.prune(1).generations
        assert store.generations() == ["g3"]
        assert [p.name for p in (store.root / "generations").iterdir() if p.name[0] != "."] == ["g3"]


def test_a_killed_cleaning_of_a_refused_update(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    for place in (1, 2, 4):
        add(store, "g1", "u1")
        assert killed_before(place, lambda: discard(store.path("u1"), ".refused"))
        add(store, "u1")
        discard(store.path("u1"), ".refused")
        store.prune(5)
        assert store.generations() == ["g1"]
        assert {p.name for p in (store.root / "generations").iterdir() if not p.name.endswith(".lock")} == {
            "g1"
        }


@pytest.mark.parametrize("keep_partial", [False, True])
def test_a_killed_replacement(tmp_path: Path, keep_partial: bool) -> None:
    directory = tmp_path / "reports" / "r"

    def build(text: str) -> None:
        with building(directory, keep_partial) as partial:
            write_json(partial / "config.json", {"text": text})
            (partial / "parts").mkdir(exist_ok=True)
            write_bytes(partial / "parts" / "one", text.encode())
            write_manifest(partial, "report", {"text": text})

    build("old")
    shutil.copytree(tmp_path / "reports", tmp_path / "template")

    def fresh() -> Path:
        shutil.rmtree(tmp_path / "reports", ignore_errors=True)
        return shutil.copytree(tmp_path / "template", tmp_path / "reports")

    assert each_kill(lambda: build("new"), fresh, lambda: build("new")) > 5


def test_killed_while_the_trials_of_a_sweep_are_carried_over(tmp_path: Path) -> None:
    """A trial that was left behind would be trained again."""
    old, new = tmp_path / "old", tmp_path / "new"

    def fresh() -> Path:
        shutil.rmtree(new, ignore_errors=True)
        for number in range(4):
            (old / "trials").mkdir(parents=True, exist_ok=True)
            write_json(old / "trials" / f"{number:03d}.json", {"name": str(number)})
        new.mkdir()
        return new

    def again() -> None:
        # As a sweep goes on: what is half written goes first.
        for path in new.rglob(".*.tmp"):
            path.unlink()
        carry_over(old, new)

    assert each_kill(again, fresh, lambda: carry_over(old, new)) > 3
    assert len(list((new / "trials").iterdir())) == 4


def test_a_killed_shard_leaves_nothing_in_the_generation(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    rows = np.arange(6)
    vectors = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    part = write_part(parts, rows, np.zeros(6, np.int32), vectors, 1)
    items = pa.table({"item_id": [str(i) for i in rows], "title": ["t"] * 6, "item_row": rows})
    pq.write_table(items, tmp_path / "items.parquet")
    shards = tmp_path / "shards"

    def write() -> int:
        where = str(shards / "00000")
        return write_shard([part], 0, "Flat", [str(tmp_path / "items.parquet")], ["title"], {}, "c", where, 1)

    def fresh() -> Path:
        shutil.rmtree(shards, ignore_errors=True)
        shards.mkdir()
        return shards

    assert each_kill(write, fresh, write) >= 3
    # Left by a folder's browser, by a kill, by somebody.
    (shards / ".DS_Store").write_bytes(b"x")
    (shards / "00000" / ".index.faiss.17.tmp").write_bytes(b"x")
    (shards / "00000" / "notes.txt").write_bytes(b"x")
    (shards / "00007").mkdir()
    assert [p.name for p in shard_folders(shards, 1)] == ["00000"]
    assert set(list_files(shards)) == {
        f"00000/{name}" for name in ("index.faiss", "item_rows.npy", "items.arrow", FACTS)
    }


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "served"
    folder.mkdir()
    with zipfile.ZipFile(folder / "d.zip", "w") as archive:
        archive.writestr("ratings.csv", "1,2,3\n" * 50)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Quiet(*a, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.sockets
def test_a_killed_download(tmp_path: Path, mirror: str) -> None:
    cache = tmp_path / "cache"

    def fetch() -> object:
        return fetch_zip("d.zip", mirror, None, cache)

    number = 0
    while True:
        number += 1
        shutil.rmtree(cache, ignore_errors=True)
        if not killed_before(number, fetch):
            break
        fetched = fetch_zip("d.zip", mirror, None, cache)
        with zipfile.ZipFile(fetched.path) as archive:
            assert archive.testzip() is None
        assert {p.name for p in fetched.path.parent.iterdir()} == {".lock", "d.zip", "d.zip.json"}, number
    assert number > 3


def test_a_manifest_that_a_killed_builder_left_does_not_finish_the_next_build(tmp_path: Path) -> None:
    directory = tmp_path / "r"

    def build() -> None:
        with building(directory, keep_partial=True) as partial:
            (partial / "data").write_bytes(b"1")
            write_manifest(partial, "report", {})

    # Before the last rename: the manifest is there.
    number = 1
    while killed_before(number, build) and not (tmp_path / ".r.partial" / MANIFEST).exists():
        number += 1
    assert (tmp_path / ".r.partial" / MANIFEST).exists()
    with pytest.raises(ArtefactError, match="without a manifest"), building(directory, True) as partial:
        assert (partial / "data").exists()
    assert not directory.exists()
