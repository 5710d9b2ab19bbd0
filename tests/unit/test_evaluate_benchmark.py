"""What ``benchmarks.evaluate`` draws has Gowalla's sizes, and what it times is a whole evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.evaluate import (
    DIM,
    FEWEST,
    MOST,
    TEST,
    TRAIN,
    USERS,
    K,
    Task,
    bare,
    evaluate,
    lengths,
)


@pytest.fixture(scope="module")
def task() -> Task:
    return Task(300, 900)


def test_users_have_as_many_items_as_on_gowalla() -> None:
    had = lengths(np.random.default_rng(3), USERS, TRAIN / USERS, MOST)
    assert (had.min(), had.max()) == (FEWEST, MOST)
    assert np.quantile(had, [0.5, 0.9, 0.99]) == pytest.approx([16, 53, 181], rel=0.1)
    assert had.sum() == pytest.approx(TRAIN, rel=0.03)


def test_what_is_relevant_is_not_masked(task: Task) -> None:
    held = task.held
    assert len(held) == 300
    assert (np.diff(held.masked_offsets) > 0).all()
    assert (np.diff(held.relevant_offsets) > 0).all()
    assert len(held.relevant_rows) / len(held.masked_rows) == pytest.approx(TEST / TRAIN, rel=0.25)
    for user in range(300):
        part = held.part(user, user + 1)
        assert not set(part.masked_rows.tolist()) & set(part.relevant_rows.tolist())
        assert (np.diff(part.masked_rows) > 0).all()
        assert (np.diff(part.relevant_rows) > 0).all()


def test_the_evaluation_is_that_of_every_user(task: Task) -> None:
    scores = task.queries.astype(np.float64) @ task.vectors.astype(np.float64).T
    recalls = []
    for user in range(300):
        part = task.held.part(user, user + 1)
        scores[user, part.masked_rows] = -np.inf
        best = set(np.argsort(-scores[user])[:K].tolist())
        recalls.append(len(best & set(part.relevant_rows.tolist())) / len(part.relevant_rows))
    outcome, overlap = evaluate(task)
    assert outcome.sums.num_queries == 300
    assert outcome.result()[f"recall@{K}"] == pytest.approx(np.mean(recalls))
    assert 0.05 < np.mean(recalls) < 0.9
    assert 0 < overlap < 1
    assert [s.num_queries > 0 for s in outcome.slices] == [True] * 3


def test_the_bare_product_gives_the_best_of_all_items(task: Task) -> None:
    scores = task.queries[:9].astype(np.float64) @ task.vectors.astype(np.float64).T
    found = bare(torch.from_numpy(task.queries[:9]), torch.from_numpy(task.vectors), 4)
    assert found.shape == (9, K)
    assert task.vectors.shape == (900, DIM)
    np.testing.assert_array_equal(found, np.argsort(-scores, axis=1)[:, :K])
