"""Counts that samplers, corrections and baselines draw on."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from twotower.data.interactions import Interactions, count_rows
from twotower.schema import KINDS


def popularity(interactions: Interactions, num_items: int) -> npt.NDArray[np.int64]:
    """Return [num_items] int64: the number of positive interactions of each item row."""
    positive = interactions.kind == KINDS["positive"]
    return count_rows(interactions.item_row[positive], num_items)
