"""Users who are forgotten in a bucket, and in the caches before it."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from jobs import forget as job
from tests.apart import run_apart
from tests.buckets import keys
from tests.forgetting import COLOUR, GONE, ITEM, answers, files_with, fill, lists_of, make_files, others
from tests.updates import write_config
from twotower.artefacts import write_json
from twotower.config import Config, parse_config
from twotower.data.prepare import prepare
from twotower.errors import RefusedError
from twotower.generations.bucket import Bucket
from twotower.generations.bucket_pointers import BucketPointers
from twotower.generations.generation import Generation
from twotower.generations.objects import Objects
from twotower.generations.opening import store_at
from twotower.generations.publications import Publication
from twotower.generations.store import Store
from twotower.lifecycle.forget import forget_users
from twotower.lifecycle.update import update_items


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict[str, str], Path]:
    """A local store, to be copied into buckets."""
    root = tmp_path_factory.mktemp("remote")
    config = make_files(root)
    store = Store(config.store)
    names = fill(config, store, prepare(config))
    lists_of(config, store.path("build"))
    return config, names, root / "runs"


@pytest.fixture
def shop(made: Any, bucket: str, tmp_path: Path) -> Config:
    """All generations are in the bucket and in the cache; pointers as in the local store."""
    values = made[0].to_json()
    values["storage"] = {"root": str(tmp_path / "runs"), "store": bucket, "keep_generations": None}
    config = parse_config(values)
    shutil.copytree(made[2], tmp_path / "runs")
    store = store_at(bucket, config.store)
    for name in ("other", "build", made[1]["update"]):
        store.publish(name)
    store.publish("other", "candidate")
    for name in ("CURRENT", "candidate", "publications.jsonl"):
        (config.store / name).unlink()
    return config


@pytest.fixture
def store(shop: Config) -> Store:
    return store_at(str(shop.storage.store), shop.store)


def objects_with(store: Store, *needles: str) -> set[str]:
    objects = Objects(store.where)
    found = set()
    for key in keys(store, ""):
        content = objects.get(key)
        assert content is not None
        if any(n.encode() in content.data for n in needles):
            found.add(key.partition("/")[0])
    return found


def assert_gone(store: Store, shop: Config, names: dict[str, str]) -> None:
    assert objects_with(store, GONE, COLOUR) == set()
    assert files_with(shop.home, GONE, COLOUR, ITEM) == set()
    manifests = {name: store.manifest(name) for name in store.generations()}
    to = {manifest["replaces"][0]: name for name, manifest in manifests.items()}
    assert set(to) == set(names.values())
    assert store.pointers() == {"CURRENT": to[names["update"]], "candidate": to["other"]}
    # Every object is of a generation that is there.
    needed = {f"objects/{f['sha256']}" for m in manifests.values() for f in m["files"].values()}
    assert set(keys(store, "objects/")) == needed


def test_nothing_of_the_user_is_left_in_the_bucket(made: Any, shop: Config, store: Store) -> None:
    names = made[1]
    assert objects_with(store, GONE) == {"objects"}
    assert objects_with(store, COLOUR) == {"objects"}
    # What a push that was killed has left.
    Objects(store.where).put("objects/" + "0" * 64, GONE.encode())
    dataset = prepare(shop)
    before = {name: answers(store.fetch(name), others(dataset)) for name in names.values()}
    large = {f["sha256"] for n, f in store.manifest("build")["files"].items() if n.endswith("index.faiss")}
    elsewhere = store_at(store.where, shop.home.parent / "elsewhere")
    elsewhere.fetch("build")

    done = forget_users(shop, store, [GONE])
    assert done.left == []
    assert {c.name for c in done.changes if c.kind == "generation"} == set(names.values())
    assert_gone(store, shop, names)
    assert {f"objects/{sha256}" for sha256 in large} <= set(keys(store, "objects/"))
    for name in store.generations():
        path = elsewhere.fetch(name)
        Generation.open(path, verify=True)
        assert GONE not in Generation.open(path).user_ids
        assert answers(path, others(dataset)) == before[store.manifest(name)["replaces"][0]]
    assert elsewhere.rollback().id == next(
        n for n in store.generations() if "build" in store.manifest(n)["replaces"]
    )
    # A copy that another machine has kept does not come back.
    with pytest.raises(RefusedError, match="made with users who have been forgotten since"):
        elsewhere.publish("build")
    assert objects_with(store, GONE) == set()
    assert "build" not in store.generations()


def test_an_update_of_another_machine_comes_too_late(shop: Config, store: Store) -> None:
    """It read the generation before, and publishes after."""
    # The user who is forgotten when everything is built, or when everything is pushed.
    when: dict[str, str] = {}

    class Slow(Store):
        def publish(self, *args: Any, **kwargs: Any) -> Any:
            if "publish" in when:
                forget_users(shop, store, [when["publish"]])
            return super().publish(*args, **kwargs)

    class SlowBucket(Bucket):
        def push(self, *args: Any, **kwargs: Any) -> None:
            # After the first question whether it may be published, and before there is anything to find.
            if "push" in when:
                forget_users(shop, store, [when["push"]])
            super().push(*args, **kwargs)

    other = Slow(SlowBucket(store.where, shop.home.parent / "elsewhere"))
    for stage, user in (("publish", GONE), ("push", "14")):
        when = {stage: user}
        with pytest.raises(RefusedError):
            update_items(other, deletes=["1007"])
        for name in store.generations():
            assert user not in Generation.open(store.fetch(name)).user_ids
        assert len(store.generations()) == 3
        assert objects_with(store, GONE) == set()
        needed = {
            f"objects/{f['sha256']}" for n in store.generations() for f in store.manifest(n)["files"].values()
        }
        assert set(keys(store, "objects/")) == needed
    assert store.current() in store.generations()


def test_a_pointer_that_is_set_too_late_brings_nobody_back(
    shop: Config, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine has asked twice whether it may publish, and has a copy, when a user is forgotten."""
    other = store_at(store.where, shop.home.parent / "elsewhere")
    other.fetch("build")
    plain = BucketPointers.swap

    def late(pointers: BucketPointers, entry: Publication, replaced: Any) -> Any:
        if entry.pointer == "late":
            forget_users(shop, store, [GONE])
        return plain(pointers, entry, replaced)

    monkeypatch.setattr(BucketPointers, "swap", late)
    with pytest.raises(RefusedError):
        other.publish("build", "late")
    assert objects_with(store, GONE) == set()
    assert "build" not in store.generations()
    # Whoever publishes it again is refused too, though the pointer names it already.
    with pytest.raises(RefusedError):
        other.publish("build", "late")
    assert objects_with(store, GONE) == set()


