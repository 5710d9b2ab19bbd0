"""From a catalogue to the kind of its index: size, memory, updates and filters, with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from twotower.config.service import AttributeConfig, IndexConfig
from twotower.errors import ConfigError
from twotower.index.build import build_shard, write_index
from twotower.index.choice import choose, factory_of, memory_bytes, num_shards
from twotower.index.spec import empty_index


def test_auto_is_exact_for_small_catalogues_and_says_why() -> None:
    still = IndexConfig(updates=False)
    small, large = (choose(still, n, 128) for n in (20_000, 20_001))
    assert small.factory == "Flat"
    assert "20,000" in small.reason
    assert large.factory == "IVF512,SQ8"
    assert "20,001" in large.reason
    assert choose(IndexConfig(), 1_000_000, 128).factory == "IVF4096,SQ8"


@pytest.mark.parametrize("changing", [{"updates": True}, {"updates": False, "attributes": {"year": {}}}])
def test_auto_searches_more_items_exactly_where_they_are_updated_or_filtered(changing: dict) -> None:
    index = IndexConfig.model_validate(changing)
    assert choose(index, 40_000, 128).factory == "Flat"
    assert "update or filter" in choose(index, 40_000, 128).reason
    large = choose(index, 40_001, 128)
    assert large.factory == "IVF1024,SQ8"
    assert "deleted or filtered out" in large.reason
    assert "filtered" not in choose(IndexConfig(updates=False), 40_001, 128).reason


def test_auto_stays_within_the_memory_budget_and_says_what_the_others_take() -> None:
    def budget(gib: float) -> IndexConfig:
        return IndexConfig(max_memory_gib=gib)

    # 128 + 25 bytes for each of ten million items, and 16,384 centroids.
    needed = memory_bytes("ivf_sq8", 10_000_000, 128) / 2**30
    assert needed == pytest.approx((10_000_000 * 153 + 16_384 * 512) / 2**30)
    assert choose(budget(needed), 10_000_000, 128).factory == "IVF16384,SQ8"
    smaller = choose(budget(1.42), 10_000_000, 128)
    assert smaller.factory == "IVF16384,PQ64"
    assert "ivf_sq8 would take 1.43 GiB, index.max_memory_gib allows 1.42" in smaller.reason
    with pytest.raises(ConfigError, match=r"take 0\.837 GiB in the smallest.*allows 0\.5; allow more"):
        choose(budget(0.5), 10_000_000, 128)
    # Exact search is given up for memory as well.
    assert choose(budget(0.004), 20_000, 128).factory == "IVF512,SQ8"


def test_a_kind_that_does_not_fit_is_refused_with_the_numbers() -> None:
    named = IndexConfig(kind="hnsw", max_memory_gib=2)
    assert choose(named, 1_000_000, 128).factory == "HNSW32,Flat"
    with pytest.raises(ConfigError, match=r"hnsw of 10,000,000 items.*about 7\.46 GiB.*allows 2;"):
        choose(named, 10_000_000, 128)
    assert choose(IndexConfig(factory="HNSW8", max_memory_gib=0.001), 10_000_000, 8).factory == "HNSW8"


def test_kinds_and_factories_that_are_named() -> None:
    assert choose(IndexConfig(factory="HNSW8"), 10, 8).factory == "HNSW8"
    assert choose(IndexConfig(kind="ivf_flat"), 390, 8).factory == "IVF10,Flat"
    with pytest.raises(ValueError, match="leave one out"):
        IndexConfig(kind="flat", factory="Flat")
    with pytest.raises(ValueError, match="less than or equal to 1"):
        IndexConfig(target_index_recall=1.01)
    with pytest.raises(ValueError, match="greater than 0"):
        IndexConfig(max_search_ms=0)
    assert IndexConfig(attributes={"a": AttributeConfig()}).attributes


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf_flat", "ivf_sq8", "ivf_pq", "ivf_fastscan"])
def test_the_estimate_of_memory_is_the_file_and_a_few_bytes_of_each_item(
    kind: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    # Enough items that tables of a fixed size are a small part.
    count, dim = 6_000, 64
    vectors = rng.normal(size=(count, dim)).astype(np.float32)
    factory = factory_of(kind, count, dim)
    assert empty_index(factory, dim).d == dim
    if kind == "ivf_pq":
        # Training 32 codebooks of 256 takes seconds; the size of the codes is all that matters here.
        assert empty_index(factory, dim).code_size == dim // 2
        return
    write_index(build_shard(vectors, factory, item_rows=np.arange(count)), tmp_path / "index.faiss")
    size = (tmp_path / "index.faiss").stat().st_size
    assert memory_bytes(kind, count, dim) - 17 * count == pytest.approx(size, rel=0.1)


def test_shards_by_number_and_by_size() -> None:
    assert num_shards(IndexConfig(num_shards=3), 1_000) == 3
    by_size = IndexConfig(num_shards=3, shard_items=100)
    assert [num_shards(by_size, n) for n in (0, 1, 100, 101, 1_000, 1_001)] == [1, 1, 1, 2, 10, 11]
