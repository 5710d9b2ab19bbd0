"""Order, repeats and small users and items: from raw columns to the interactions that stay.

Impressions are not among the rows yet: they stay or go with the interaction that lists them.

All functions work on columns sorted by user_row, time and source order.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from twotower.data.chunks import BoolArray
from twotower.data.interactions import count_rows, user_blocks
from twotower.schema import KINDS, MAX_WEIGHT

Columns = dict[str, npt.NDArray[Any]]
Repeats = Literal["first", "last", "sum", "keep"]
_BLOCK_ROWS = 1 << 20


def sort(columns: Columns) -> None:
    """Sort columns in place by user_row, time and source order."""
    user, time = columns["user_row"], columns["time"]
    if _is_sorted(user, time):
        return
    order = np.lexsort((time, user))  # stable: rows of equal keys stay in source order
    for name in columns:
        columns[name] = columns[name][order]


def _is_sorted(user: npt.NDArray[np.int32], time: npt.NDArray[np.int64]) -> bool:
    for start in range(0, len(user), _BLOCK_ROWS):
        u, t = user[start : start + _BLOCK_ROWS + 1], time[start : start + _BLOCK_ROWS + 1]
        if not bool(((u[1:] > u[:-1]) | ((u[1:] == u[:-1]) & (t[1:] >= t[:-1]))).all()):
            return False
    return True


def keep_rows(columns: Columns, mask: BoolArray) -> None:
    """Keep the rows where ``mask`` [n] is true, in place."""
    if not mask.all():
        for name in columns:
            columns[name] = columns[name][mask]


def reduce_repeats(columns: Columns, policy: Repeats) -> int:
    """Reduce several interactions of one user and item in one split, in place; return how many rows went.

    Splits are reduced apart: what happens in a held-out part takes nothing from what was known before it.

    Positive and negative interactions are opinions and are reduced together: with ``last`` a later negative
    replaces an earlier positive. ``sum`` keeps the last opinion, with the sum of the weights of the opinions
    of its own kind, at most ``MAX_WEIGHT``. A seen_only interaction never displaces an opinion: it goes where
    the pair has an opinion, at whatever time, and is reduced to the first or (last, sum) the last where it
    has none. ``keep`` keeps every row.

    Args:
        columns: Sorted columns, with their splits.
        policy: ``data.repeats``.
    """
    if policy == "keep":
        return 0
    kept = np.ones(len(columns["user_row"]), dtype=np.bool_)
    for rows in user_blocks(columns["user_row"]):
        block = {name: column[rows] for name, column in columns.items()}
        kept[rows] = _first_or_last(block, policy)
    gone = len(kept) - int(kept.sum())
    keep_rows(columns, kept)
    return gone


def _first_or_last(columns: Columns, policy: Repeats) -> BoolArray:
    """Return which rows stay, and for ``sum`` write the sums into the weights of those."""
    user, item, kind = columns["user_row"], columns["item_row"], columns["kind"]
    n = len(user)
    opinion = kind != KINDS["seen_only"]
    pair: list[npt.NDArray[Any]] = [item, user, columns["split"]]
    # By pair, opinions before mere impressions, then by position.
    order = np.lexsort((~opinion, *pair))
    same = np.ones(n - 1, dtype=np.bool_)
    for key in pair:
        ordered = key[order]
        same &= ordered[1:] == ordered[:-1]
    if not same.any():
        return np.ones(n, dtype=np.bool_)
    group = np.zeros(n, dtype=np.int64)
    np.cumsum(~same, out=group[1:])
    starts = np.flatnonzero(np.append(True, ~same))
    num_opinions = np.add.reduceat(opinion[order].astype(np.int64), starts)
    size = np.diff(np.append(starts, n))
    # Opinions come first inside a group; where there are none the impressions are the candidates.
    candidates = np.where(num_opinions > 0, num_opinions, size)
    chosen = starts if policy == "first" else starts + candidates - 1
    if policy == "sum":
        ordered_kind = kind[order]
        alike = opinion[order] & (ordered_kind == ordered_kind[chosen][group])
        weight = np.where(alike, columns["weight"][order].astype(np.float64), 0.0)
        sums = np.add.reduceat(weight, starts)
        has_opinion = num_opinions > 0
        columns["weight"][order[chosen][has_opinion]] = np.minimum(sums[has_opinion], MAX_WEIGHT)
    kept = np.zeros(n, dtype=np.bool_)
    kept[order[chosen]] = True
    return kept


def drop_small(
    columns: Columns, num_users: int, num_items: int, user_min: int, item_min: int, distinct: bool
) -> int:
    """Leave out users and items with too few interactions until none has; returns how many rows went.

    Args:
        columns: Sorted columns.
        num_users: users that ``user_row`` numbers.
        num_items: items that ``item_row`` numbers.
        user_min: the fewest interactions of a user.
        item_min: the fewest interactions of an item.
        distinct: count the interactions of one user and item as one, as where repeats are reduced later.
    """
    before = len(columns["user_row"])
    if user_min <= 1 and item_min <= 1:
        return 0
    counted = _first_of_pairs(columns) if distinct else np.ones(before, dtype=np.bool_)
    while len(columns["user_row"]):
        user, item = columns["user_row"], columns["item_row"]
        user_stays = count_rows(user[counted], num_users) >= user_min
        item_stays = count_rows(item[counted], num_items) >= item_min
        mask = user_stays[user] & item_stays[item]
        if mask.all():
            break
        keep_rows(columns, mask)
        counted = counted[mask]
    return before - len(columns["user_row"])


def _first_of_pairs(columns: Columns) -> BoolArray:
    """Return which rows are the first of their user and item, [n] bool."""
    first = np.zeros(len(columns["user_row"]), dtype=np.bool_)
    for rows in user_blocks(columns["user_row"]):
        pairs = (columns["user_row"][rows].astype(np.int64) << 32) | columns["item_row"][rows]
        first[rows.start + np.unique(pairs, return_index=True)[1]] = True
    return first


def compact(rows: npt.NDArray[np.int32], used: BoolArray) -> npt.NDArray[np.int32]:
    """Return ``rows`` renumbered over the true entries of ``used`` [num_rows], their order kept."""
    if used.all():
        return rows
    new_row = np.cumsum(used, dtype=np.int32) - np.int32(1)
    result = np.empty_like(rows)
    for start in range(0, len(rows), _BLOCK_ROWS):
        result[start : start + _BLOCK_ROWS] = new_row[rows[start : start + _BLOCK_ROWS]]
    return result
