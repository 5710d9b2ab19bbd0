"""Only files that a manifest lists are read, and only where they lie in the directory itself."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.shop import build_store
from twotower.artefacts import MANIFEST
from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.errors import ArtefactError
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.generations.writing import write_tables
from twotower.lifecycle.update import update_items
from twotower.listing import listed_file, name_problem
from twotower.model.checkpoint import Checkpoint
from twotower.retrieval.query import Query
from twotower.retrieval.retriever import Retriever

OUT = [
    "../x", "a/../../x", "a/..", "..", ".", "", "/etc/passwd", "a//b", "./a", "a/", "a\\b", "..\\x", "a\x00b",
    "a\nb", "a\x7f", "x" * 256, "a/" * 600 + "a", MANIFEST,
]  # fmt: skip


@pytest.mark.parametrize("name", OUT)
def test_names_that_lead_out(name: str, tmp_path: Path) -> None:
    assert name_problem(name)
    with pytest.raises(ArtefactError, match="Again"):
        listed_file(tmp_path, name, [name], "Again.")


@given(st.text(max_size=20))
def test_a_name_that_is_allowed_stays_inside(name: str) -> None:
    if name_problem(name) is None:
        assert os.path.normpath(os.path.join("/a/b", name)) == f"/a/b/{name}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Dataset, Path]:
    return build_store(tmp_path_factory.mktemp("listed"))


@pytest.fixture
def shop(made: tuple[Config, Dataset, Path], tmp_path: Path) -> tuple[Store, Path, Path]:
    """Copies of the store, the dataset and the checkpoint."""
    config, dataset, _ = made
    shutil.copytree(config.store, tmp_path / "store")
    shutil.copytree(dataset.path, tmp_path / "dataset")
    shutil.copytree(config.home.parents[1] / "checkpoint", tmp_path / "checkpoint")
    return Store(tmp_path / "store"), tmp_path / "dataset", tmp_path / "checkpoint"


def opened(path: Path) -> None:
    """Open whatever it is."""
    kind = json.loads((path / MANIFEST).read_bytes())["kind"]
    if kind == "generation":
        generation = Generation.open(path)
        Retriever.open(path)
        generation.checkpoint()
    elif kind == "checkpoint":
        Checkpoint.open(path)
    else:
        dataset = Dataset.open(path)
        assert len(dataset.interactions)
        assert len(dataset.user_table()) + len(dataset.item_table()) + len(dataset.item_ids)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_link_or_a_pipe_in_the_place_of_a_file(shop: Any, place: int, tmp_path: Path) -> None:
    path = shop[0].path("g1") if place == 0 else shop[place]
    opened(path)
    names = list(json.loads((path / MANIFEST).read_bytes())["files"])
    away = tmp_path / "away"
    for name in names[:: max(len(names) // 6, 1)]:
        os.replace(path / name, away)
        # The same bytes: a hash alone does not tell.
        (path / name).symlink_to(away)
        with pytest.raises(ArtefactError, match="is a link that leads out of"):
            opened(path)
        (path / name).unlink()
        os.mkfifo(path / name)
        with pytest.raises(ArtefactError, match="is no regular file"):
            opened(path)
        (path / name).unlink()
        os.replace(away, path / name)
    opened(path)
    # A directory may be reached by a link.
    (tmp_path / "link").symlink_to(path)
    opened(tmp_path / "link")


def test_nothing_unlisted_is_read_or_taken_along(made: Any, shop: Any, tmp_path: Path) -> None:
    config = made[0]
    store, dataset, checkpoint = shop
    path = store.path("g1")
    before = Retriever.open(path).retrieve(Query(user_id="3", k=20))
    for folder in (
        path,
        path / "users",
        path / "model",
        path / "shards",
        dataset,
        dataset / "items",
        checkpoint,
    ):
        (folder / "notes.txt").write_text("mine")
        (folder / ".DS_Store").write_text("x")
    (path / "users" / "column-zz.npy").write_bytes(b"no array")
    (path / "tombstones.npy").write_bytes(b"no array")
    (path / "shards" / "00009").mkdir()
    (dataset / "items" / "part-99999.parquet").write_bytes(b"no parquet")
    after = Retriever.open(path).retrieve(Query(user_id="3", k=20))
    assert after.items == before.items
    opened(dataset)
    opened(checkpoint)
    (tmp_path / "built").mkdir()
    write_tables(tmp_path / "built", config, Dataset.open(dataset), Checkpoint.open(checkpoint))
    strays = ("notes.txt", ".DS_Store", "column-zz.npy")
    assert not [p for p in (tmp_path / "built").rglob("*") if p.name in strays]
    updated = store.path(update_items(store, deletes=["1001"]).generation)
    assert not [p for p in updated.rglob("*") if p.name in strays or p.name == "00009"]


def test_a_file_that_the_manifest_does_not_list_is_not_opened(shop: Any) -> None:
    store, dataset, checkpoint = shop
    for path, name in (
        (store.path("g1"), "users/seen_offsets.npy"),
        (store.path("g1"), "shards/00001/index.faiss"),
        (store.path("g1"), "model/model.safetensors"),
        (dataset, "interactions.parquet"),
        (checkpoint, "config.json"),
    ):
        text = (path / MANIFEST).read_text()
        manifest = json.loads(text)
        del manifest["files"][name]
        (path / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(ArtefactError, match=f"lists no {name}|not as its manifest says|is damaged"):
            opened(path)
        (path / MANIFEST).write_text(text)
    opened(store.path("g1"))


def test_a_changed_configuration_of_a_checkpoint_is_refused(shop: Any) -> None:
    file = shop[2] / "config.json"
    file.write_text(file.read_text().replace('"normalize": true', '"normalize": false'))
    with pytest.raises(ArtefactError, match=r"config\.json is not as its manifest says"):
        Checkpoint.open(shop[2])
