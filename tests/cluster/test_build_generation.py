"""Encoding and building on a real local Ray, against the same in one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.generations import catalogue_vectors, plain_generation, untrained_checkpoint
from twotower.cluster.build import build_generation
from twotower.cluster.runner import OnRay
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.errors import ArtefactError, ArtefactMismatchError, ConfigError
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.index.spec import shard_of
from twotower.lifecycle.catalogue import Catalogue
from twotower.model.checkpoint import Checkpoint, weights_of, write_checkpoint
from twotower.model.towers import TwoTower
from twotower.pipeline import build
from twotower.pipeline.build import generation_id
from twotower.pipeline.encode import EncodeItems, encode_catalogue, load_vectors


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, small_values: Callable[..., dict[str, Any]]) -> Config:
    return parse_config(small_values(tmp_path_factory.mktemp("build")))


@pytest.fixture(scope="module")
def checkpoint(config: Config, small_dataset: Dataset) -> Checkpoint:
    return untrained_checkpoint(config, small_dataset, config.checkpoints / "c")


def with_index(config: Config, root: Path, **index: Any) -> Config:
    values = config.to_json()
    values["storage"]["root"] = str(root)
    values["index"] |= index
    return parse_config(values)


class DyingEncoder(EncodeItems):
    """Dies once, after it has written a part and before it says so."""

    def __call__(self, table: pa.Table) -> pa.Table:
        facts = super().__call__(table)
        mark = self._directory.parent / "died"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return facts


def moved(work: pa.Table, by: int) -> pa.Table:
    """Work that begins some items later, under the same name."""
    start = max(work["start"][0].as_py() + by, 0)
    return work.set_column(work.column_names.index("start"), "start", pa.array([start]))


class RepeatingEncoder(EncodeItems):
    """Begins each part but the first one item too early."""

    def __call__(self, work: pa.Table) -> pa.Table:
        return super().__call__(moved(work, -1))


class LosingEncoder(EncodeItems):
    """Leaves the first item of each part out."""

    def __call__(self, work: pa.Table) -> pa.Table:
        return super().__call__(moved(work, 1))


@pytest.mark.parametrize(("num_shards", "encoder"), [(3, EncodeItems), (1, DyingEncoder)])
def test_ray_encodes_as_one_process_does(
    num_shards: int,
    encoder: type[EncodeItems],
    ray_local: None,
    config: Config,
    small_dataset: Dataset,
    checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    out = tmp_path / "parts"
    catalogue = Catalogue.of(small_dataset)
    parts = encode_catalogue(checkpoint.path, catalogue, out, config, num_shards, OnRay(config), encoder)
    assert len(parts) > 1
    assert (tmp_path / "died").exists() == (encoder is DyingEncoder)
    # Files of the attempt that died are gone.
    assert len(list(out.iterdir())) == 3 * len(parts)
    found = load_vectors(parts, small_dataset.num_catalogue_items)
    np.testing.assert_allclose(found, catalogue_vectors(checkpoint, small_dataset), atol=1e-6)
    shards = shard_of(small_dataset.item_table()["item_id"].to_pylist(), num_shards)
    for part in parts:
        for number in range(num_shards):
            rows = part.item_rows()[part.shard(number)]
            assert (shards[rows] == number).all()
            assert (np.diff(rows) > 0).all()
    if encoder is EncodeItems:
        # A run that was killed left two parts whole and one half: the rest is encoded, the whole stay.
        whole, half = parts[:2], parts[2]
        for part in parts[2:]:
            Path(f"{part.path}.rows.npy").unlink()
        before = [Path(f"{part.path}.rows.npy").stat().st_mtime_ns for part in whole]
        assert encode_catalogue(checkpoint.path, catalogue, out, config, num_shards, OnRay(config)) == parts
        assert [Path(f"{part.path}.rows.npy").stat().st_mtime_ns for part in whole] == before
        assert Path(f"{half.path}.rows.npy").is_file()
        assert (load_vectors(parts, small_dataset.num_catalogue_items) == found).all()


@pytest.mark.parametrize(
    ("encoder", "message"),
    [(RepeatingEncoder, "encoded twice"), (LosingEncoder, r"of 210 items were not encoded, the first is")],
)
def test_items_are_counted_once(
    encoder: type[EncodeItems],
    message: str,
    ray_local: None,
    config: Config,
    small_dataset: Dataset,
    checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    catalogue, runner = Catalogue.of(small_dataset), OnRay(config)
    with pytest.raises(ArtefactError, match=message):
        encode_catalogue(checkpoint.path, catalogue, tmp_path / "parts", config, 2, runner, encoder)


def test_a_generation_built_on_ray_is_that_of_one_process(
    ray_local: None,
    config: Config,
    small_dataset: Dataset,
    checkpoint: Checkpoint,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = build_generation(config, small_dataset, checkpoint.path)
    shown = capfd.readouterr()
    # The raylet may print there what it thinks of workers of earlier tests.
    assert [line for line in shown.out.splitlines() if "(raylet)" not in line] == []
    assert len(shown.err.splitlines()) < 20
    for noise in ("Traceback", "core_worker", "WARNING", "Dataset"):
        assert noise not in shown.err
    generation = Generation.open(path)
    plain = Generation.open(plain_generation(with_index(config, tmp_path), small_dataset, checkpoint, "p"))
    assert [s["rows"] for s in generation.manifest["shards"]] == [s["rows"] for s in plain.manifest["shards"]]
    assert generation.manifest["index"]["index_recall"] == 1.0
    differing = {
        name
        for name, facts in generation.manifest["files"].items()
        if facts["sha256"] != plain.manifest["files"][name]["sha256"]
    }
    assert set(generation.manifest["files"]) == set(plain.manifest["files"])
    # Vectors of other batches may differ in the last bits.
    assert differing <= {"config.json", *(f"shards/0000{n}/index.faiss" for n in range(3))}
    rows = np.arange(210)
    np.testing.assert_allclose(generation.searcher().vectors(rows), plain.searcher().vectors(rows), atol=1e-6)

    before = path.stat().st_mtime_ns
    assert build_generation(config, small_dataset, checkpoint.path) == path
    assert path.stat().st_mtime_ns == before
    assert "is there already" in capfd.readouterr().err
    assert [p.name for p in (config.store / ".work").iterdir()] == [f"{path.name}.lock"]
    store = Store(config.store)
    assert store.current() is None
    store.publish(path.name)
    assert store.current() == path.name


def test_an_index_that_can_not_be_built_says_so_plainly(
    ray_local: None, config: Config, small_dataset: Dataset, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"^index.factory 'IVF300,Flat' has 300 centroids, but there are only"
    ):
        build_generation(with_index(config, tmp_path, factory="IVF300,Flat"), small_dataset, checkpoint.path)
    with pytest.raises(ConfigError, match="'Flatt'"):
        build_generation(with_index(config, tmp_path, factory="Flatt"), small_dataset, checkpoint.path)
    store = Store(with_index(config, tmp_path).store)
    assert store.generations() == []
    assert list((store.root / ".work").glob("*-*")) == []


def test_a_broken_tower_and_a_foreign_vocabulary_are_refused(
    ray_local: None,
    config: Config,
    small_dataset: Dataset,
    checkpoint: Checkpoint,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = TwoTower(small_dataset.schema, config.model, config.train.loss.temperature, seed=1)
    weights = {
        name: torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor
        for name, tensor in weights_of(model).items()
    }
    (tmp_path / "nan").mkdir()
    write_checkpoint(tmp_path / "nan", weights, small_dataset, config, {})
    with pytest.raises(ConfigError, match=r"^vector \d+ holds NaN"):
        build_generation(with_index(config, tmp_path), small_dataset, tmp_path / "nan")
    assert "Traceback" not in capfd.readouterr().err

    foreign = Dataset.open(small_dataset.path)
    foreign.manifest = {**foreign.manifest, "vocabulary_hash": "another"}
    with pytest.raises(ArtefactMismatchError, match="another"):
        build_generation(with_index(config, tmp_path), foreign, checkpoint.path)
    assert Store(with_index(config, tmp_path).store).generations() == []


def test_other_inputs_have_another_name(
    config: Config, small_dataset: Dataset, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    name = generation_id(config, small_dataset, checkpoint)
    elsewhere = with_index(config, tmp_path)
    assert generation_id(elsewhere, small_dataset, checkpoint) == name
    other = untrained_checkpoint(config, small_dataset, tmp_path / "other", seed=4)
    names = {
        name,
        generation_id(config, small_dataset, other),
        generation_id(with_index(config, tmp_path, num_shards=2), small_dataset, checkpoint),
        generation_id(with_index(config, tmp_path, factory="HNSW8"), small_dataset, checkpoint),
        generation_id(with_index(config, tmp_path, target_index_recall=0.9), small_dataset, checkpoint),
    }
    assert len(names) == 5


def test_an_index_that_needs_a_gpu_is_refused_before_anything_is_encoded(
    ray_local: None, config: Config, small_dataset: Dataset, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    cagra = with_index(config, tmp_path, kind="cagra")
    with pytest.raises(
        ConfigError, match=r"cagra is built on a GPU, and this build has none.*index\.kind: hnsw"
    ):
        build_generation(cagra, small_dataset, checkpoint.path)
    assert not list(cagra.store.glob("generations/*/manifest.json"))
    assert not list(cagra.store.glob(".work/*-build"))


@pytest.mark.parametrize(
    ("factory", "gpus", "faiss_has_gpus", "reserved", "said"),
    [
        ("IVF8,SQ8", True, True, True, ""),
        ("IVF8,SQ8", False, True, False, ""),
        ("IVF8,SQ8", True, False, False, "CPU build here"),
        ("HNSW16,Flat", True, True, False, "HNSW16,Flat is built on CPUs"),
        ("Flat", True, True, False, ""),
    ],
)
def test_shards_reserve_gpus_where_those_have_work(
    factory: str,
    gpus: bool,
    faiss_has_gpus: bool,
    reserved: bool,
    said: str,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(build, "faiss_has_gpus", lambda: faiss_has_gpus)
    assert build._on_gpu(gpus, factory, 24) is reserved
    lines = capsys.readouterr().err
    assert said in lines
    assert bool(said) == bool(lines)
