"""Merging does not depend on how items lie in shards; parts account for every item."""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.errors import ArtefactError
from twotower.index import search
from twotower.index.allowed import Allowed
from twotower.index.build import build_shard
from twotower.index.parts import check_parts, load_shard, load_vectors, remove_strays, write_part
from twotower.index.search import Searcher, Shard, best_keys, hits_of, ranking_keys

DIM = 6


@st.composite
def catalogues(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(vectors [N, D] with repeats, item rows [N] ascending with gaps, shard of each, k)."""
    count = draw(st.integers(1, 40))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Values that are sums of powers of two give scores without rounding, so that ties are exact.
    vectors = generator.integers(-2, 3, (count, DIM)).astype(np.float32) / 4
    vectors[(vectors == 0).all(axis=1)] = 1
    rows = np.cumsum(generator.integers(1, 4, count))
    shards = generator.integers(0, draw(st.integers(1, 6)), count)
    return vectors, rows, shards, draw(st.integers(1, 50))


@settings(max_examples=120, deadline=None)
@given(
    catalogues(),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 3, 1_000]),
    st.sampled_from(["Flat", "IVF1,Flat"]),
    st.booleans(),
)
def test_scores_and_hits_do_not_depend_on_the_sharding(
    case: tuple[np.ndarray, np.ndarray, np.ndarray, int], seed: int, long: int, factory: str, some: bool
) -> None:
    """Nor on what is dead, on a restriction, on how many are left out, or on which queries come together."""
    vectors, rows, shards, k = case
    generator = np.random.default_rng(seed)
    queries = generator.integers(-2, 3, (3, DIM)).astype(np.float32) / 2
    exclude = [
        generator.choice(rows, int(generator.integers(0, len(rows) + 1)), replace=False) for _ in range(3)
    ]
    # What an update changed lies in another shard, and is dead in its own.
    dead = rows[generator.random(len(rows)) < 0.2]
    changed = np.isin(rows, dead)
    parts = [(shards == s, dead) for s in range(int(shards.max()) + 2)] + [(changed, dead[:0])]
    searcher = Searcher(
        [Shard(build_shard(vectors[p], factory, 1, rows[p]), rows[p], gone) for p, gone in parts]
    )
    only = Allowed.of_mask(generator.random(searcher.num_rows) < 0.7) if some else None
    with mock.patch.object(search, "_LONG_LIST", long):
        found = searcher.search(queries, k, exclude, allowed=only)
        alone = [
            searcher.search(queries[q : q + 1], k, exclude[q : q + 1], allowed=only)[0] for q in range(3)
        ]
    for q, hits in enumerate(found):
        assert hits.scores.tolist() == alone[q].scores.tolist()
        scores = vectors @ queries[q]
        out = set(exclude[q].tolist())
        allowed = [i for i in range(len(rows)) if rows[i] not in out and (not some or only.mask()[rows[i]])]
        ranked = sorted(allowed, key=lambda i: (-scores[i], rows[i]))
        assert len(hits.item_rows) == min(k, len(allowed))
        assert hits.scores.tolist() == [scores[i] for i in ranked[:k]]
        # Which of the items that tie at the edge come is open; before the edge the order is by row.
        edge = hits.scores[-1] if len(hits.scores) else 0
        inside = hits.item_rows[hits.scores > edge].tolist()
        assert inside == [rows[i] for i in ranked if scores[i] > edge]
        assert set(hits.item_rows.tolist()) <= {rows[i] for i in allowed}
        for score in np.unique(hits.scores):
            assert (np.diff(hits.item_rows[hits.scores == score]) > 0).all()


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(width=32, allow_nan=False), st.integers(-1, 2**32 - 2)), min_size=1, max_size=60
    ),
    st.integers(1, 70),
)
def test_keys_order_by_score_then_row_and_give_both_back(pairs: list[tuple[float, int]], k: int) -> None:
    scores = np.array([[p[0] for p in pairs]], np.float32)
    rows = np.array([[p[1] for p in pairs]], np.int64)
    (hits,) = hits_of(best_keys(ranking_keys(scores, rows), k))
    expected = sorted(((-s, r) for s, r in pairs if r >= 0))[:k]
    assert list(zip((-hits.scores).tolist(), hits.item_rows.tolist(), strict=True)) == expected


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_parts_give_every_item_back(count: int, num_shards: int, num_parts: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(count, DIM)).astype(np.float32)
    shards = generator.integers(0, num_shards, count).astype(np.int32)
    part_of = generator.integers(0, num_parts, count)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        parts = []
        for number in range(num_parts):
            rows = generator.permutation(np.flatnonzero(part_of == number))
            parts.append(write_part(directory, rows, shards[rows], vectors[rows], num_shards))
        assert (load_vectors(parts, count) == vectors).all()
        for shard in range(num_shards):
            rows, found = load_shard(parts, shard)
            assert rows.tolist() == np.flatnonzero(shards == shard).tolist()
            assert (found == vectors[rows]).all()
        # A second attempt at a part is a stray: only named parts count.
        stray = write_part(directory, np.arange(count), shards, vectors, num_shards)
        assert remove_strays(directory, parts) == 3
        assert (load_vectors(parts, count) == vectors).all()
        with pytest.raises(ArtefactError, match="can not be read"):
            check_parts([stray], count)
        with pytest.raises(ArtefactError, match="items were not encoded, the first is item row"):
            check_parts(parts, count + 1)
        with pytest.raises(ArtefactError, match="was encoded"):
            check_parts(parts, count - 1)
        with pytest.raises(ArtefactError, match="encoded twice"):
            check_parts([*parts, next(p for p in parts if p.num_rows)], count)
