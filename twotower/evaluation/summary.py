"""From what was measured to what a report tells: slices side by side, and whether the model has collapsed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twotower.evaluation.comparison import Outcome
from twotower.evaluation.lists import TOP_LIST_LENGTH
from twotower.evaluation.slices import Slice

Values = NDArray[np.float32]

COLLAPSED = 0.5
"""Mean overlap of two users' top ten, before masks, from which most users get the same answer."""
_FEWEST_USERS = 20


def slice_tables(
    values: Mapping[str, Values],
    outcomes: Mapping[str, Outcome],
    names: Sequence[str],
    users: Sequence[Slice],
    items: Sequence[Slice],
) -> list[dict[str, Any]]:
    """Return ``by``, ``value``, ``users`` and ``metrics`` by ranker of each slice with a user.

    Args:
        values: by ranker, [Q, C] float32, the metrics of each user.
        outcomes: by ranker, with the sums of each slice of items.
        names: [C] of the metrics.
        users: slices of users.
        items: slices of items, in the order of the outcomes'.
    """
    by_users: list[dict[str, dict[str, float]]] = [{} for _ in users]
    for ranker, mine in values.items():
        for found, piece in zip(by_users, users, strict=True):
            means = mine[piece.members].mean(axis=0, dtype=np.float64)
            found[ranker] = dict(zip(names, means.tolist(), strict=True))
    tables = [
        {"by": piece.by, "value": piece.value, "users": int(piece.members.sum()), "metrics": metrics}
        for piece, metrics in zip(users, by_users, strict=True)
    ]
    for number, piece in enumerate(items):
        sums = {ranker: outcome.slices[number] for ranker, outcome in outcomes.items()}
        count = next(iter(sums.values())).num_queries
        if count:
            metrics = {ranker: one.result() for ranker, one in sums.items()}
            tables.append({"by": piece.by, "value": piece.value, "users": count, "metrics": metrics})
    return tables


def collapse_of(overlap: float, num_users: int) -> str | None:
    """Return a sentence where a model gives most users the same answer, else None.

    Args:
        overlap: mean share of their top ten that two users have in common, before anything is masked.
        num_users: test users; of few nothing is said.
    """
    if num_users < _FEWEST_USERS or not math.isfinite(overlap) or overlap < COLLAPSED:
        return None
    return (
        f"The model gives most users the same answer: before what they have had is left out, two users have "
        f"{overlap:.0%} of their top {TOP_LIST_LENGTH} in common. Look at the temperature, at the query's "
        "features, and at how many users know nothing."
    )
