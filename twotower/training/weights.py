"""Factors of an example's weight in the loss beside that of its interaction: recency and activity.

Weights are divided by their sum over the global batch, so only ratios matter: from which moment an age is
counted changes nothing, as long as it is the same for all examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twotower.config.losses import LossConfig
from twotower.data.dataset import Dataset

_DAY_US = 86_400_000_000
_MOST_HALF_LIVES = 700.0
"""Older examples weigh alike: the smallest product of all factors is then a normal float64, and a batch of
old examples has a sum above 0."""


@dataclass(frozen=True)
class Factors:
    """What the weight of an example is multiplied by."""

    half_life_us: float | None
    """Age, in microseconds, that halves the weight; None leaves age out."""
    as_of: int
    """int64 microseconds UTC, from which ages are counted."""
    activity_power: float
    """An example of a user with n examples counts n to minus this."""

    @classmethod
    def of(cls, loss: LossConfig, dataset: Dataset) -> Factors | None:
        """Return the factors of a configuration, None where there are none."""
        days = loss.recency_half_life_days
        if days is None and loss.activity_power == 0:
            return None
        return cls(None if days is None else days * _DAY_US, dataset.as_of or 0, loss.activity_power)

    def __call__(
        self, times: npt.NDArray[np.int64], user_counts: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """Return the factor of examples, [B] float64, above 0.

        Args:
            times: [B] int64 microseconds UTC.
            user_counts: [B] int64, examples of each one's user.
        """
        factor = user_counts.astype(np.float64) ** -self.activity_power
        if self.half_life_us is not None:
            age = (self.as_of - times) / self.half_life_us
            factor *= np.exp2(-np.minimum(age, _MOST_HALF_LIVES))
        return factor
