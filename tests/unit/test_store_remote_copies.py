"""Copies of what a bucket holds: damaged ones are repaired, and they are used while the bucket is away."""

from __future__ import annotations

import pytest

from tests.buckets import contents
from tests.following import Make, damage
from twotower.errors import ArtefactError, UnavailableError
from twotower.generations.folder import Folder
from twotower.generations.generation import Generation
from twotower.generations.objects import Objects
from twotower.generations.opening import store_at
from twotower.generations.store import Store
from twotower.retrieval.holder import GroupHolder

FILE = "popularity.npy"


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of objects as they are downloaded."""
    keys: list[str] = []
    download = Objects.download

    def noted(self, key, path):
        keys.append(key)
        return download(self, key, path)

    monkeypatch.setattr(Objects, "download", noted)
    return keys


def test_only_what_is_damaged_is_fetched_again(here: Store, elsewhere: Store, downloads: list[str]) -> None:
    here.publish("a")
    path = elsewhere.fetch("a")
    before = (path / "model" / "model.safetensors").stat().st_ino
    assert elsewhere.repair("a")
    assert (path / "model" / "model.safetensors").stat().st_ino == before
    damage(path / FILE)
    with pytest.raises(ArtefactError, match=f"{FILE} is damaged"):
        Generation.open(path, verify=True)
    downloads.clear()
    assert elsewhere.repair("a")
    assert downloads == [f"objects/{here.manifest('a')['files'][FILE]['sha256']}"]
    assert contents(path) == contents(here.path("a"))
    # Nothing to take it from.
    assert not elsewhere.repair("b")
    assert not Folder(here.root).repair("a")


def test_a_follower_repairs_a_copy(here: Store, elsewhere: Store, make: Make, downloads: list[str]) -> None:
    here.publish("a")
    damage(elsewhere.fetch("a") / FILE)
    user = make(elsewhere)
    assert user.retriever.generation_id == "a"
    # Also one that it goes over to.
    here.push("b")
    other = elsewhere.fetch("b") / FILE
    content = other.read_bytes()
    # Not the same file as that of the other generation.
    other.unlink()
    other.write_bytes(content)
    damage(other)
    here.publish("b")
    user.wait_for("b")
    assert user.refused == []


@pytest.mark.parametrize("damaged", [False, True])
def test_a_group_repairs_its_part(here: Store, elsewhere: Store, damaged: bool) -> None:
    here.publish("a")
    path = elsewhere.fetch("a")
    (shard, *_) = Generation.open(path).shard_groups(1)[0]
    damage(path / "shards" / shard / "index.faiss")
    if damaged:
        facts = here.manifest("a")["files"][f"shards/{shard}/index.faiss"]
        Objects(here.where).put(f"objects/{facts['sha256']}", b"nonsense")
    holder = GroupHolder(elsewhere, 0, 1)
    if damaged:
        with pytest.raises(ArtefactError, match="is damaged: it has 8 bytes"):
            holder.load("a")
    else:
        holder.load("a")
    assert set(holder.held) == (set() if damaged else {"a"})


def test_a_copy_answers_while_the_bucket_does_not(
    here: Store, elsewhere: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.publish("a")
    here.publish("b")
    path = elsewhere.fetch("a")
    # obstore refuses to ask.
    monkeypatch.setenv("AWS_ALLOW_HTTP", "false")
    away = store_at(here.where, elsewhere.root)
    assert away.fetch("a") == path
    with pytest.raises(UnavailableError, match="reading generations/b/manifest.json failed"):
        away.fetch("b")
    holder = GroupHolder(away, 0, 1)
    holder.need("gateway", ["a", "b"])
    while not (holder.held and holder.failed):
        assert not holder.refused
    assert (set(holder.held), set(holder.failed)) == ({"a"}, {"b"})
