"""How sure a mean over users is: bootstrap intervals, and a paired test of two rankers.

Users are resampled with replacement, the same ones for every ranker and metric. Where there are many they
are resampled in random groups of nearly equal size, whose means vary as much for their size as users do.

Legend: Q users, C metrics, G groups, B resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import special

Floats = NDArray[np.float64]
Values = NDArray[np.float32]

RESAMPLES = 1_000
_MOST_GROUPS = 4_000
_LEVEL = 0.95
_FEWEST = 2


class Bootstrap:
    """Resamples of ``num_users`` users.

    Source: Efron and Tibshirani (1993), "An introduction to the bootstrap", section 13.3 (percentiles).
    """

    def __init__(self, num_users: int, seed: int) -> None:
        """Draw the resamples with ``seed``."""
        rng = np.random.default_rng([seed, 5])
        groups = min(num_users, _MOST_GROUPS)
        self._group = rng.permutation(num_users) % max(groups, 1)
        self._sizes = np.bincount(self._group, minlength=groups).astype(np.float64)
        self._times = rng.multinomial(groups, np.full(groups, 1.0 / groups), RESAMPLES).astype(np.float64)
        self._times /= (self._times @ self._sizes)[:, None]

    def intervals(self, values: Values | Floats) -> Floats:
        """Return the 95% interval of each mean of values [Q, C]: [C, 2] float64."""
        columns = np.asarray(values, dtype=np.float64)
        sums = np.stack([np.bincount(self._group, column, len(self._sizes)) for column in columns.T], axis=1)
        tail = 50.0 * (1.0 - _LEVEL)
        return np.percentile(self._times @ sums, [tail, 100.0 - tail], axis=0).T


def intervals(
    values: Mapping[str, Values], names: Sequence[str], seed: int
) -> dict[str, dict[str, list[float]]]:
    """Return the 95% interval of each ranker's mean of each metric.

    Args:
        values: by ranker, [Q, C] float32, a row for each user.
        names: [C] of the metrics.
        seed: of the resamples.

    Returns:
        by ranker and metric, low and high; none where there are fewer than two users.
    """
    count = len(next(iter(values.values())))
    if count < _FEWEST:
        return {}
    draws = Bootstrap(count, seed)
    return {
        ranker: dict(zip(names, draws.intervals(mine).tolist(), strict=True))
        for ranker, mine in values.items()
    }


def differences(
    first: Values, values: Mapping[str, Values], others: Sequence[str], names: Sequence[str], seed: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Return how much better ``first`` is than each other ranker on the same users, by metric.

    ``difference`` is the difference of the means, ``low`` and ``high`` its 95% bootstrap interval, and ``p``
    that of the paired, two-sided t-test over users; 1 where no user differs.

    Source: Smucker, Allan and Carterette (2007), "A comparison of statistical significance tests for
    information retrieval evaluation".

    Args:
        first: [Q, C] float32, a row for each user.
        values: by ranker, [Q, C] float32.
        others: the rankers that ``first`` is compared with.
        names: [C] of the metrics.
        seed: of the resamples.
    """
    count = len(first)
    if count < _FEWEST:
        return {}
    draws = Bootstrap(count, seed)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for ranker in others:
        gain = np.asarray(first, dtype=np.float64) - values[ranker]
        means, spans, chances = gain.mean(axis=0), draws.intervals(gain), paired_p(gain)
        found[ranker] = {
            name: {"difference": float(mean), "low": float(low), "high": float(high), "p": float(p)}
            for name, mean, (low, high), p in zip(names, means, spans, chances, strict=True)
        }
    return found


def paired_p(gain: Floats) -> Floats:
    """Return the p of the two-sided t-test that the differences [Q, C] of users have mean 0: [C] float64."""
    count = len(gain)
    means, deviations = gain.mean(axis=0), gain.std(axis=0, ddof=1)
    # Rounding of equal differences is no deviation.
    constant = deviations <= 1e-12 * np.abs(means)
    t = np.divide(means, deviations / np.sqrt(count), out=np.zeros_like(means), where=~constant)
    p = 2.0 * special.stdtr(count - 1, -np.abs(t))
    return np.where(constant, np.where(means == 0.0, 1.0, 0.0), p)
