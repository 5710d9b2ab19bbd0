"""Factory strings, vectors that are refused, index files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest

from tests.limits import open_files
from twotower.errors import ArtefactError, ConfigError, may_pass
from twotower.index.build import (
    build_shard,
    check_item_rows,
    read_index,
    read_trained,
    train_index,
    write_index,
)
from twotower.index.search import Searcher, Shard
from twotower.index.spec import Effort, shard_of

DIM = 24
FACTORIES = [
    "Flat",
    "HNSW16",
    "HNSW16,Flat",
    "HNSW16,SQ8",
    "IVF16,Flat",
    "IVF16,SQ8",
    "IVF16,PQ8x4",
    "IVF16_HNSW8,SQ8",
    "IVF16,PQ12x4fs,RFlat",
    "PQ12x4fs,RFlat",
    "OPQ8_16,IVF16,PQ8x4",
    "SQ8",
    "IVF16,RaBitQ",
    "NSG16",
]


def unit_vectors(rng: np.random.Generator, count: int, dim: int = DIM) -> np.ndarray:
    vectors = rng.normal(size=(count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("factory", FACTORIES)
def test_each_kind_is_built_written_read_and_searched(
    factory: str, rng: np.random.Generator, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    vectors = unit_vectors(rng, 700)
    rows = np.arange(700) * 3 + 5
    index = build_shard(vectors, factory, item_rows=rows)
    write_index(index, tmp_path / "index.faiss")
    assert [p.name for p in tmp_path.iterdir()] == ["index.faiss"]
    read = read_index(tmp_path / "index.faiss", factory, DIM, len(vectors))
    searcher = Searcher([Shard(read, rows)], Effort(nprobe=16, ef_search=256, k_factor=64))
    hits = searcher.search(vectors[:40], 5)
    own = np.mean([rows[q] in h.item_rows for q, h in enumerate(hits)])
    assert own > 0.9
    close = np.einsum("nd,nd->n", searcher.vectors(rows[:40]), vectors[:40])
    assert close.mean() > 0.7
    # The rotation of OPQ clusters on its own and says so.
    assert factory.startswith("OPQ") or "WARNING" not in capfd.readouterr().err


def test_product_codes_with_more_lists_and_centroids_than_bytes_are_read(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    vectors, rows = unit_vectors(rng, 600), np.arange(600)
    trained = train_index(vectors, "IVF256,PQ1")
    index = build_shard(vectors, "IVF256,PQ1", 1, rows, faiss.clone_index(trained))
    path = tmp_path / "index.faiss"
    write_index(trained, path)
    assert path.stat().st_size < 256 * 256 * 4
    assert read_trained(path).is_trained
    write_index(index, path)
    read = read_index(path, "IVF256,PQ1", DIM, 600)
    ours, theirs = (
        Searcher([Shard(i, rows)], Effort(nprobe=9)).search(vectors[:20], 5) for i in (index, read)
    )
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine.item_rows, other.item_rows)
        np.testing.assert_array_equal(mine.scores, other.scores)


def test_flat_gives_back_the_vectors_bit_for_bit(rng: np.random.Generator) -> None:
    vectors = unit_vectors(rng, 50)
    rows = np.arange(50) * 2
    searcher = Searcher([Shard(build_shard(vectors, "Flat"), rows)])
    wanted = np.array([98, 0, 44])
    assert (searcher.vectors(wanted) == vectors[wanted // 2]).all()


@pytest.mark.parametrize(
    "factory", ["Flatt", "", "IVF0,Flat", "HNSWx", "LSH", "IDMap,Flat", "IDMap2,HNSW16", "IVF16", "PQ7x8"]
)
def test_a_factory_string_that_can_not_be_used_is_named(factory: str, rng: np.random.Generator) -> None:
    with pytest.raises(ConfigError, match=r"index\.factory") as error:
        build_shard(unit_vectors(rng, 300), factory)
    assert repr(factory) in str(error.value)


def test_fewer_vectors_than_centroids_says_what_fits(rng: np.random.Generator) -> None:
    with pytest.raises(
        ConfigError, match=r"64 centroids, but there are only 50 .* at most IVF1, fewer shards"
    ):
        build_shard(unit_vectors(rng, 50), "IVF64,Flat")
    with pytest.raises(ConfigError, match="can not be built from 50 vectors"):
        build_shard(unit_vectors(rng, 50), "PQ8x8")


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "vector 7 holds NaN"), (np.inf, "vector 7 holds NaN or inf"), (0, "7 is zero")],
)
def test_a_vector_without_direction_is_refused(value: float, message: str, rng: np.random.Generator) -> None:
    vectors = unit_vectors(rng, 20)
    vectors[7] = value
    with pytest.raises(ConfigError, match=message):
        build_shard(vectors, "Flat")


def test_item_rows_are_ascending_and_unique() -> None:
    check_item_rows(np.array([], np.int64))
    check_item_rows(np.array([0, 3, 4]))
    with pytest.raises(ConfigError, match="item row 3 occurs twice"):
        check_item_rows(np.array([0, 3, 3]))
    with pytest.raises(ConfigError, match="item row 5 comes before 4"):
        check_item_rows(np.array([0, 5, 4]))
    with pytest.raises(ConfigError, match="-1 is negative"):
        check_item_rows(np.array([-1, 5]))


@pytest.mark.parametrize("factory", ["Flat", "IVF64,PQ8", "HNSW16"])
def test_an_empty_shard_is_an_index_of_nothing(factory: str, tmp_path: Path) -> None:
    index = build_shard(np.zeros((0, DIM), np.float32), factory)
    write_index(index, tmp_path / "index.faiss")
    assert read_index(tmp_path / "index.faiss", factory, DIM, 0).ntotal == 0


def test_an_index_file_other_than_described_is_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    path = tmp_path / "index.faiss"
    write_index(build_shard(unit_vectors(rng, 90), "Flat"), path)
    with pytest.raises(ArtefactError, match="holds a IndexFlat"):
        read_index(path, "HNSW16", DIM, 90)
    with pytest.raises(ArtefactError, match="90 vectors of 24 dimensions; its manifest says 91 of 24"):
        read_index(path, "Flat", DIM, 91)
    with pytest.raises(ArtefactError, match="90 of 25"):
        read_index(path, "Flat", 25, 90)
    content = path.read_bytes()
    for damaged in (content[:-10], content[:20], b"", b"\xff" * 200):
        path.write_bytes(damaged)
        with pytest.raises(ArtefactError, match=r"index\.faiss is damaged") as caught:
            read_index(path, "Flat", DIM, 90)
        assert not may_pass(caught.value)
    with pytest.raises(ArtefactError, match="missing") as caught:
        read_index(tmp_path / "none.faiss", "Flat", DIM, 90)
    assert not may_pass(caught.value)


def test_a_sound_file_that_the_system_does_not_open_now_is_not_called_damaged(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    path = tmp_path / "index.faiss"
    write_index(build_shard(unit_vectors(rng, 90), "Flat"), path)
    for read in (lambda: read_index(path, "Flat", DIM, 90), lambda: read_trained(path)):
        with pytest.raises(ArtefactError, match="can not be read") as caught, open_files(more=0):
            read()
        assert "Too many open files" in str(caught.value)
        assert may_pass(caught.value)
    assert read_index(path, "Flat", DIM, 90).ntotal == 90


_SMALL = """
import re, resource, sys
from pathlib import Path
from twotower.errors import ArtefactError, may_pass
from twotower.index.build import read_index, read_trained

