from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.datasets import files_config
from twotower.config import SplitConfig
from twotower.data.filters import reduce_repeats, sort
from twotower.data.hashing import table_hash
from twotower.data.prepare import prepare
from twotower.data.reading import NO_SPLIT
from twotower.data.sources import files
from twotower.data.splits import assign_splits
from twotower.data.vocabulary import Vocabulary
from twotower.errors import DataError
from twotower.schema import KINDS, SPLITS

POSITIVE, NEGATIVE, SEEN_ONLY = (KINDS[k] for k in ("positive", "negative", "seen_only"))
TRAIN, VALIDATION, TEST = (SPLITS[s] for s in ("train", "validation", "test"))

ROW = st.tuples(
    st.integers(0, 4), st.integers(0, 6), st.integers(0, 12), st.integers(1, 9), st.integers(0, 2)
)
ROWS = st.lists(ROW, min_size=1, max_size=60)


def columns(rows: list[tuple[int, ...]]) -> dict[str, Any]:
    table = np.array(rows, dtype=np.int64)
    data = {
        "user_row": table[:, 0].astype(np.int32),
        "item_row": table[:, 1].astype(np.int32),
        "time": table[:, 2].copy(),
        "weight": table[:, 3].astype(np.float32),
        "kind": table[:, 4].astype(np.int8),
        "split": np.full(len(table), NO_SPLIT, dtype=np.int8),
    }
    sort(data)
    return data


