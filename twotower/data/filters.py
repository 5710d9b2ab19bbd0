"""Order, repeats and small users and items: from raw columns to the interactions that stay.

All functions work on columns sorted by user_row, time and source order.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from twotower.data.chunks import BoolArray
from twotower.schema import KINDS

Columns = dict[str, npt.NDArray[Any]]
Repeats = Literal["first", "last", "sum", "keep"]


def sort(columns: Columns) -> None:
    """Sort columns in place by user_row, time and source order."""
    user, time = columns["user_row"], columns["time"]
    step = user[1:] - user[:-1]
    if bool(((step > 0) | ((step == 0) & (time[1:] >= time[:-1]))).all()):
        return
    order = np.lexsort((time, user))  # stable: rows of equal keys stay in source order
    for name in columns:
        columns[name] = columns[name][order]


def keep_rows(columns: Columns, mask: BoolArray) -> None:
    """Keep the rows where ``mask`` [n] is true, in place."""
    if not mask.all():
        for name in columns:
            columns[name] = columns[name][mask]


def reduce_repeats(columns: Columns, policy: Repeats, within_split: bool = False) -> int:
    """Reduce several interactions of one user and item, in place, and return how many rows went.

    Positive and negative interactions are opinions and are reduced together: with ``last`` a later negative
    replaces an earlier positive. ``sum`` keeps the last opinion, with the sum of the weights of the opinions
    of its own kind. A seen_only interaction never displaces an opinion: it goes where the pair has an
    opinion, at whatever time, and is reduced to the first or (last, sum) the last where it has none.
    ``keep`` keeps every row.

    Args:
        columns: Sorted columns.
        policy: ``data.repeats``.
        within_split: Treat the splits apart, so that a given split stays as it was given.
    """
    if policy == "keep" or not len(columns["user_row"]):
        return 0
    user, item, kind = columns["user_row"], columns["item_row"], columns["kind"]
    n = len(user)
    seen_only = kind == KINDS["seen_only"]
    # By pair, opinions before mere impressions, then by position.
    keys: list[npt.NDArray[Any]] = [seen_only, item]
    if within_split:
        keys.append(columns["split"])
    order = np.lexsort((*keys, user))
    same = np.ones(n - 1, dtype=np.bool_)
    for key in (user, *keys[1:]):
        ordered = key[order]
        same &= ordered[1:] == ordered[:-1]
    if not same.any():
        return 0
    group = np.zeros(n, dtype=np.int64)
    np.cumsum(~same, out=group[1:])
    starts = np.flatnonzero(np.append(True, ~same))
    ordered_opinion = ~seen_only[order]
    opinions = np.add.reduceat(ordered_opinion.astype(np.int64), starts)
    sizes = np.diff(np.append(starts, n))
    # Opinions come first inside a group; where there are none the impressions are the candidates.
    candidates = np.where(opinions > 0, opinions, sizes)
    chosen = starts if policy == "first" else starts + candidates - 1
    if policy == "sum":
        ordered_kind = kind[order]
        alike = ordered_opinion & (ordered_kind == ordered_kind[chosen][group])
        weight = np.where(alike, columns["weight"][order].astype(np.float64), 0.0)
        sums = np.add.reduceat(weight, starts)
        rows = order[chosen]
        has_opinion = opinions > 0
        columns["weight"][rows[has_opinion]] = sums[has_opinion].astype(np.float32)
    mask = np.zeros(n, dtype=np.bool_)
    mask[order[chosen]] = True
    keep_rows(columns, mask)
    return n - int(mask.sum())


def drop_small(columns: Columns, num_users: int, num_items: int, user_min: int, item_min: int) -> int:
    """Leave out users and items with too few interactions until none has; returns how many rows went."""
    before = len(columns["user_row"])
    while len(columns["user_row"]):
        users = np.bincount(columns["user_row"], minlength=num_users)
        items = np.bincount(columns["item_row"], minlength=num_items)
        mask = (users[columns["user_row"]] >= user_min) & (items[columns["item_row"]] >= item_min)
        if mask.all():
            break
        keep_rows(columns, mask)
    return before - len(columns["user_row"])


def compact(rows: npt.NDArray[np.int32], used: BoolArray) -> npt.NDArray[np.int32]:
    """Return ``rows`` renumbered over the true entries of ``used`` [num_rows], their order kept."""
    if used.all():
        return rows
    new_row = np.cumsum(used, dtype=np.int32) - np.int32(1)
    return np.asarray(new_row[rows], dtype=np.int32)