path, rows = Path(sys.argv[1]), int(sys.argv[2])
size = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (size + path.stat().st_size // 2, -1))
for read in (lambda: read_index(path, "Flat", 24, rows), lambda: read_trained(path)):
    try:
        read()
    except (ArtefactError, MemoryError) as error:
        print(type(error).__name__, may_pass(error), error)
"""


def test_a_sound_file_that_there_is_no_memory_for_is_not_called_damaged(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    path = tmp_path / "index.faiss"
    # More than what the allocator keeps in reserve.
    write_index(build_shard(unit_vectors(rng, 500_000), "Flat"), path)
    done = subprocess.run(
        [sys.executable, "-c", _SMALL, str(path), "500000"], capture_output=True, text=True, timeout=60
    )
    mapped, copied = done.stdout.splitlines()
    assert mapped.startswith(f"ArtefactError True {path} can not be read (Cannot allocate memory)"), (
        done.stderr
    )
    assert copied.startswith(f"MemoryError True there is no memory for {path}"), done.stderr


def test_an_oversized_length_inside_a_file_is_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    path = tmp_path / "index.faiss"
    write_index(build_shard(unit_vectors(rng, 90), "Flat"), path)
    content = bytearray(path.read_bytes())
    floats = (90 * DIM).to_bytes(8, "little")
    at = content.find(floats)
    assert at > 0
    content[at : at + 8] = (1 << 36).to_bytes(8, "little")
    path.write_bytes(bytes(content))
    before = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
    with pytest.raises(ArtefactError, match="damaged"):
        read_index(path, "Flat", DIM, 90)
    assert (faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()) == before


def test_a_shard_depends_on_the_id_alone() -> None:
    # Fixed values: a new release must find the items where an older one put them.
    assert shard_of(["1", "2", "42", "tt0111161", "\u00e9t\u00e9"], 7).tolist() == [4, 3, 4, 5, 1]
    ids = [str(i) for i in range(20_000)]
    for num_shards in (2, 3, 8, 16):
        shards = shard_of(ids, num_shards)
        assert shards.dtype == np.int32
        counts = np.bincount(shards, minlength=num_shards)
        expected = len(ids) / num_shards
        # Five standard deviations of a binomial count.
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    assert shard_of([], 4).shape == (0,)
    with pytest.raises(ConfigError, match="num_shards"):
        shard_of(["1"], 0)


def test_the_index_is_free_of_torch_and_ray() -> None:
    code = (
        "import sys, twotower.index.build, twotower.index.recall, twotower.index.parts;"
        "print([m for m in ('torch', 'ray', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_index_trained_once_is_filled_after_it_was_read_again(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    vectors = unit_vectors(rng, 400)
    write_index(train_index(vectors, "IVF8,SQ8"), tmp_path / "trained.faiss")
    rows = np.arange(400)
    shards = []
    for s in range(3):
        trained = read_trained(tmp_path / "trained.faiss")
        shards.append(Shard(build_shard(vectors[s::3], "IVF8,SQ8", 1, rows[s::3], trained), rows[s::3]))
    searcher = Searcher(shards, Effort(nprobe=8))
    assert len(searcher.units) == 1
    hits = searcher.search(vectors[:50], 1)
    assert np.mean([h.item_rows[0] == q for q, h in enumerate(hits)]) > 0.9
    assert train_index(vectors, "Flat") is None
