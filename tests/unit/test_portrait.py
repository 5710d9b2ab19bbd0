"""What lists look like: recall at every length, and how popular what they show is, against slow loops."""

from __future__ import annotations

import numpy as np
import pytest

from tests import oracles
from twotower.evaluation.metrics import hit_matrix
from twotower.evaluation.portrait import Found, band_edges, exposure, recall_by_k, recall_ks

N, K, Q = 23, 12, 17


@pytest.fixture
def lists(rng):
    ranked = np.array([rng.permutation(N)[:K] for _ in range(Q)])
    ranked[3, 5:] = -1
    relevant = [set(rng.choice(N, rng.integers(1, 6), replace=False).tolist()) for _ in range(Q)]
    relevant[4] = set()
    return ranked, relevant


def found_of(ranked, relevant):
    found = Found(K)
    found.add(*hit_matrix(ranked, *oracles.csr(relevant)))
    return found


def test_recall_at_every_length(lists):
    ranked, relevant = lists
    found = recall_by_k({"model": found_of(ranked, relevant)}, [4, K])
    # The cut-offs of the tables are among them.
    assert found["ks"] == [1, 2, 3, 4, 5, 7, 10, 12]
    for k, value in zip(found["ks"], found["rankers"]["model"], strict=True):
        expected = [oracles.recall_at_k(r, s, k) for r, s in zip(ranked, relevant, strict=True) if s]
        assert value == pytest.approx(np.mean(expected), abs=1e-12)


def test_parts_add_up(lists):
    ranked, relevant = lists
    whole, merged = found_of(ranked, relevant), Found(K)
    for rows in (slice(0, 5), slice(5, 5), slice(5, Q)):
        merged.merge(found_of(ranked[rows], relevant[rows]).state())
    assert merged.recall(range(1, K + 1)) == pytest.approx(whole.recall(range(1, K + 1)))


def test_without_queries_there_is_no_recall():
    assert np.isnan(Found(3).recall([1, 3])).all()


@pytest.mark.parametrize("length", [1, 2, 10, 37, 100, 1000])
def test_cut_offs_reach_from_one_to_the_whole_list(length):
    ks = recall_ks(length)
    assert ks[0] == 1
    assert ks[-1] == length
    assert ks == sorted(set(ks))
    assert len(ks) <= 20


@pytest.mark.parametrize("most", [0, 1, 2, 3, 9, 100, 329, 100_000, 10**9])
def test_bands_part_all_counts(most):
    edges = band_edges(most)
    assert edges[0] == (0, 0)
    assert edges[-1][1] == most
    assert all(low <= high for low, high in edges)
    assert [low for low, _ in edges[1:]] == [high + 1 for _, high in edges[:-1]]
    assert len(edges) <= 9


def test_exposure_is_of_what_was_consumed_and_recommended(rng):
    counts = rng.integers(0, 60, 200)
    counts[:20] = 0
    consumed, shown = rng.integers(0, 9, 200), rng.integers(0, 5, 200)
    found = exposure(counts, consumed, shown, 10)
    assert sum(band["items"] for band in found["bands"]) == 200
    for key, values in (("consumed", consumed), ("recommended", shown)):
        assert sum(band[key] for band in found["bands"]) == pytest.approx(1.0)
        nobody = found["bands"][0]
        assert nobody["name"] == nobody["label"] == "0"
        assert nobody[key] == pytest.approx(values[counts == 0].sum() / values.sum())
    assert [band["label"] for band in found["bands"][1:]] == [
        f"{band['name'].split(chr(0x2013))[0]}+" for band in found["bands"][1:]
    ]


def test_nothing_shown_is_no_division_by_nothing():
    zeros = np.zeros(3, np.int64)
    assert exposure(zeros, zeros, zeros, 10)["bands"] == [
        {"name": "0", "label": "0", "items": 3, "consumed": 0.0, "recommended": 0.0}
    ]
