"""Stores in a bucket, against a real server of the S3 protocol."""

from __future__ import annotations

import datetime
import http.client
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

from jobs import generations
from tests.generations import edit_index, edit_manifest, plain_generation, untrained_checkpoint
from twotower.artefacts import MANIFEST, write_json
from twotower.config import Config, load_config, parse_config
from twotower.data.dataset import Dataset
from twotower.errors import ArtefactError, ConfigError, RefusedError
from twotower.retrieval.generation import Generation, file_facts
from twotower.retrieval.objects import Objects
from twotower.retrieval.query import Query
from twotower.retrieval.remote import RemoteStore
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.store import Store, open_store, store_at


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The URL of an empty place in a bucket of this test, and the environment that leads to it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    name = f"b{abs(hash(request.node.nodeid)):x}"
    connection = http.client.HTTPConnection(endpoint.removeprefix("http://"))
    connection.request("PUT", f"/{name}")
    assert connection.getresponse().status == 200
    connection.close()
    return f"s3://{name}/some/place"


@pytest.fixture
def here(store: Store, bucket: str) -> RemoteStore:
    """A bucket, and a folder in which b, a and c were built and not pushed."""
    return RemoteStore(bucket, store.root)


@pytest.fixture
def elsewhere(bucket: str, tmp_path: Path) -> RemoteStore:
    """The same bucket from a machine that has nothing."""
    return RemoteStore(bucket, tmp_path / "elsewhere" / "store")


