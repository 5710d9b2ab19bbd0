"""Drawn candidates, how often an item is expected, and the memory of past candidates."""

from typing import Literal

import numpy as np
import pytest
import torch

from twotower.config.training import MinedConfig, NegativesConfig
from twotower.training.negatives import CandidateMemory, CandidateSampler

COUNTS = np.array([500, 0, 30, 200, 7, 1, 262])


def test_drawn_candidates_are_as_frequent_as_expected() -> None:
    """Against the empirical frequency in many steps, positives of the batch included."""
    sampler = CandidateSampler(COUNTS, NegativesConfig(uniform=40, popular=60), seed=3)
    rng = np.random.default_rng(0)
    seen = np.zeros(len(COUNTS))
    steps = 3_000
    for step in range(steps):
        drawn = sampler.draw(step)
        assert len(drawn) == sampler.num_drawn == 100
        batch = rng.choice(len(COUNTS), 50, p=COUNTS / COUNTS.sum())
        seen += np.bincount(np.concatenate([drawn, batch]), minlength=len(COUNTS))
    expected = sampler.expected_count(np.arange(len(COUNTS)), batch=50, memory=0)
    # Item 1 is in no batch, but is drawn as if it had been seen once.
    assert seen / steps == pytest.approx(expected, rel=0.03, abs=0.12)
    assert expected[0] / expected[1] > 8


@pytest.mark.parametrize("memory", [0, 300])
def test_expected_counts_add_up_to_the_candidates_whatever_has_examples(memory: int) -> None:
    counts = np.zeros(2_000, np.int64)
    counts[::40] = np.random.default_rng(4).integers(1, 30, 50)
    sampler = CandidateSampler(counts, NegativesConfig(uniform=64, popular=128), seed=3)
    expected = sampler.expected_count(np.arange(2_000), batch=256, memory=memory)
    assert expected.sum() == pytest.approx(448 + memory, rel=1e-5)
    assert expected.min() > 0


def test_an_item_that_can_not_be_a_candidate_has_a_correction_that_is_a_number() -> None:
    sampler = CandidateSampler(COUNTS, NegativesConfig(), seed=3)
    assert sampler.expected_count(np.arange(7), batch=50, memory=9)[1] == 0
    for batch in (1, 50):
        assert np.isfinite(sampler.log_q(np.array([0, 1, 2, -1]), batch, memory=0)).all()


@pytest.mark.parametrize("unchosen", ["negative", "new"])
def test_what_nobody_chose_is_a_negative_like_any_other_or_none(unchosen: Literal["negative", "new"]) -> None:
    """Against the sum over the catalogue in which such an item is, or is not."""
    scores = np.array([0.3, 3.0, -1.0, 0.5, 1.5, 2.5, -0.4])
    rng = np.random.default_rng(2)
    sampler = CandidateSampler(COUNTS, NegativesConfig(uniform=50, popular=20, unchosen=unchosen), seed=1)
    sums, drawn = [], set()
    for step in range(3_000):
        rows = np.concatenate([rng.choice(len(COUNTS), 30, p=COUNTS / COUNTS.sum()), sampler.draw(step)])
        drawn.update(rows.tolist())
        # One of a batch is each query's own positive, so 31 of them make 30 negatives.
        sums.append(np.exp(scores[rows] - sampler.log_q(rows, batch=31, memory=0)).sum())
    counts = np.exp(scores) * ((COUNTS > 0) | (unchosen == "negative"))
    assert np.mean(sums) == pytest.approx(counts.sum(), rel=0.02)
    assert drawn == set(np.flatnonzero(counts))
    expected = sampler.expected_count(np.arange(len(COUNTS)), batch=31, memory=0)
    assert expected.sum() == pytest.approx(31 + 70)


def test_one_row_stands_for_what_nobody_chose_where_it_may_be_a_negative() -> None:
    drawn, new = NegativesConfig(uniform=5), NegativesConfig(uniform=5, unchosen="new")
    first = 1 + int(np.flatnonzero(COUNTS == 0)[0])
    for config, counts, row in (
        (drawn, COUNTS, first),
        (NegativesConfig(popular=5), COUNTS, first),
        (NegativesConfig(explicit=1), COUNTS, first),
        (NegativesConfig(mined=MinedConfig(per_query=1)), COUNTS, first),
        (new, COUNTS, 0),
        (NegativesConfig(), COUNTS, 0),
        (drawn, np.maximum(COUNTS, 1), 0),
    ):
        assert CandidateSampler(counts, config, seed=1).unchosen_row == row


def test_a_step_draws_the_same_on_every_rank_and_another_step_others() -> None:
    one, other = (CandidateSampler(COUNTS, NegativesConfig(uniform=9, popular=9), seed=3) for _ in range(2))
    assert one.draw(5).tolist() == other.draw(5).tolist()
    assert one.draw(5).tolist() != one.draw(6).tolist()
    assert (
        CandidateSampler(COUNTS, NegativesConfig(uniform=9), seed=4).draw(5).tolist() != one.draw(5).tolist()
    )


def test_corrected_candidates_estimate_the_sum_over_the_catalogue() -> None:
    """With logQ the sum of exp(score) / q over a step's candidates is the whole softmax denominator."""
    sampler = CandidateSampler(COUNTS, NegativesConfig(uniform=50, popular=20), seed=1)
    scores = np.array([0.3, 2.0, -1.0, 0.5, 1.5, 2.5, -0.4])
    rng = np.random.default_rng(2)
    estimates, uncorrected = [], []
    for step in range(2_000):
        batch = rng.choice(len(COUNTS), 30, p=np.maximum(COUNTS, 1) / np.maximum(COUNTS, 1).sum())
        rows = np.concatenate([batch, sampler.draw(step)])
        expected = sampler.expected_count(rows, batch=30, memory=0)
        estimates.append(np.exp(scores[rows] - np.log(expected)).sum())
        uncorrected.append(np.exp(scores[rows]).sum())
    whole = np.exp(scores).sum()
    assert np.mean(estimates) == pytest.approx(whole, rel=0.02)
    assert np.mean(uncorrected) / len(rows) * len(scores) < 0.8 * whole


def test_the_memory_keeps_the_latest_candidates() -> None:
    memory = CandidateMemory(5, 2, torch.device("cpu"))
    vectors = torch.arange(18.0).view(9, 2)
    memory.push(vectors[:3], torch.tensor([10, 11, 12]))
    assert len(memory) == 3
    memory.push(vectors[3:7], torch.tensor([13, 14, 15, 16]))
    kept = dict(zip(memory.item_rows.tolist(), memory.vectors.tolist(), strict=True))
    assert kept == {10 + i: vectors[i].tolist() for i in range(2, 7)}
    other = CandidateMemory(5, 2, torch.device("cpu"))
    other.load_state_dict(memory.state_dict())
    for m in (memory, other):
        m.push(vectors[7:], torch.tensor([17, 18]))
    assert set(other.item_rows.tolist()) == {14, 15, 16, 17, 18}
    assert torch.equal(other.vectors, memory.vectors)
    many = CandidateMemory(2, 2, torch.device("cpu"))
    many.push(vectors, torch.arange(9))
    assert sorted(many.item_rows.tolist()) == [7, 8]
