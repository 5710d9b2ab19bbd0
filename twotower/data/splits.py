"""Train, validation and test: which interactions are held out.

The splits are over positive interactions. Negative and seen_only ones follow their user's time: those from
the user's first test positive on belong to test, and before that from the first validation positive on to
validation.

A held-out part never takes a user's last train interaction: of n positives ``min(ceil(test_share n), n - 1)``
are test, of the m that remain ``min(ceil(validation_share m), m - 1)`` are validation. So a user with one
positive is all train, one with two has no validation. (``temporal_global`` and a given split follow the
moment, or the data, whatever that leaves of a user.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.config import SplitConfig
from twotower.data.chunks import BoolArray, IntArray
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
            f"none of the {len(positive):,} interactions is positive; lower data.positives.min_value "
            "or give an "
            "event type a weight in data.source.events"
        )
    if config.kind in ("temporal_user", "temporal_global", "leave_one_out") and not has_times:
        raise ConfigError(
            f"split.kind: {config.kind} needs times, and the source has none; use random or given"
        )
    if config.kind == "given":
        split = _given(columns, positive, config, has_times, seed)
    elif config.kind == "temporal_global":
        split = _temporal_global(columns, positive, config)
    else:
        user = columns["user_row"][positive]
        key = np.random.default_rng([seed, 1]).random(len(user)) if config.kind == "random" else None
        from_end, size = _places(user, key)
        num_test, num_validation = _sizes(size, config)
        split = np.full(len(positive), TRAIN, dtype=np.int8)
        split[positive] = np.select(
            [from_end < num_test, from_end < num_test + num_validation], [TEST, VALIDATION], TRAIN
        )
        if config.kind != "random":
            _follow(columns["user_row"], positive, split)
    _refuse_empty(split[positive], config)
    return split


def _share(share: float, size: IntArray) -> IntArray:
    # 0.7 * 10 is 7.000000000000001, which must not round up to 8.
    count: IntArray = np.ceil(share * size - 1e-9).astype(np.int64)
    return count


def _sizes(size: IntArray, config: SplitConfig) -> tuple[IntArray, IntArray]:
    """Return how many of a user's ``size`` positives are test and validation, elementwise."""
    if config.kind == "leave_one_out":
        return (size >= 2).astype(np.int64), (size >= 3).astype(np.int64)
    test = np.minimum(_share(config.test_share, size), size - 1)
    rest = size - test
    return test, np.minimum(_share(config.validation_share, rest), rest - 1)


def _places(user: npt.NDArray[Any], key: npt.NDArray[np.float64] | None) -> tuple[IntArray, IntArray]:
    """Return each row's distance from its user's end (0 is the last), and the user's number of rows.

    Args:
        user: [n] sorted user rows.
        key: [n] order inside a user; the given order when None.
    """
    n = len(user)
    starts = np.flatnonzero(np.append(True, user[1:] != user[:-1])) if n else np.empty(0, dtype=np.int64)
    counts = np.diff(np.append(starts, n))
    size = np.repeat(counts, counts)
    from_end = np.repeat(starts + counts, counts) - 1 - np.arange(n)
    if key is not None:
        order = np.lexsort((key, user))
        shuffled = np.empty(n, dtype=np.int64)
        shuffled[order] = from_end
        from_end = shuffled
    return from_end, size


def _follow(user: npt.NDArray[Any], positive: BoolArray, split: SplitArray) -> None:
    """Give interactions that are not positive the split of their place in their user's time, in place."""
    if positive.all():
        return
    n = len(user)
    num_users = int(user.max()) + 1
    place = np.arange(n)
    result = np.full(n, TRAIN, dtype=np.int8)
    for part in (VALIDATION, TEST):
        first = np.full(num_users, n, dtype=np.int64)
        held_out = np.flatnonzero(positive & (split == part))
        first[user[held_out][::-1]] = held_out[::-1]  # the last assignment, the earliest row, stays
        result[place >= first[user]] = part
    split[~positive] = result[~positive]


def _temporal_global(
    columns: dict[str, npt.NDArray[Any]], positive: BoolArray, config: SplitConfig
) -> SplitArray:
    """Split at two moments: the latest share of positives is held out, with all from its start on."""
    time = columns["time"]
    ordered = np.sort(time[positive])
    n = len(ordered)
    test_from = ordered[n - int(_share(config.test_share, np.array(n)))]
    rest = ordered[ordered < test_from]
    if not len(rest):
        return np.full(len(time), TEST, dtype=np.int8)
    validation_from = rest[len(rest) - int(_share(config.validation_share, np.array(len(rest))))]
    split = np.full(len(time), TRAIN, dtype=np.int8)
    split[time >= validation_from] = VALIDATION
    split[time >= test_from] = TEST
    return split


def _given(
    columns: dict[str, npt.NDArray[Any]], positive: BoolArray, config: SplitConfig, has_times: bool, seed: int
) -> SplitArray:
    """Take the source's split; without a validation part, hold one out of each user's train part.

    That is the last ``ceil(validation_share m)`` of it by time, or a random one where there are no times.
    """
    split: SplitArray = columns["split"].copy()
    if (split == NO_SPLIT).any():
        raise ConfigError(
            "split.kind: given needs a source with a split; set data.source.columns.split or another kind"
        )
    if not (split[positive] == VALIDATION).any():
        train = np.flatnonzero(positive & (split == TRAIN))
        user = columns["user_row"][train]
        from_end, size = _places(
            user, None if has_times else np.random.default_rng([seed, 2]).random(len(user))
        )
        count = np.minimum(_share(config.validation_share, size), size - 1)
        split[train[from_end < count]] = VALIDATION
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
            "interactions to be in all three"
        )