JOB = """
import os, signal, sys
from twotower.config import load_config
from twotower.lifecycle.forget import forget_users
from twotower.generations.objects import Objects
from twotower.generations.opening import open_store

_, config_path, user, fatal = sys.argv
left = [int(fatal)]

def fatal_call(plain):
    def call(*arguments, **named):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments, **named)
    return call

for name in ("put", "swap", "upload", "delete"):
    setattr(Objects, name, fatal_call(getattr(Objects, name)))
config = load_config(config_path)
forget_users(config, open_store(config), [user])
print(-left[0])
"""


def test_a_killed_run_is_finished_by_the_next_one(
    made: Any, shop: Config, store: Store, tmp_path: Path
) -> None:
    """At several writes to the bucket, one after the other; nothing of an earlier run is in the way."""
    file = write_config(shop, tmp_path / "config.yaml")
    for fatal in (1, 4, 9, 30, 12):
        done = run_apart(JOB, file, GONE, fatal)
        assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
        for name in store.pointers().values():
            Generation.open(store_at(store.where, tmp_path / "reader").fetch(name), verify=True)
    forget_users(shop, store, [GONE])
    assert_gone(store, shop, made[1])


def test_the_job_on_a_bucket(made: Any, shop: Config, store: Store, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", shop.to_json())
    assert job.main(["--config", str(tmp_path / "config.json"), "--user-id", GONE]) == 0
    assert_gone(store, shop, made[1])