def contents(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def keys(store: RemoteStore, prefix: str) -> list[str]:
    return sorted(o.key for o in Objects(store.where).list(prefix))


def hashes(store: Store, name: str) -> set[str]:
    return {
        f"objects/{f['sha256']}"
        for f in json.loads((store.path(name) / MANIFEST).read_text())["files"].values()
    }


def change(store: Store, name: str, file: str = "popularity.npy") -> None:
    """Give a local generation a file of its own."""
    path = store.path(name)
    data = bytearray((path / file).read_bytes())
    data[-1] ^= 1
    (path / file).unlink()
    (path / file).write_bytes(bytes(data))
    files = json.loads((path / MANIFEST).read_text())["files"]
    edit_manifest(path, files={**files, file: file_facts(path / file)})


def test_what_is_pushed_arrives_byte_for_byte(here: RemoteStore, elsewhere: RemoteStore) -> None:
    assert here.publish("a") is None
    assert elsewhere.current() == "a"
    assert elsewhere.generations() == ["a"]
    assert here.generations() == ["b", "a", "c"]
    assert elsewhere.has("a")
    assert not elsewhere.has("b")
    path = elsewhere.fetch("a")
    assert path == elsewhere.root / "generations" / "a"
    assert contents(path) == contents(here.path("a"))
    # A copy that is there is not fetched again.
    before = (path / "popularity.npy").stat()
    assert elsewhere.fetch("a") == path
    assert (path / "popularity.npy").stat().st_ino == before.st_ino
    with pytest.raises(ArtefactError, match="no generation nope"):
        elsewhere.fetch("nope")


def test_a_large_file_goes_up_in_parts(here: RemoteStore, tmp_path: Path) -> None:
    objects = Objects(here.where)
    path = tmp_path / "large"
    path.write_bytes(os.urandom(1 << 20) * 20)
    objects.upload("objects/large", path)
    assert objects.download("objects/large", tmp_path / "back") == tuple(file_facts(path).values())
    assert (tmp_path / "back").read_bytes() == path.read_bytes()


def test_generations_share_what_is_equal(here: RemoteStore, elsewhere: RemoteStore) -> None:
    here.publish("a")
    change(here, "b")
    here.publish("b")
    assert set(keys(here, "objects/")) == hashes(here, "a") | hashes(here, "b")
    assert len(hashes(here, "a") & hashes(here, "b")) == len(hashes(here, "a")) - 1
    first, second = elsewhere.fetch("a"), elsewhere.fetch("b")
    known = {(first / name).stat().st_ino for name in contents(first)}
    new = {name for name in contents(second) if (second / name).stat().st_ino not in known}
    assert new == {MANIFEST, "popularity.npy"}
    assert contents(second) == contents(here.path("b"))


def test_gates_pointers_the_log_and_the_way_back(here: RemoteStore, elsewhere: RemoteStore) -> None:
    edit_index(here.path("c"), index_recall=0.5)
    with pytest.raises(RefusedError, match="0.5000"):
        here.publish("c")
    assert keys(here, "") == []
    here.publish("a")
    here.publish("c", force=True)
    here.publish("b", pointer="candidate")
    assert elsewhere.pointers() == {"CURRENT": "c", "candidate": "b"}
    done = elsewhere.rollback()
    assert (done.id, done.previous) == ("a", "c")
    assert here.current() == "a"
    log = [e for e in here.publications() if e.pointer == "CURRENT"]
    assert [(e.id, e.previous, e.action, e.forced) for e in log] == [
        ("a", None, "publish", False),
        ("c", "a", "publish", True),
        ("a", "c", "rollback", False),
    ]
    assert len(log[1].reasons) == 1
    with pytest.raises(RefusedError, match="nothing to roll back to"):
        here.rollback()


def test_a_publication_that_was_not_logged_is_not_lost(here: RemoteStore) -> None:
    here.publish("a")
    here.publish("b")
    objects = Objects(here.where)
    # Its publisher was killed between the pointer and the log.
    objects.delete(["publications/CURRENT/00000002.json"])
    assert [e.id for e in here.publications()] == ["a", "b"]
    here.publish("c")
    assert [e.id for e in here.publications()] == ["a", "b", "c"]
    assert len(keys(here, "publications/")) == 3


def test_of_two_publishers_the_later_is_told(here: RemoteStore, elsewhere: RemoteStore) -> None:
    shutil.copytree(here.root, elsewhere.root)
    here.publish("a", expected=None)
    with pytest.raises(RefusedError, match="CURRENT names a, not None"):
        elsewhere.publish("b", expected=None)
    assert here.current() == "a"


def test_a_pointer_that_moves_at_the_last_moment_is_not_overwritten(
    here: RemoteStore, elsewhere: RemoteStore, monkeypatch: pytest.MonkeyPatch
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


def test_publishers_at_once_leave_one_history(here: RemoteStore, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        here.push(name)
    barrier = threading.Barrier(3)
    won: list[str] = []
    lost: list[str] = []

    def publish(name: str) -> None:
        store = RemoteStore(here.where, shutil.copytree(here.root, tmp_path / f"root-{name}"))
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


def test_an_answer_that_was_lost_is_no_defeat(here: RemoteStore) -> None:
    objects = Objects(here.where)
    assert objects.swap("pointers/x", b"1", None)
    assert objects.swap("pointers/x", b"1", None)
    assert not objects.swap("pointers/x", b"2", None)
    now = objects.get("pointers/x")
    assert objects.swap("pointers/x", b"2", now)
    assert not objects.swap("pointers/x", b"3", now)
    assert objects.swap("pointers/x", b"2", now)


def test_a_prune_counts_references(here: RemoteStore, elsewhere: RemoteStore) -> None:
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
    here: RemoteStore, elsewhere: RemoteStore, monkeypatch: pytest.MonkeyPatch
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
        Generation.open(RemoteStore(here.where, here.root.parent / f"fresh-{before}").fetch("b"))
        Objects(here.where).delete(["pointers/CURRENT"])


def test_a_push_puts_back_what_a_prune_took_under_its_hands(
    here: RemoteStore, monkeypatch: pytest.MonkeyPatch
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


def test_a_damaged_or_missing_object_is_found_when_it_arrives(
    here: RemoteStore, elsewhere: RemoteStore
) -> None:
    here.publish("a")
    objects = Objects(here.where)
    facts = here.manifest("a")["files"]["popularity.npy"]
    key = f"objects/{facts['sha256']}"
    good = (here.path("a") / "popularity.npy").read_bytes()
    for bad in (good[:-1] + bytes([good[-1] ^ 1]), good[:-1], None):
        objects.delete([key])
        if bad is not None:
            objects.put(key, bad)
        with pytest.raises(ArtefactError, match="damaged" if bad else "missing") as error:
            elsewhere.fetch("a")
        assert key in str(error.value)
        assert not elsewhere.path("a").exists()
    # Publishing it again from where it was built heals a missing object.
    here.publish("a", pointer="again")
    assert contents(elsewhere.fetch("a")) == contents(here.path("a"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 99}, "schema version 99; this release reads"),
        ({"kind": "dataset"}, "holds a dataset"),
        ({"id": "b"}, "holds generation b"),
        ({"files": {"../../x": {"bytes": 1, "sha256": "0" * 64}}}, "outside of it"),
        ({"files": {"x": {"bytes": 1, "sha256": "../pointers/CURRENT"}}}, "no SHA-256"),
    ],
)
def test_a_manifest_that_is_not_understood_is_refused(
    here: RemoteStore, elsewhere: RemoteStore, changes: dict[str, Any], message: str
) -> None:
    here.publish("a")
    manifest = {**here.manifest("a"), **changes}
    Objects(here.where).put("generations/a/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(ArtefactError, match=message):
        elsewhere.fetch("a")
    before = keys(here, "objects/")
    # What can not be read may refer to anything.
    with pytest.raises(ArtefactError, match=message):
        elsewhere.prune(1, grace_s=0)
    assert keys(here, "objects/") == before
    assert not elsewhere.path("a").exists()


def test_another_generation_of_that_id_is_taken_from_the_bucket(
    here: RemoteStore, elsewhere: RemoteStore
) -> None:
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
from twotower.retrieval.objects import Objects
from twotower.retrieval.remote import RemoteStore
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
RemoteStore(url, cache).publish("b")
"""


@pytest.mark.parametrize("stage", ["objects/", "generations/", "pointers/", "publications/"])
def test_a_push_that_is_killed_changes_nothing(here: RemoteStore, elsewhere: RemoteStore, stage: str) -> None:
    here.publish("a")
    for file in contents(here.path("b")):
        if file.endswith(".npy"):
            change(here, "b", file)
    done = subprocess.run(
        [sys.executable, "-c", _PUSHER, stage, here.where, str(here.root)], capture_output=True, text=True
    )
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


def test_what_is_published_in_one_place_answers_alike_in_another(
    small_values: Callable[..., dict[str, Any]],
    small_dataset: Dataset,
    tmp_path: Path,
    bucket: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def config_at(root: str) -> Config:
        values = small_values(tmp_path / root)
        values["storage"]["store"] = bucket
        return parse_config(values)

    first, second = config_at("first"), config_at("second")
    checkpoint = untrained_checkpoint(first, small_dataset, first.checkpoints / "c")
    plain_generation(first, small_dataset, checkpoint, "g1")
    open_store(first).publish("g1")
    store = open_store(second)
    assert store.where == bucket
    current = store.current()
    assert current == "g1"
    ours, theirs = (Retriever.open(open_store(c).fetch("g1")) for c in (first, second))
    for user in ("u0", "u7", "u200"):
        query = Query(user_id=user, k=20, fields=ours.item_fields)
        assert ours.retrieve(query).items == theirs.retrieve(query).items
    path = tmp_path / "config.json"
    write_json(path, second.to_json())
    assert generations.main(["list", "--config", str(path)]) == 0
    out = capsys.readouterr().out
    assert "<- CURRENT" in out
    assert f'"path": "{bucket}"' in out
    for action in ("inspect", "verify"):
        assert generations.main([action, "--config", str(path)]) == 0


def test_places_that_can_not_be_used_are_named(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="storage.store: http://x is no place"):
        load_config(None, ["storage.store=http://x"])
    with pytest.raises(ConfigError, match="ftp://x/y is no place"):
        store_at("ftp://x/y", tmp_path)
    with pytest.raises(ConfigError, match="give one as its cache"):
        store_at(bucket)
    assert type(store_at(str(tmp_path))) is Store
    missing = store_at("s3://no-such-bucket/x", tmp_path)
    for call in (missing.current, missing.generations, lambda: missing.fetch("a")):
        with pytest.raises(ArtefactError, match="no such bucket"):
            call()
    monkeypatch.setenv("AWS_ALLOW_HTTP", "false")
    with pytest.raises(ArtefactError, match="AWS_ALLOW_HTTP=true"):
        store_at(bucket, tmp_path).current()
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"pip install 'twotower\[objectstore\]'"):
        store_at(bucket, tmp_path)


def test_a_pointer_without_a_publication_is_named(here: RemoteStore) -> None:
    objects = Objects(here.where)
    for data in (b"a", b"{}", b'{"number": 1}', b"[]"):
        objects.put("pointers/CURRENT", data)
        with pytest.raises(ArtefactError, match="pointers/CURRENT holds no publication"):
            here.current()


def test_the_age_of_objects_is_by_the_clock(here: RemoteStore) -> None:
    here.push("a")
    (first, *_) = Objects(here.where).list("objects/")
    assert abs((datetime.datetime.now(datetime.UTC) - first.modified).total_seconds()) < 600
