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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from twotower.config.splits import SPLIT_KINDS, SplitConfig
from twotower.data.chunks import BoolArray, IntArray
from twotower.data.interactions import user_blocks
from twotower.data.reading import NO_SPLIT
from twotower.errors import ConfigError, DataError
from twotower.registry import imported
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
    kind = SPLIT_KINDS[config.kind]
    if kind.needs_times and not has_times:
        raise ConfigError(config.needs_times_message())
    if kind.needs_given and (columns["split"] == NO_SPLIT).any():
        raise ConfigError(
            f"split.kind: {config.kind} needs a source with a split; set data.source.columns.split or "
            "another kind"
        )
    assign: Assign = imported(kind.assign)
    split = assign(Rows(columns, positive, has_times), config, seed)
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


@dataclass(frozen=True)
class Rows:
    """The interactions of a dataset, n of them, sorted by user, time and the order of the source."""

    columns: dict[str, npt.NDArray[Any]]
    """[n] each: ``user_row`` int32, ``time`` int64 in microseconds, ``kind`` int8 of ``schema.KINDS``, and
    ``split`` int8, the given one or ``NO_SPLIT``."""
    positive: BoolArray
    """[n] bool, which of them are positive: the others follow these."""
    has_times: bool
    """Whether times mean anything."""


class Assign(Protocol):
    """A kind of split: what ``SplitKind.assign`` names."""

    def __call__(self, rows: Rows, config: SplitConfig, seed: int) -> SplitArray:
        """Return the split of each interaction, [n] int8 of ``schema.SPLITS``.

        Args:
            rows: all interactions.
            config: shares and ties.
            seed: of what is drawn; a kind that uses it says so (``SplitKind.uses_seed``).
        """


Count = Callable[[IntArray], IntArray]
"""How many of a user's rows are held out, from how many there are, elementwise."""


def temporal_user(rows: Rows, config: SplitConfig, seed: int) -> SplitArray:
    """Hold out the last part of each user."""
    split = np.full(len(rows.positive), TRAIN, np.int8)
    test, validation = (_share_of(share) for share in (config.test_share, config.validation_share))
    _hold_out(rows, rows.positive, split, test, validation, config, None, follow=True)
    return split


def leave_one_out(rows: Rows, config: SplitConfig, seed: int) -> SplitArray:
    """Hold out the last one of each user, and for validation the one before it."""
    split = np.full(len(rows.positive), TRAIN, np.int8)
    _hold_out(rows, rows.positive, split, _one, _one, config, None, follow=True)
    return split


def at_random(rows: Rows, config: SplitConfig, seed: int) -> SplitArray:
    """Hold out a random part of each user."""
    split = np.full(len(rows.positive), TRAIN, np.int8)
    test, validation = (_share_of(share) for share in (config.test_share, config.validation_share))
    _hold_out(rows, rows.positive, split, test, validation, config, _generator(seed), follow=False)
    return split


def as_given(rows: Rows, config: SplitConfig, seed: int) -> SplitArray:
    """Take the split of the source.

    One that has no validation part gets one out of each user's train part: the last of it by time, or a
    random one where there are no times.
    """
    split: SplitArray = rows.columns["split"].copy()
    if (split[rows.positive] == VALIDATION).any():
        return split
    rng = None if rows.has_times else _generator(seed)
    held_out = rows.positive & (split == TRAIN)
    validation = _share_of(config.validation_share)
    _hold_out(rows, held_out, split, np.zeros_like, validation, config, rng, follow=False)
    return split


def temporal_global(rows: Rows, config: SplitConfig, seed: int) -> SplitArray:
    """Split at two moments: the latest share of positives is held out, with all from its start on."""
    time = rows.columns["time"]
    ordered = time[rows.positive]
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


def _generator(seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, 1])


def _hold_out(
    rows: Rows,
    held_out: BoolArray,
    split: SplitArray,
    num_test: Count,
    num_validation: Count,
    config: SplitConfig,
    rng: np.random.Generator | None,
    follow: bool,
) -> None:
    """Hold out a part of each user, in place, block of users by block of users.

    Args:
        rows: all interactions.
        held_out: [n] bool, which of them may be.
        split: [n] int8, changed.
        num_test: of a user's rows, how many are test.
        num_validation: of those that are not, how many are validation.
        config: what to do with ties.
        rng: draws them; the last ones where there is none.
        follow: whether the rows that are not positive follow their user's time.
    """
    user, time = rows.columns["user_row"], rows.columns["time"]
    together = config.ties == "together" and rng is None
    for block in user_blocks(user):
        block_user, part = user[block], split[block]
        # Where rows of one time may be parted, each is a moment of its own.
        moment = _moments(block_user, time[block]) if together else np.arange(len(block_user))
        chosen = np.flatnonzero(held_out[block])
        from_end, size = _places(block_user[chosen], rng)
        whole = _Whole(block_user[chosen], moment[chosen], from_end, size)
        test = whole.last(num_test(size))
        held = whole.last(whole.count(test) + num_validation(size - whole.count(test)))
        part[chosen[held]] = VALIDATION
        part[chosen[test]] = TEST
        if follow:
            _follow(block_user, moment, rows.positive[block], part)


def _share(share: float, size: IntArray) -> IntArray:
    # 0.07 * 100 is 7.000000000000001, which must not round up to 8.
    count: IntArray = np.ceil(share * size - 1e-9).astype(np.int64)
    return count


def _share_of(share: float) -> Count:
    """Return a count that is a share of a user's rows and never all of them."""
    return lambda size: np.minimum(_share(share, size), size - 1)


def _one(size: IntArray) -> IntArray:
    return (size >= 2).astype(np.int64)


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
