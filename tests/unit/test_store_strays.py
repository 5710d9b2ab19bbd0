"""What does not belong into a store, or is damaged there, keeps nobody from the rest, and is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import generations as job
from tests.generations import edit_manifest, light_generation, light_manifest
from tests.updates import write_config
from twotower.artefacts import MANIFEST
from twotower.config import Config, parse_config
from twotower.errors import ArtefactError, RefusedError
from twotower.generations.store import Store


def nested(path: Path) -> None:
    path.mkdir()
    (path / MANIFEST).write_text("[" * 100_000)


def binary(path: Path) -> None:
    path.mkdir()
    (path / MANIFEST).write_bytes(b"\xff\xfe\x00")


def folder_as_manifest(path: Path) -> None:
    """Whatever the user, this can not be read."""
    (path / MANIFEST).mkdir(parents=True)


def loop(path: Path) -> None:
    path.symlink_to(path)


STRAYS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "file": ("generations/notes", lambda p: p.write_text("hello")),
    "hidden": ("generations/.DS_Store", lambda p: p.write_bytes(b"\0\1")),
    "strange name": ("generations/a b\nc", lambda p: p.mkdir()),
    "long name": ("generations/" + "x" * 200, lambda p: p.mkdir()),
    "empty folder": ("generations/empty", lambda p: p.mkdir()),
    "dangling link": ("generations/gone", lambda p: p.symlink_to("/nowhere/at/all")),
    "loop": ("generations/loop", loop),
    "fifo": ("generations/pipe", os.mkfifo),
    "no json": ("generations/torn", lambda p: (p.mkdir(), (p / MANIFEST).write_text('{"kind": "gen'))),
    "nested": ("generations/deep", nested),
    "binary": ("generations/bin", binary),
    "unreadable": ("generations/locked", folder_as_manifest),
    "copy": ("generations/g1.bak", lambda p: (p.mkdir(), light_manifest(p, "g1", "1"))),
    "root file": ("notes.txt", lambda p: p.write_text("look at this\nlater")),
    "root binary": ("core.17", lambda p: p.write_bytes(bytes(range(256)) * 99)),
    "root folder": ("backup", lambda p: p.mkdir()),
    "root link": ("old", lambda p: p.symlink_to("/nowhere/at/all")),
    "root fifo": ("pipe", os.mkfifo),
    "empty pointer": ("candidate", lambda p: p.touch()),
    "lost pointer": ("other", lambda p: p.write_text("g99\n")),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of four generations, three of them published one after the other."""
    store = Store(tmp_path_factory.mktemp("made") / "store")
    for name in ("g1", "g2", "g3", "g4"):
        light_generation(store, name)
    for name in ("g1", "g2", "g4"):
        store.publish(name)
    return store.root


@pytest.fixture
def shop(made: Path, tmp_path: Path) -> Config:
    config = parse_config({"name": "s", "storage": {"root": str(tmp_path / "runs")}})
    shutil.copytree(made, config.store)
    return config


@pytest.fixture
def run(shop: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    file = write_config(shop, tmp_path / "config.yaml")

    def call(*arguments: str) -> tuple[int, dict[str, Any], str]:
        code = job.main([*arguments, "--config", str(file)])
        out, err = capsys.readouterr()
        return code, {} if code else json.loads(out.splitlines()[-1].partition(" ")[2]), out + err

    return call


@pytest.mark.parametrize("kind", STRAYS)
def test_the_rest_is_listed_rolled_back_and_pruned(run: Any, shop: Config, kind: str) -> None:
    name, make = STRAYS[kind]
    stray = shop.store / name
    make(stray)
    shown = name.rpartition("/")[2].splitlines()[0]
    if kind in ("root link",):
        # It leads nowhere, as a pointer that was never set.
        shown = ""
    code, listed, text = run("list")
    assert code == 0, text
    assert [g["id"] for g in listed["generations"]] == ["g1", "g2", "g3", "g4"]
    assert any(shown in sentence for sentence in listed["passed_over"]) or not shown
    assert not shown or f"{shown}" in text
    code, done, text = run("rollback")
    assert (code, done.get("generation")) == (0, "g2"), text
    code, done, text = run("prune", "--keep", "1")
    assert (code, done.get("removed")) == (0, ["g1", "g3"]), text
    assert os.path.lexists(stray)
    assert Store(shop.store).generations() == ["g2", "g4"]


def test_nothing_is_passed_over_where_all_is_well(run: Any, shop: Config) -> None:
    (shop.store / "generations" / ".x.partial").mkdir()
    (shop.store / "generations" / ".x.lock").touch()
    (shop.store / ".CURRENT.17.tmp").touch()
    code, listed, _ = run("list")
    assert (code, listed["passed_over"]) == (0, [])


def test_what_a_damaged_pointer_named_last_is_not_pruned(run: Any, shop: Config) -> None:
    """An empty file is what a full disk leaves of it."""
    store = Store(shop.store)
    store.publish("g1", "candidate", force=True)
    (store.root / "candidate").write_bytes(b"")
    code, done, text = run("prune", "--keep", "1")
    assert (code, done["removed"]) == (0, ["g2", "g3"]), text
    assert "candidate" in text
    # Where nothing says what it named, nothing goes.
    (store.root / "publications.jsonl").write_text("torn\n")
    code, _, text = run("prune", "--keep", "1")
    assert code == 2
    assert "line 1 of" in text
    assert store.generations() == ["g1", "g4"]


def test_a_rollback_to_what_is_damaged_names_what_is_left(shop: Config) -> None:
    store = Store(shop.store)
    (store.path("g2") / MANIFEST).write_text("{}")
    with pytest.raises(RefusedError, match=r"g2 before g4, and that can not be read\. .*still there: g1;"):
        store.rollback()
    edit_manifest(store.path("g1"), replaces=["g2"])
    assert store.rollback().id == "g1"


def test_a_new_generation_is_published_over_a_damaged_one(shop: Config) -> None:
    store = Store(shop.store)
    (store.path("g4") / MANIFEST).write_bytes(b"{}")
    assert store.publish("g3") == "g4"
    assert store.fallbacks() == ["g2", "g1"]


def test_a_store_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = parse_config({"name": "s", "storage": {"root": str(tmp_path / "runs")}})
    file = write_config(config, tmp_path / "config.yaml")
    for arguments in (["list"], ["prune", "--keep", "1"], ["rollback"], ["inspect"], ["publish", "g1"]):
        assert job.main([*arguments, "--config", str(file)]) == 2
        shown = capsys.readouterr().err
        assert f"no store at {config.store}" in shown
        assert "jobs.pipeline" in shown
    assert not (tmp_path / "runs").exists()
    config.store.mkdir(parents=True)
    assert job.main(["list", "--config", str(file)]) == 0
    assert '"generations": []' in capsys.readouterr().out


def test_a_folder_that_can_not_be_read_is_an_error_in_a_line(shop: Config, monkeypatch: Any) -> None:
    def refuse(path: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("twotower.generations.survey.os.listdir", refuse)
    with pytest.raises(ArtefactError, match=r"generations can not be read \(Permission denied\)"):
        Store(shop.store).generations()
