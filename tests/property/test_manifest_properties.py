"""Manifests and JSON files with anything wrong in them: an ArtefactError, or a working open, never another.

Every key of every kind of file is replaced by values of every kind, left out, or given twice, and what lists
the file has the right hash of it, as whoever wants to do harm would see to.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.shop import build_store
from twotower.artefacts import MANIFEST
from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.errors import ArtefactError
from twotower.evaluation.sweep import TrialResult
from twotower.generations.generation import Generation
from twotower.generations.publications import read_log
from twotower.generations.store import Store
from twotower.lifecycle.forget import REQUEST, _pending
from twotower.model.checkpoint import Checkpoint

VALUES: list[Any] = [
    None, True, -1, 0, 1, 1.5, 2**31, 2**63, 10**400, 1e308, "", "x", "../x", "a\x00b", "\u2028", "é" * 3000,
    [], [None], [[]], {}, {"": {}}, {"../../x": {"bytes": 1, "sha256": "0" * 64}},
]  # fmt: skip
RAW = [
    b"", b"{", b"null", b"[]", b"7", b'"x"', b"\xff\xfe", b"\xef\xbb\xbf{}", b"{}", b"[" * 200_000,
    b'{"a":1e999}', b'{"a":1,"a":2}', b'{"a":"\\ud800"}', b'{"a":-Infinity}', b"{} {}", b"9" * 5_000,
    b'{"a":' * 600 + b"1" + b"}" * 600, b'{"a":NaN}',
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every key and of the first entries of every list; files are all alike."""
    children: list[tuple[Any, Any]] = []
    if isinstance(value, (dict, list)):
        children = list(value.items() if isinstance(value, dict) else enumerate(value[:2]))
    for key, child in children[:2] if path == ("files",) else children:
        yield (*path, key)
        yield from places(child, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any, drop: bool = False) -> Any:
    """Return a copy with one value replaced, or left out."""
    copy = json.loads(json.dumps(value))
    node = copy
    for key in path[:-1]:
        node = node[key]
    if drop:
        del node[path[-1]]
    else:
        node[path[-1]] = new
    return copy


def mutations(data: bytes, every: int = 1) -> Iterator[bytes]:
    """Yield files with one thing wrong; every so manieth of the values at the places, in turn."""
    value = json.loads(data)
    turn = 0
    for path in places(value):
        for new in [*VALUES, ...]:
            turn += 1
            if turn % every == 0:
                yield json.dumps(changed(value, path, new, drop=new is ...)).encode()
    yield from RAW
    # A key twice, and one that a later release may write.
    yield data.rstrip()[:-1] + b', "kind": "other"}'
    yield json.dumps({**value, "zz": [1]}).encode()


def rehash(directory: Path, name: str) -> None:
    """Let the manifest of a directory say what a file of it holds now."""
    path = directory / MANIFEST
    manifest = json.loads(path.read_bytes())
    data = (directory / name).read_bytes()
    known = manifest["files"][name]
    facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["files"][name] = facts if isinstance(known, dict) else len(data)
    path.write_text(json.dumps(manifest))


def check(
    file: Path, opens: Callable[[], object], every: int = 1, listed: Path | None = None, end: bytes = b""
) -> None:
    """Put each mutation into a file, and open.

    Args:
        file: that is changed.
        opens: reads it.
        every: as of ``mutations``.
        listed: directory whose manifest lists the file.
        end: of the file.
    """
    data = file.read_bytes()
    refusals = []
    for mutation in [*mutations(data, every), data]:
        file.write_bytes(mutation.rstrip() + end)
        if listed is not None:
            rehash(listed, file.relative_to(listed).as_posix())
        try:
            opens()
        except ArtefactError as error:
            refusals.append(str(error))
        except BaseException as error:
            raise AssertionError(f"{file.name}: {mutation[:3000]!r}: {error!r}") from error
    assert len(refusals) > 5
    assert not [text for text in refusals if "\n" in text]
    opens()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    root = tmp_path_factory.mktemp("fuzzed")
    config, dataset, _ = build_store(root)
    return config, dataset.path


@pytest.fixture
def shop(made: tuple[Config, Path], tmp_path: Path) -> tuple[Store, Path, Path]:
    """Copies of the store, the dataset and the checkpoint."""
    config, dataset = made
    shutil.copytree(config.store, tmp_path / "store")
    shutil.copytree(dataset, tmp_path / "dataset")
    shutil.copytree(config.home.parents[1] / "checkpoint", tmp_path / "checkpoint")
    return Store(tmp_path / "store"), tmp_path / "dataset", tmp_path / "checkpoint"


@pytest.mark.slow
def test_dataset(shop: Any) -> None:
    dataset = shop[1]

    def opens() -> None:
        opened = Dataset.open(dataset)
        assert opened.source
        assert opened.as_of is None or opened.as_of > -(1 << 63)
        assert isinstance(opened.counts["users"], int)

    check(dataset / MANIFEST, opens, every=7)
    check(dataset / "features.json", opens, 7, dataset)


@pytest.mark.slow
def test_checkpoint(shop: Any) -> None:
    checkpoint = shop[2]
    check(checkpoint / MANIFEST, lambda: Checkpoint.open(checkpoint), every=5)
    for name in ("features.json", "config.json"):
        check(checkpoint / name, lambda: Checkpoint.open(checkpoint), 23, checkpoint)


def use(path: Path) -> None:
    """Everything that reads facts of a generation."""
    generation = Generation.open(path, verify=False)
    assert generation.schema.num_items > 0
    assert generation.effort
    assert len(generation.declared_attributes) >= 0
    assert generation.num_items <= len(generation.answerable_rows())
    assert [generation.user_columns, generation.profiles, generation.histories, generation.seen_offsets]
    generation.searcher()


@pytest.mark.slow
def test_generation(shop: Any) -> None:
    store = shop[0]
    path = store.path("g1")

    def opens() -> None:
        # Whatever is wrong with one, the others are listed.
        for manifest in store.manifests().values():
            assert isinstance(manifest["index"]["index_recall"], (int, float))
        store.passed_over()
        use(path)

    check(path / MANIFEST, opens, every=17)
    for name in ("model/features.json", "config.json", "shards/00000/shard.json"):
        check(path / name, opens, 29, path)


def test_pointers_and_the_log(shop: Any) -> None:
    store = shop[0]
    log = store.root / "publications.jsonl"
    check(log, lambda: (read_log(log), store.earlier()), end=b"\n")
    pointer = store.root / "CURRENT"
    for data in (
        b"",
        b"\n",
        b"../g1",
        b"g1\x00",
        b"/etc/passwd",
        b"g1\ng2",
        b"\xff" * 9,
        b"x" * 10_000,
        b"..",
    ):
        pointer.write_bytes(data)
        with pytest.raises(ArtefactError, match="the content of"):
            store.current()
    superseded = store.root / "superseded.json"
    store.supersede(["abc"])
    check(superseded, lambda: store.supersede(["abc"]))


def test_what_jobs_leave_for_the_next_run(tmp_path: Path) -> None:
    request = tmp_path / REQUEST
    request.write_text(json.dumps({"users": ["a", "b"]}))
    check(request, lambda: _pending(request))
    # A record of a trial that can not be read is made anew.
    record = tmp_path / "001.json"
    data = json.dumps(TrialResult("001", {"train.epochs": 2}, "finished", [{"epoch": 1}]).to_json()).encode()
    for mutation in mutations(data):
        record.write_bytes(mutation)
        known = TrialResult.read(record)
        assert known is None or (isinstance(known.name, str) and known.status in ("running", "finished"))
