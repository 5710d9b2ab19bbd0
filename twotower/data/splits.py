"""Train, validation and test: which interactions are held out.

The splits are over positive interactions. Negative and seen_only ones follow their user's time: those from
the user's first test positive on belong to test, and before that from the first validation positive on to
validation.

A held-out part never takes a user's last train interaction: of n positives ``min(ceil(test_share n), n - 1)``
are test, of the m that remain ``min(ceil(validation_share m), m - 1)`` are validation. So a user with one
positive is all train, one with two has no validation. (``temporal_global`` and a given split follow the
moment, or the data, whatever that leaves of a user.) In a random split, which has no such moment, those
other interactions are train; in a given one they are what the data says. Impressions are not split here:
``impressions.attach`` gives each the split of the interaction that lists it.

With ``ties: together`` the positives of one user at one time are a moment, and a split by time never parts
it: the moment that such a count cuts is held out as a whole, unless it is the user's first. With
``ties: order`` rows of one time follow each other in the order of the source, and a count may cut there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.config import SplitConfig
from twotower.data.chunks import BoolArray, IntArray
from twotower.data.interactions import user_blocks
from twotower.data.reading import NO_SPLIT
from twotower.errors import ConfigError, DataError
from twotower.schema import KINDS, SPLITS

TRAIN, VALIDATION, TEST = (np.int8(SPLITS[name]) for name in ("train", "validation", "test"))
SplitArray = npt.NDArray[np.int8]


def assign_splits(
    columns: dict[str, npt.NDArray[Any]], config: SplitConfig, has_times: bool, seed: int
) -> SplitArray:
    """Return the split of each interaction, [n] int8.

    Args:
        columns: Columns sorted by user_row, time and source order; ``split`` holds a given split.
        config: Kind and shares.
        has_times: Whether times mean anything.
        seed: Seed of random splits.

    Raises:
        ConfigError: the kind needs times or a given split, and there are none.
        DataError: a split is empty.
    """
    positive = columns["kind"] == KINDS["positive"]
    if not positive.any():
        raise DataError(
            f"none of the {len(positive):,} interactions is positive; lower data.positives.min_value or give "
            "an event type a weight in data.source.events"
        )
    if config.kind in ("temporal_user", "temporal_global", "leave_one_out") and not has_times:
        raise ConfigError(
            f"split.kind: {config.kind} needs times, and the source has none; use random or given"
        )
    if config.kind == "given" and (columns["split"] == NO_SPLIT).any():
        raise ConfigError(
            "split.kind: given needs a source with a split; set data.source.columns.split or another kind"
        )
    if config.kind == "temporal_global":
        split = _temporal_global(columns["time"], positive, config)
    else:
        split = columns["split"].copy() if config.kind == "given" else np.full(len(positive), TRAIN, np.int8)
        _per_user(columns["user_row"], columns["time"], positive, split, config, has_times, seed)
    _refuse_empty(split[positive], config)
    return split


def count_ties(columns: dict[str, npt.NDArray[Any]]) -> dict[str, int]:
    """Return how many positives share their time with another one of their user, and of how many users.

    Args:
        columns: Sorted columns of a source with times.
    """
    positive = columns["kind"] == KINDS["positive"]
    user, time = columns["user_row"][positive], columns["time"][positive]
    same = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
    tied = np.append(same, False) | np.append(False, same) if len(user) else np.zeros(0, np.bool_)
    return {"positives": int(tied.sum()), "users": len(np.unique(user[tied]))}


def _per_user(
    user: npt.NDArray[np.int32],
    time: npt.NDArray[np.int64],
    positive: BoolArray,
    split: SplitArray,
    config: SplitConfig,
    has_times: bool,
    seed: int,
) -> None:
    """Hold out a part of each user, in place, block of users by block of users.

    A given split that has no validation part gets one out of each user's train part: the last of it by time,
    or a random one where there are no times.
    """
    held_out = positive
    if config.kind == "given":
        if (split[positive] == VALIDATION).any():
            return
        held_out = positive & (split == TRAIN)
    at_random = config.kind == "random" or (config.kind == "given" and not has_times)
    rng = np.random.default_rng([seed, 1]) if at_random else None
    together = config.ties == "together" and not at_random
    for rows in user_blocks(user):
        block_user, part = user[rows], split[rows]
        # Where rows of one time may be parted, each is a moment of its own.
        moment = _moments(block_user, time[rows]) if together else np.arange(len(block_user))
        chosen = np.flatnonzero(held_out[rows])
        from_end, size = _places(block_user[chosen], rng)
        whole = _Whole(block_user[chosen], moment[chosen], from_end, size)
        test = whole.last(_num_test(size, config))
        held = whole.last(whole.count(test) + _num_validation(size - whole.count(test), config))
        part[chosen[held]] = VALIDATION
        part[chosen[test]] = TEST
        if config.kind in ("temporal_user", "leave_one_out"):
            _follow(block_user, moment, positive[rows], part)


def _share(share: float, size: IntArray) -> IntArray:
    # 0.07 * 100 is 7.000000000000001, which must not round up to 8.
    count: IntArray = np.ceil(share * size - 1e-9).astype(np.int64)
    return count


def _num_test(size: IntArray, config: SplitConfig) -> IntArray:
    """Return how many of a user's ``size`` positives are test, elementwise."""
    if config.kind == "given":
        return np.zeros_like(size)
    if config.kind == "leave_one_out":
        return (size >= 2).astype(np.int64)
    return np.minimum(_share(config.test_share, size), size - 1)


