"""Workers that a process keeps from part to part."""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any

import pyarrow as pa
import pytest

from twotower.cluster import pool
from twotower.cluster.pool import _Kept

PART = pa.table({"start": [3]})
made: list[weakref.ref[Any]] = []


class Counts:
    """Adds ``by`` to the start of a part, and says how often it was asked."""

    def __init__(self, by: int) -> None:
        self._by = by
        self._asked = 0
        made.append(weakref.ref(self))

    def __call__(self, part: pa.Table) -> pa.Table:
        self._asked += 1
        return pa.table({"sum": [part["start"][0].as_py() + self._by], "asked": [self._asked]})


def ask(kept: _Kept, stage: str, by: int) -> tuple[int, int]:
    (fact,) = kept.call(PART, stage, Counts, {"by": by}).to_pylist()
    return fact["sum"], fact["asked"]


def alive() -> int:
    gc.collect()
    return sum(each() is not None for each in made)


@pytest.fixture(autouse=True)
def none_made() -> None:
    made.clear()


def test_a_stage_has_one_worker_and_the_next_its_own() -> None:
    kept = _Kept()
    assert [ask(kept, "a", 1), ask(kept, "a", 1), ask(kept, "b", 2)] == [(4, 1), (4, 2), (5, 1)]
    # Of the same class and settings, too: what its files hold may have changed.
    assert ask(kept, "c", 2) == (5, 1)
    assert (len(made), alive()) == (3, 1)


def test_the_memory_of_a_worker_is_given_back_once_there_is_no_more_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "_KEPT_S", 0.05)
    kept = _Kept()
    for _ in range(3):
        ask(kept, "a", 1)
    deadline = time.monotonic() + 30
    while alive():
        assert time.monotonic() < deadline, "the worker is still there"
        time.sleep(0.01)
    # What comes later after all has a new one.
    assert ask(kept, "a", 1) == (4, 1)
