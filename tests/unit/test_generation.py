"""What a generation holds, and what it refuses to be opened with."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.generations import catalogue_vectors, plain_generation, untrained_checkpoint
from tests.limits import open_files
from twotower.artefacts import MANIFEST
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.data.histories import Histories
from twotower.errors import ArtefactError, ArtefactMismatchError, DamagedError, RequestError, may_pass
from twotower.generations.encoding import real_queries
from twotower.generations.generation import Generation
from twotower.hashing import sha256_file
from twotower.model.checkpoint import Checkpoint
from twotower.model.features import QueryFeatures, encode_columns, profile_values
from twotower.schema import KINDS, SPLITS


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, small_values: Callable[..., dict[str, Any]]) -> Config:
    return parse_config(small_values(tmp_path_factory.mktemp("generation")))


@pytest.fixture(scope="module")
def checkpoint(config: Config, small_dataset: Dataset) -> Checkpoint:
    return untrained_checkpoint(config, small_dataset, config.checkpoints / "c")


@pytest.fixture(scope="module")
def built(config: Config, small_dataset: Dataset, checkpoint: Checkpoint) -> Path:
    return plain_generation(config, small_dataset, checkpoint, "g1")


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "g1"))


def test_its_facts_are_those_of_its_inputs(
    built: Path, small_dataset: Dataset, checkpoint: Checkpoint, config: Config
) -> None:
    generation = Generation.open(built)
    manifest = generation.manifest
    assert generation.id == manifest["id"] == "g1"
    assert manifest["checkpoint_fingerprint"] == checkpoint.fingerprint
    assert manifest["dataset_fingerprint"] == small_dataset.fingerprint
    assert manifest["vocabulary_hash"] == small_dataset.vocabulary_hash
    assert manifest["embedding_dim"] == 24
    assert manifest["metric"] == "inner_product"
    assert generation.as_of == small_dataset.as_of is not None
    assert generation.num_items == small_dataset.num_catalogue_items == 210
    assert sum(s["rows"] for s in manifest["shards"]) == 210
    assert len(manifest["shards"]) == config.index.num_shards == 3
    assert manifest["index"]["index_recall"] == 1.0
    assert manifest["index"]["num_queries"] == 30
    on_disk = {p.relative_to(built).as_posix() for p in built.rglob("*") if p.is_file()}
    assert on_disk == set(manifest["files"]) | {MANIFEST}
    assert generation.checkpoint().fingerprint == checkpoint.fingerprint
    assert generation.schema == checkpoint.schema
    assert json.loads((built / "config.json").read_text()) == config.to_json()


def test_every_item_is_found_at_its_own_vector(
    built: Path, small_dataset: Dataset, checkpoint: Checkpoint
) -> None:
    generation = Generation.open(built)
    searcher = generation.searcher()
    vectors = catalogue_vectors(checkpoint, small_dataset)
    found = [h.item_rows[0] for h in searcher.search(vectors, 1)]
    assert found == list(range(210))
    np.testing.assert_array_equal(searcher.vectors(np.arange(210)), vectors)


def test_users_are_known_to_the_last_interaction(built: Path, small_dataset: Dataset) -> None:
    generation = Generation.open(built)
    log = small_dataset.interactions
    assert (log.split == SPLITS["test"]).any()
    cap = generation.schema.max_history
    assert cap == 17
    capped = False
    for user in range(small_dataset.num_users):
        mine = log.user_row == user
        assert generation.seen(user).tolist() == sorted(set(log.item_row[mine].tolist()))
        positive = mine & (log.kind == KINDS["positive"])
        rows, times, weights = generation.histories.of_user(user)
        assert rows.tolist() == log.item_row[positive].tolist()[-cap:]
        assert times.tolist() == log.time[positive].tolist()[-cap:]
        assert weights.tolist() == log.weight[positive].tolist()[-cap:]
        capped |= int(positive.sum()) > cap
    assert capped
    assert generation.user_ids.ids(np.arange(5)) == small_dataset.user_ids.ids(np.arange(5))
    assert generation.item_ids.hash == small_dataset.item_ids.hash
    counts = np.bincount(log.item_row[log.kind == KINDS["positive"]], minlength=210)[:210]
    expected = sorted(range(210), key=lambda row: (-counts[row], row))
    assert generation.popularity.tolist() == expected


def test_queries_from_it_are_those_of_the_dataset(
    built: Path, small_dataset: Dataset, checkpoint: Checkpoint
) -> None:
    generation = Generation.open(built)
    schema = generation.schema
    users = np.arange(0, 300, 7)
    past = generation.histories.before(users, None, schema.max_history)
    columns = {name: column[users] for name, column in generation.user_columns.items()}
    batch = QueryFeatures(schema, generation.profiles)(users, columns, *past)
    served = generation.checkpoint().model.encode_queries(batch)

    histories = Histories.of(small_dataset.interactions)
    profiles = profile_values(schema, encode_columns(schema.item, small_dataset.item_table()))
    past = histories.before(users, None, schema.max_history)
    batch = QueryFeatures(schema, profiles)(users, columns, *past)
    np.testing.assert_array_equal(served.numpy(), checkpoint.model.encode_queries(batch).numpy())


def test_queries_of_the_recall_are_of_users_with_a_history(
    built: Path, small_dataset: Dataset, checkpoint: Checkpoint
) -> None:
    # It needs neither shards nor a manifest.
    tables = Generation(built, {})
    queries = real_queries(tables, checkpoint, 40, seed=1)
    assert queries.shape == (40, 24)
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-5)
    assert len(np.unique(queries.round(6), axis=0)) == 40
    assert (real_queries(tables, checkpoint, 40, seed=1) == queries).all()
    assert (real_queries(tables, checkpoint, 40, seed=2) != queries).any()
    assert len(real_queries(tables, checkpoint, 10_000, seed=1)) <= small_dataset.num_users


def test_item_tables_answer_by_item_row(built: Path, small_dataset: Dataset) -> None:
    items = Generation.open(built).items
    table = small_dataset.item_table()
    assert items.fields == ["item_id", "title", "genres"]
    rows = [209, 0, 77, 77, 3]
    taken = items.take(rows, ["title", "item_id"])
    assert list(taken) == ["title", "item_id"]
    for name in taken:
        assert taken[name] == table[name].take(rows).to_pylist()
    assert items.take([], ["title"]) == {"title": []}
    with pytest.raises(RequestError, match=r"no field 'yeer'; there are item_id, title"):
        items.take(rows, ["yeer"])
    with pytest.raises(RequestError, match="item row 210"):
        items.take([3, 210], ["title"])


def test_a_wrong_byte_in_any_file_is_named(copied: Path) -> None:
    files = [p for p in sorted(copied.rglob("*")) if p.is_file() and p.name != MANIFEST]
    assert len(files) > 20
    for path in [*files, copied / "model" / MANIFEST]:
        content = path.read_bytes()
        changed = bytearray(content)
        changed[len(changed) // 2] ^= 0x10
        path.write_bytes(bytes(changed))
        with pytest.raises(ArtefactError) as error:
            Generation.open(copied)
        assert str(path) in str(error.value)
        assert "again" in str(error.value)
        path.write_bytes(content[:-1])
        with pytest.raises(ArtefactError, match="again"):
            Generation.open(copied)
        path.write_bytes(content)
    Generation.open(copied)


def test_a_missing_or_foreign_file_is_named(copied: Path) -> None:
    path = copied / "users" / "seen_offsets.npy"
    path.rename(path.with_suffix(".away"))
    with pytest.raises(ArtefactError, match=r"seen_offsets\.npy can not be read \(No such file"):
        Generation.open(copied)
    path.with_suffix(".away").rename(path)
    manifest = json.loads((copied / MANIFEST).read_text())
    for name in ("../outside", "/etc/hostname", ""):
        edited = {**manifest, "files": {**manifest["files"], name: {"bytes": 1, "sha256": ""}}}
        (copied / MANIFEST).write_text(json.dumps(edited))
        with pytest.raises(ArtefactError, match="is damaged .*files"):
            Generation.open(copied)


def test_without_verification_only_fingerprints_are_checked(copied: Path) -> None:
    path = copied / "popularity.npy"
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\x00\x01")
    assert Generation.open(copied, verify=False).id == "g1"


def test_an_unfinished_or_newer_generation_is_refused(copied: Path) -> None:
    manifest = json.loads((copied / MANIFEST).read_text())
    (copied / MANIFEST).write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(ArtefactError, match="schema version 99"):
        Generation.open(copied)
    (copied / MANIFEST).unlink()
    with pytest.raises(ArtefactError, match="not a finished generation"):
        Generation.open(copied)


@pytest.mark.parametrize("verify", [True, False])
def test_towers_and_shards_of_different_trainings_do_not_mix(
    verify: bool, copied: Path, config: Config, small_dataset: Dataset, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    other = untrained_checkpoint(config, small_dataset, tmp_path / "other", seed=4)
    assert other.fingerprint != checkpoint.fingerprint
    values = {**config.to_json(), "storage": {"root": str(tmp_path)}}
    foreign = plain_generation(parse_config(values), small_dataset, other, "g2")
    for part in ("shards/00001", "model"):
        mixed = Path(shutil.copytree(copied, tmp_path / f"mixed-{part.replace('/', '-')}"))
        shutil.rmtree(mixed / part)
        shutil.copytree(foreign / part, mixed / part)
        with pytest.raises(ArtefactMismatchError) as error:
            Generation.open(mixed, verify=verify)
        assert checkpoint.fingerprint in str(error.value)
        assert other.fingerprint in str(error.value)


@pytest.mark.slow
def test_more_shards_than_items_leave_empty_ones(
    small_values: Callable[..., dict[str, Any]], small_dataset: Dataset, tmp_path: Path
) -> None:
    index = {"num_shards": 400, "recall_k": 20, "num_recall_queries": 5}
    config = parse_config(small_values(tmp_path, index=index))
    checkpoint = untrained_checkpoint(config, small_dataset, tmp_path / "c")
    generation = Generation.open(plain_generation(config, small_dataset, checkpoint, "many"))
    rows = [s["rows"] for s in generation.manifest["shards"]]
    assert len(rows) == 400
    assert 0 in rows
    (hits,) = generation.searcher().search(real_queries(generation, checkpoint, 1, seed=1), 1_000)
    assert sorted(hits.item_rows.tolist()) == list(range(210))
    assert generation.items.take([5], ["item_id"]) == {"item_id": [small_dataset.item_ids.id(5)]}


def test_weights_that_were_verified_are_not_read_for_their_hash_again(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []

    def noted(path: Path) -> str:
        hashed.append(path)
        return sha256_file(path)

    monkeypatch.setattr("twotower.model.checkpoint.sha256_file", noted)
    first = Generation.open(built, verify=True, sha256=noted).checkpoint()
    weights = built / "model" / "model.safetensors"
    assert hashed.count(weights) == 1
    second = Generation.open(built, verify=False).checkpoint()
    assert hashed.count(weights) == 2
    for name, table in first.model.state_dict().items():
        assert torch.equal(table, second.model.state_dict()[name])


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO])
def test_a_file_that_goes_while_others_are_read_is_said(built: Path, number: int) -> None:
    def hashed(path: Path) -> str:
        if path.name == "popularity.npy":
            raise OSError(number, os.strerror(number), str(path))
        return sha256_file(path)

    with pytest.raises(ArtefactError, match=r"popularity\.npy can not be read") as raised:
        Generation.open(built, sha256=hashed)
    # Of what is gone a copy may be whole; what a disk does not give now it may give later.
    assert isinstance(raised.value, DamagedError) == (number == errno.ENOENT)
    assert may_pass(raised.value) == (number == errno.EIO)


def test_sound_weights_that_there_is_no_memory_for_are_not_called_damaged(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clone(tensor: torch.Tensor) -> torch.Tensor:
        # Of torch itself: more than any machine has.
        return torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(torch.Tensor, "clone", clone)
    with pytest.raises(MemoryError, match=r"no memory for the model of .*model\.safetensors"):
        Generation.open(built).checkpoint()


@pytest.mark.parametrize("more", [0, 1])
def test_sound_weights_that_the_system_does_not_open_now_are_not_called_damaged(
    built: Path, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    """They are opened twice: by safetensors, which calls what it can not open missing, and by torch."""
    load = safetensors.torch.load_file

    def limited(path: Path) -> Any:
        with open_files(more):
            return load(path)

    monkeypatch.setattr(safetensors.torch, "load_file", limited)
    with pytest.raises(ArtefactError, match=r"model\.safetensors can not be read now") as caught:
        Generation.open(built).checkpoint()
    assert may_pass(caught.value)
    monkeypatch.undo()
    Generation.open(built).checkpoint()


def test_weights_of_other_sizes_and_none_are_refused_for_good(copied: Path) -> None:
    weights = copied / "model" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    whole = weights.read_bytes()
    known = sha256_file(weights)
    name = next(n for n in tensors if n.startswith("tables."))
    other = safetensors.torch.save({**tensors, name: tensors[name][1:].clone()})
    for content, says in ((other, "does not fit its configuration"), (whole[:-10], "is damaged")):
        weights.unlink()
        weights.write_bytes(content)
        with pytest.raises(ArtefactError, match=says) as caught:
            Checkpoint.open(copied / "model", known=known)
        assert not may_pass(caught.value)