def _num_validation(size: IntArray, config: SplitConfig) -> IntArray:
    """Return how many of the ``size`` positives that are not test are validation, elementwise."""
    if config.kind == "leave_one_out":
        return (size >= 2).astype(np.int64)
    return np.minimum(_share(config.validation_share, size), size - 1)


def _moments(user: npt.NDArray[Any], time: npt.NDArray[np.int64]) -> IntArray:
    """Return [n] int64: the same number for rows of one user and time, and only for them, ascending."""
    new = np.ones(len(user), dtype=np.int64)
    new[1:] = (user[1:] != user[:-1]) | (time[1:] != time[:-1])
    return np.cumsum(new)


class _Whole:
    """Takes a number of each user's last rows, and never a part of a moment, nor a user's first one."""

    def __init__(self, user: npt.NDArray[Any], moment: IntArray, from_end: IntArray, size: IntArray) -> None:
        """Take rows sorted by user and moment, each row's distance from its user's end, and users' sizes."""
        self._from_end, self._size = from_end, size
        n = len(user)
        begins = np.flatnonzero(np.append(True, moment[1:] != moment[:-1])) if n else np.empty(0, np.int64)
        self._of = np.repeat(np.arange(len(begins)), np.diff(np.append(begins, n)))
        # Of each moment: the distances of its last row and of its first.
        self._last = np.minimum.reduceat(from_end, begins) if n else begins
        self._first = np.maximum.reduceat(from_end, begins) if n else begins
        self._users = np.flatnonzero(np.append(True, user[1:] != user[:-1])) if n else begins

    def last(self, count: IntArray) -> BoolArray:
        """Return which rows [n] are in moments that the last ``count`` [n] rows of their user reach."""
        first_of_user = self._first[self._of] == self._size - 1
        taken: BoolArray = (self._last[self._of] < count) & ~first_of_user
        return taken

    def count(self, taken: BoolArray) -> IntArray:
        """Return how many rows of each row's user are taken, [n]."""
        if not len(taken):
            return np.empty(0, np.int64)
        each = np.add.reduceat(taken.astype(np.int64), self._users)
        return np.repeat(each, np.diff(np.append(self._users, len(taken))))


def _places(user: npt.NDArray[Any], rng: np.random.Generator | None) -> tuple[IntArray, IntArray]:
    """Return each row's distance from its user's end (0 is the last), and the user's number of rows.

    Args:
        user: [n] sorted user rows.
        rng: Shuffles each user's rows; their own order when None.
    """
    n = len(user)
    starts = np.flatnonzero(np.append(True, user[1:] != user[:-1])) if n else np.empty(0, dtype=np.int64)
    counts = np.diff(np.append(starts, n))
    size = np.repeat(counts, counts)
    from_end = np.repeat(starts + counts, counts) - 1 - np.arange(n)
    if rng is not None:
        order = np.lexsort((rng.random(n), user))
        shuffled = np.empty(n, dtype=np.int64)
        shuffled[order] = from_end
        from_end = shuffled
    return from_end, size


def _follow(user: npt.NDArray[Any], moment: IntArray, positive: BoolArray, split: SplitArray) -> None:
    """Give interactions that are not positive the split of their place in their user's time, in place."""
    if positive.all():
        return
    n = len(user)
    local = user - user[0]
    result = np.full(n, TRAIN, dtype=np.int8)
    for part in (VALIDATION, TEST):
        first = np.full(int(local[-1]) + 1, np.iinfo(np.int64).max)
        held_out = np.flatnonzero(positive & (split == part))
        first[local[held_out][::-1]] = moment[held_out[::-1]]  # the last assignment, the earliest, stays
        result[moment >= first[local]] = part
    split[~positive] = result[~positive]


def _temporal_global(time: npt.NDArray[np.int64], positive: BoolArray, config: SplitConfig) -> SplitArray:
    """Split at two moments: the latest share of positives is held out, with all from its start on."""
    ordered = time[positive]
    ordered.sort()
    n = len(ordered)
    test_from = ordered[n - int(_share(config.test_share, np.array(n)))]
    m = int(np.searchsorted(ordered, test_from, side="left"))
    if not m:
        return np.full(len(time), TEST, dtype=np.int8)
    validation_from = ordered[m - int(_share(config.validation_share, np.array(m)))]
    split = np.full(len(time), TRAIN, dtype=np.int8)
    split[time >= validation_from] = VALIDATION
    split[time >= test_from] = TEST
    return split


def _refuse_empty(split: SplitArray, config: SplitConfig) -> None:
    counts = {name: int((split == code).sum()) for name, code in SPLITS.items()}
    empty = [name for name, count in counts.items() if not count]
    if empty:
        shown = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        raise DataError(
            f"split.kind: {config.kind} leaves the {' and the '.join(empty)} split empty (positive "
            "interactions: "
            f"{shown}); use another split.kind or other shares, or give more data: a user needs 3 positive "
            "interactions to be in all three, and with split.ties: together at 3 different times"
        )