@given(
    st.lists(st.text(min_size=1, max_size=6), unique=True, max_size=40),
    # An empty text is no id: it stands where one was forgotten.
    st.lists(st.text(max_size=6), max_size=10),
)
def test_vocabulary_round_trip(ids: list[str], others: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written = Vocabulary(pa.array(ids, pa.string()))
        written.write(Path(folder) / "ids.arrow")
        opened = Vocabulary.open(Path(folder) / "ids.arrow")
        assert opened.hash == written.hash
        for vocabulary in (written, opened):
            assert vocabulary.rows(vocabulary.ids(range(len(ids)))).tolist() == list(range(len(ids)))
            rows = vocabulary.rows(others, missing="negative").tolist()
            assert rows == [ids.index(o) if o in ids else -1 for o in others]
            assert [vocabulary.row(o) for o in others] == [None if r < 0 else r for r in rows]


@given(
    st.lists(st.one_of(st.none(), st.text(max_size=4)), max_size=30),
    st.lists(st.integers(0, 29), max_size=4),
)
def test_a_content_hash_does_not_see_chunks_and_offsets(values: list[str | None], cuts: list[int]) -> None:
    whole = pa.table({"a": pa.array(values, pa.string())})
    edges = sorted({0, len(values), *(c for c in cuts if c < len(values))})
    padded = pa.array(["pad", *values], pa.string())
    parts = [padded.slice(1 + a, b - a) for a, b in itertools.pairwise(edges)]
    chunked = pa.table({"a": pa.chunked_array(parts, pa.string())})
    assert table_hash(chunked) == table_hash(whole)
    if values:
        changed = pa.table({"a": pa.array([*values[:-1], "other value"], pa.string())})
        assert table_hash(changed) != table_hash(whole)


@given(
    ROWS,
    st.sampled_from(["temporal_user", "temporal_global", "leave_one_out", "random"]),
    st.floats(0.05, 0.9),
    st.floats(0.05, 0.9),
    st.sampled_from(["together", "order"]),
)
def test_splits(
    rows: list[tuple[int, ...]], kind: Any, test_share: float, validation_share: float, ties: Any
) -> None:
    data = columns(rows)
    config = SplitConfig(kind=kind, test_share=test_share, validation_share=validation_share, ties=ties)
    together = ties == "together" and kind not in ("random", "temporal_global")
    try:
        split = assign_splits(data, config, True, seed=5)
    except DataError:
        if together:
            return
        # Only where a part would be empty: no user has two positives left beside his test part.
        sizes = np.bincount(data["user_row"][data["kind"] == POSITIVE])
        tests = np.minimum(np.ceil(test_share * sizes - 1e-9), sizes - 1)
        assert kind == "temporal_global" or (sizes - (1 if kind == "leave_one_out" else tests) < 2).all()
        return
    positive = data["kind"] == POSITIVE
    assert set(split.tolist()) <= {TRAIN, VALIDATION, TEST}
    assert len(split) == len(rows)
    place = np.arange(len(rows))  # sorted by user, time and file order
    for user in np.unique(data["user_row"]):
        own = data["user_row"] == user
        if kind != "random":
            for earlier, later in ((TRAIN, VALIDATION), (TRAIN, TEST), (VALIDATION, TEST)):
                before, after = place[own & (split == earlier)], place[own & (split == later)]
                if len(before) and len(after):
                    assert before.max() < after.min()
                if ties == "together" and len(before) and len(after):
                    assert data["time"][before].max() < data["time"][after].min()
        n = int((own & positive).sum())
        counts = [int((own & positive & (split == part)).sum()) for part in (TRAIN, VALIDATION, TEST)]
        if kind != "temporal_global" and n:
            assert counts[0] >= 1
            if together:
                num_moments = len(np.unique(data["time"][own & positive]))
                wanted = 1 if kind == "leave_one_out" else min(np.ceil(test_share * n - 1e-9), n - 1)
                first = (data["time"][own & positive] == data["time"][own & positive][0]).sum()
                assert counts[2] >= min(wanted, n - first)
                assert (counts[2] > 0) == (num_moments > 1)
                continue
            if kind == "leave_one_out":
                assert counts[1:] == [int(n >= 3), int(n >= 2)]
            else:
                wanted = min(int(np.ceil(test_share * n - 1e-9)), n - 1)
                rest = n - wanted
                assert counts[2] == wanted
                assert counts[1] == min(int(np.ceil(validation_share * rest - 1e-9)), rest - 1)
    if kind == "temporal_global":
        for earlier, later in ((TRAIN, VALIDATION), (VALIDATION, TEST)):
            assert data["time"][split == earlier].max() < data["time"][split == later].min()


@given(ROWS, st.sampled_from(["first", "last", "sum", "keep"]))
def test_repeats(rows: list[tuple[int, ...]], policy: Any) -> None:
    data = columns(rows)
    data["split"][:] = TRAIN
    before = {name: column.copy() for name, column in data.items()}
    gone = reduce_repeats(data, policy)
    assert len(data["kind"]) == len(rows) - gone
    if policy == "keep":
        assert gone == 0
        return
    pairs = list(zip(data["user_row"].tolist(), data["item_row"].tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    assert set(pairs) == {(r[0], r[1]) for r in rows}
    resorted = {name: column.copy() for name, column in data.items()}
    sort(resorted)
    assert all(np.array_equal(resorted[name], data[name]) for name in data)
    for at, (user, item) in enumerate(pairs):
        group = np.flatnonzero((before["user_row"] == user) & (before["item_row"] == item))
        opinions = group[before["kind"][group] != SEEN_ONLY]
        candidates = opinions if len(opinions) else group
        chosen = candidates[0 if policy == "first" else -1]
        assert data["time"][at] == before["time"][chosen]
        assert data["kind"][at] == before["kind"][chosen]
        weight = before["weight"][chosen]
        if policy == "sum" and len(opinions):
            weight = before["weight"][opinions[before["kind"][opinions] == before["kind"][chosen]]].sum()
        assert data["weight"][at] == pytest.approx(weight)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROW, min_size=40, max_size=60), chunk=st.integers(1, 70))
def test_the_result_does_not_depend_on_chunks(
    rows: list[tuple[int, ...]], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"u{u},i{i},{t},{w}" for u, i, t, w, _ in rows]
    lines += [f"u{u},i{100 + u * 9 + n},{50 + n},1" for u in range(5) for n in range(4)]  # no empty split
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.csv"
        log.write_text("\n".join(["who,what,when,stars", *lines, "u1,,1,1", "u1,2.0,1,1"]) + "\n")
        columns = {"user": "who", "item": "what", "time": "when", "time_unit": "s", "value": "stars"}
        found = []
        for size in (10_000, chunk):
            monkeypatch.setattr(files, "CHUNK_ROWS", size)
            config = files_config(
                Path(folder) / str(size),
                log,
                data__source__columns=columns,
                data__positives={"weight": "value"},
                data__on_bad_rows="drop",
            )
            dataset = prepare(config)
            found.append((dataset.fingerprint, dataset.vocabulary_hash, dataset.counts))
        assert found[0] == found[1]
        assert found[0][2]["bad_rows"] == 2
