"""Stores in a bucket: what is published in one place and read in another."""

from __future__ import annotations

import datetime
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import generations
from tests.buckets import change, contents, hashes, keys
from tests.generations import edit_index, edit_manifest, plain_generation, untrained_checkpoint
from twotower.artefacts import MANIFEST, write_json
from twotower.config import Config, load_config, parse_config
from twotower.data.dataset import Dataset
from twotower.errors import ArtefactError, ConfigError, RefusedError
from twotower.generations.bucket import Bucket
from twotower.generations.files import file_facts
from twotower.generations.generation import Generation
from twotower.generations.objects import Objects
from twotower.generations.opening import open_store, store_at
from twotower.generations.place import too_late
from twotower.generations.publications import Publication
from twotower.generations.store import Store
from twotower.lifecycle.update import update_items
from twotower.retrieval.query import Query
from twotower.retrieval.retriever import Retriever


def test_what_is_pushed_arrives_byte_for_byte(here: Store, elsewhere: Store) -> None:
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


def test_a_large_file_goes_up_in_parts(here: Store, tmp_path: Path) -> None:
    objects = Objects(here.where)
    path = tmp_path / "large"
    path.write_bytes(os.urandom(1 << 20) * 20)
    objects.upload("objects/large", path)
    assert objects.download("objects/large", tmp_path / "back") == tuple(file_facts(path).values())
    assert (tmp_path / "back").read_bytes() == path.read_bytes()


def test_generations_share_what_is_equal(here: Store, elsewhere: Store) -> None:
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


def test_gates_pointers_the_log_and_the_way_back(here: Store, elsewhere: Store) -> None:
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


def test_a_damaged_or_missing_object_is_found_when_it_arrives(here: Store, elsewhere: Store) -> None:
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
        ({"files": {"../../x": {"bytes": 1, "sha256": "0" * 64}}}, "is damaged .*outside of it"),
        ({"files": {"x": {"bytes": 1, "sha256": "../pointers/CURRENT"}}}, "is damaged .*sha256"),
    ],
)
def test_a_manifest_that_is_not_understood_is_refused(
    here: Store, elsewhere: Store, changes: dict[str, Any], message: str
) -> None:
    here.publish("a")
    manifest = {**here.manifest("a"), **changes}
    Objects(here.where).put("generations/a/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(ArtefactError, match=message):
        elsewhere.fetch("a")
    before = keys(here, "objects/")
    # What can not be read may refer to any object; the other generations go on without it.
    here.push("b")
    here.push("c")
    known = keys(here, "objects/")
    assert set(before) <= set(known)
    assert any(re.search(message, sentence) for sentence in elsewhere.passed_over())
    assert elsewhere.generations() == ["b", "c"]
    assert elsewhere.prune(1, grace_s=0).generations == ["b"]
    assert keys(here, "objects/") == known
    assert keys(here, "generations/") == ["generations/a/manifest.json", "generations/c/manifest.json"]
    assert not elsewhere.path("a").exists()


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


def test_an_update_made_elsewhere_sends_only_what_changed(here: Store, elsewhere: Store) -> None:
    here.publish("a")
    before = keys(here, "objects/")
    gone = Generation.open(here.path("a")).item_ids.id(7)
    update = update_items(elsewhere, deletes=[gone])
    assert (update.base, update.deleted, here.current()) == ("a", 1, update.generation)
    assert len(set(keys(here, "objects/")) - set(before)) < 5
    answered = Retriever.open(here.fetch(update.generation)).retrieve(Query(user_id="u7", k=500)).items
    assert gone not in [item["item_id"] for item in answered]
    assert len(answered) > 100
    # One who was slower leaves nothing in its own folder.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bucket, "swap", _always_late)
        with pytest.raises(RefusedError, match="faster"):
            update_items(elsewhere, deletes=[Generation.open(here.path("a")).item_ids.id(8)])
    assert sorted(p.name for p in (elsewhere.root / "generations").glob("[!.]*")) == sorted(
        ["a", update.generation]
    )


def _always_late(place: Bucket, entry: Publication, check: object) -> None:
    raise too_late(entry, "z")


def test_places_that_can_not_be_used_are_named(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="storage.store: http://x is no place"):
        load_config(None, ["storage.store=http://x"])
    with pytest.raises(ConfigError, match="ftp://x/y is no place"):
        store_at("ftp://x/y", tmp_path)
    with pytest.raises(ConfigError, match="give one as its cache"):
        store_at(bucket)
    assert store_at(str(tmp_path)).where == str(tmp_path)
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


def test_a_pointer_without_a_publication_is_named(here: Store) -> None:
    objects = Objects(here.where)
    for data in (b"a", b"{}", b'{"number": 1}', b"[]"):
        objects.put("pointers/CURRENT", data)
        with pytest.raises(ArtefactError, match="pointers/CURRENT is damaged .* holds no publication"):
            here.current()


def test_the_age_of_objects_is_by_the_clock(here: Store) -> None:
    here.push("a")
    (first, *_) = Objects(here.where).list("objects/")
    assert abs((datetime.datetime.now(datetime.UTC) - first.modified).total_seconds()) < 600


def test_what_does_not_belong_into_a_bucket_is_passed_over(here: Store, elsewhere: Store) -> None:
    for name in ("a", "c"):
        here.publish(name)
    objects = Objects(here.where)
    strays = [f"pointers/{name}" for name in (".DS_Store", "candidate", "a b")]
    strays += [f"generations/{name}" for name in ("x y/manifest.json", "notes.txt", "a/b/manifest.json")]
    strays.append("generations/z/manifest.json")
    for key in strays:
        objects.put(key, b"\xff")
    assert elsewhere.generations() == ["a", "c"]
    assert elsewhere.pointers() == {"CURRENT": "c"}
    told = elsewhere.passed_over()
    for key in strays:
        assert any(key.rpartition("/manifest")[0] or key.rpartition("/")[2] in t for t in told), key
    assert elsewhere.rollback().id == "a"
    assert elsewhere.prune(1, grace_s=0).generations == []
    # One that the log knows, and that is damaged: what it named last stays.
    here.publish("c", "next")
    objects.put("pointers/next", b"")
    here.push("b")
    edit_manifest(here.path("b"), created="9")
    assert "c" not in elsewhere.prune(1, grace_s=0).generations
