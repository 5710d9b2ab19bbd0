"""Bootstrap intervals and paired tests against what statistics says of them."""

import numpy as np
import pytest
from scipy import stats

from twotower.evaluation import intervals as module
from twotower.evaluation.intervals import Bootstrap, differences, intervals, paired_p


@pytest.fixture
def rng():
    return np.random.default_rng(8)


@pytest.mark.parametrize("most", [10_000, 400])
def test_interval_is_as_wide_as_the_normal_one(rng, monkeypatch, most):
    """User by user, and in groups of unequal size."""
    monkeypatch.setattr(module, "_MOST_GROUPS", most)
    values = rng.gamma(0.5, size=(2_501, 2)).astype(np.float32)
    found = Bootstrap(len(values), 1).intervals(values)
    error = values.std(axis=0) / np.sqrt(len(values))
    expected = np.stack([values.mean(axis=0) - 1.96 * error, values.mean(axis=0) + 1.96 * error], axis=1)
    np.testing.assert_allclose(found, expected, atol=0.25 * error.max())


def test_interval_holds_the_truth_19_times_in_20(rng):
    inside = 0
    for seed in range(200):
        values = (rng.random((60, 1)) < 0.3).astype(np.float32)
        low, high = Bootstrap(60, seed).intervals(values)[0]
        inside += low <= 0.3 <= high
    assert 0.88 <= inside / 200 <= 0.99


def test_same_seed_same_interval(rng):
    values = rng.random((50, 3)).astype(np.float32)
    first, again = (Bootstrap(50, 4).intervals(values) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (Bootstrap(50, 5).intervals(values) != first).any()


def test_p_is_that_of_scipy(rng):
    first, second = rng.random((40, 5)), rng.random((40, 5))
    second[:, 0] = first[:, 0] + rng.normal(0.2, 0.1, 40)
    expected = stats.ttest_rel(first, second).pvalue
    np.testing.assert_allclose(paired_p(first - second), expected, rtol=1e-9)
    assert expected[0] < 1e-6 < expected[1]


def test_equal_users_have_no_p_of_their_own():
    gain = np.zeros((30, 3))
    gain[:, 1] = 0.1
    gain[0, 2] = 1.0
    assert paired_p(gain).tolist()[:2] == [1.0, 0.0]
    assert 0 < paired_p(gain)[2] < 1


def test_differences_by_ranker_and_metric(rng):
    names = ["recall@5", "ndcg@5"]
    better = rng.random((90, 2)).astype(np.float32)
    values = {"model": better, "worse": better - 0.25, "same": better, "noise": better[::-1].copy()}
    found = differences(better, values, ["worse", "same", "noise"], names, 3)
    assert set(found) == {"worse", "same", "noise"}
    one = found["worse"]["recall@5"]
    assert one["difference"] == pytest.approx(0.25)
    assert one["low"] == pytest.approx(0.25)
    assert one["high"] == pytest.approx(0.25)
    assert one["p"] < 1e-9
    assert found["same"]["ndcg@5"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    noise = found["noise"]["ndcg@5"]
    assert noise["low"] < noise["difference"] < noise["high"]
    # The interval and the test agree on what is nothing.
    assert noise["low"] < 0 < noise["high"]
    assert noise["p"] > 0.05


def test_paired_interval_is_narrower_than_that_of_each(rng):
    hard = rng.random((200, 1)).astype(np.float32)
    values = {"model": hard + 0.01 * rng.random((200, 1)).astype(np.float32), "other": hard}
    spans = intervals(values, ["recall@5"], 1)
    gap = differences(values["model"], values, ["other"], ["recall@5"], 1)["other"]["recall@5"]
    low, high = spans["model"]["recall@5"]
    assert low < values["model"].mean() < high
    assert gap["high"] - gap["low"] < 0.1 * (high - low)
    assert gap["p"] < 1e-9


def test_one_user_has_no_interval():
    one = np.ones((1, 2), dtype=np.float32)
    assert intervals({"model": one}, ["a", "b"], 1) == {}
    assert differences(one, {"other": one}, ["other"], ["a", "b"], 1) == {}
