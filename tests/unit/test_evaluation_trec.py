"""The metrics of each user equal those of trec_eval, by ir-measures."""

import ir_measures
import numpy as np
import pytest
from ir_measures import AP, RR, P, R, Success, nDCG

from tests import oracles
from twotower.evaluation import metrics

NUM_QUERIES, NUM_ITEMS, WIDTH = 60, 83, 40
KS = (1, 5, 10, 30)
MEASURES = {"recall": R, "ndcg": nDCG, "mrr": RR, "hit_rate": Success, "map": AP, "precision": P}


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(41)
    lists = [rng.permutation(NUM_ITEMS)[: rng.integers(2, WIDTH + 1)].tolist() for _ in range(NUM_QUERIES)]
    # More relevant items than the smallest cut-offs, and fewer.
    relevant = [set(rng.permutation(NUM_ITEMS)[: rng.integers(1, 25)].tolist()) for _ in range(NUM_QUERIES)]
    return lists, relevant


@pytest.fixture(scope="module")
def theirs(case):
    """By measure, the value of each query."""
    lists, relevant = case
    qrels = {f"q{q}": {f"i{item}": 1 for item in items} for q, items in enumerate(relevant)}
    run = {
        f"q{q}": {f"i{item}": float(WIDTH - rank) for rank, item in enumerate(items)}
        for q, items in enumerate(lists)
    }
    wanted = [measure @ k for measure in MEASURES.values() for k in KS]
    found = {str(measure): np.full(NUM_QUERIES, np.nan) for measure in wanted}
    for value in ir_measures.iter_calc(wanted, qrels, run):
        found[str(value.measure)][int(value.query_id[1:])] = value.value
    return found


@pytest.mark.parametrize("name", metrics.METRICS.names)
@pytest.mark.parametrize("k", KS)
def test_metric_is_that_of_trec_eval(case, theirs, name, k):
    lists, relevant = case
    hits = metrics.hit_matrix(oracles.pad(lists, WIDTH), *oracles.csr(relevant))
    ours = metrics.per_query(*hits, KS)[:, metrics.METRICS.names.index(name), KS.index(k)]
    expected = theirs[str(MEASURES[name] @ k)]
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    assert 0 < ours.mean() < 1
    assert len(np.unique(ours)) > 1
