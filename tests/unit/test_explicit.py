"""Explicit negatives against a plain loop over each user's interactions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.datasets import files_config, write_csv
from twotower.data.interactions import Interactions
from twotower.data.prepare import prepare
from twotower.schema import KINDS, SPLITS
from twotower.training.explicit import ExplicitNegatives

POSITIVE, NEGATIVE, SEEN_ONLY = (KINDS[k] for k in ("positive", "negative", "seen_only"))
ALWAYS = np.iinfo(np.int64).max


def make_interactions(rng: np.random.Generator, num_users: int, n: int, num_items: int) -> Interactions:
    user = np.sort(rng.integers(0, num_users, n)).astype(np.int32)
    time = rng.integers(0, 30, n).astype(np.int64)
    order = np.lexsort((time, user))
    return Interactions.of(
        num_users,
        user_row=user,
        item_row=rng.integers(0, num_items, n).astype(np.int32),
        time=time[order],
        weight=np.ones(n, np.float32),
        kind=rng.choice([POSITIVE, NEGATIVE, SEEN_ONLY], n, p=[0.1, 0.8, 0.1]).astype(np.int8),
        split=np.full(n, SPLITS["train"], np.int8),
    )


def loop_latest(data: Interactions, num_catalogue: int, user: int, time: int | None, count: int) -> list[int]:
    rows = [i for i in range(len(data)) if data.user_row[i] == user]
    liked = {int(data.item_row[i]) for i in rows if data.kind[i] == POSITIVE}
    found: list[int] = []
    for i in reversed(rows):
        item = int(data.item_row[i])
        if data.kind[i] != NEGATIVE or item >= num_catalogue or item in liked or item in found:
            continue
        if time is None or data.time[i] <= time:
            found.append(item)
    return found[:count]


def padded(items: list[int], count: int) -> list[int]:
    return items + [-1] * (count - len(items))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    users=st.integers(1, 7),
    n=st.integers(0, 150),
    num_items=st.integers(1, 40),
    count=st.integers(0, 12),
)
def test_latest_is_the_plain_loop(seed: int, users: int, n: int, num_items: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    data = make_interactions(rng, users, n, num_items)
    num_catalogue = int(rng.integers(1, num_items + 1))
    negatives = ExplicitNegatives.of(data, num_catalogue, has_times=True)
    timeless = ExplicitNegatives.of(data, num_catalogue, has_times=False)
    wanted = rng.integers(0, users, 25)
    times = rng.integers(-1, 32, 25)
    times[0] = ALWAYS
    found = negatives.latest(wanted, times, count)
    everything = negatives.latest(wanted, None, count)
    assert found.shape == everything.shape == (25, count)
    assert found.dtype == np.int64
    for b, (user, time) in enumerate(zip(wanted.tolist(), times.tolist(), strict=True)):
        assert found[b].tolist() == padded(loop_latest(data, num_catalogue, user, time, count), count)
        assert everything[b].tolist() == padded(loop_latest(data, num_catalogue, user, None, count), count)
    np.testing.assert_array_equal(timeless.latest(wanted, times, count), everything)
    np.testing.assert_array_equal(timeless.latest(wanted, None, count), everything)


def test_the_oracle_is_not_vacuous(rng: np.random.Generator) -> None:
    data = make_interactions(rng, 5, 400, 60)
    negatives = ExplicitNegatives.of(data, 50, has_times=True)
    found = negatives.latest(np.arange(5), np.full(5, 15), 6)
    assert (found >= 0).all()
    assert (found < 50).all()
    later = negatives.latest(np.arange(5), np.full(5, 25), 6)
    assert (found != later).any(axis=1).all()
    assert 0 < len(negatives) < (data.kind == NEGATIVE).sum()


def test_an_item_shown_again_and_again_hides_none_behind_it() -> None:
    """The look-back widens: the second item is a thousand repeats of the first away."""
    n = 1_003
    data = Interactions.of(
        2,
        user_row=np.r_[np.zeros(n, np.int32), np.ones(2, np.int32)],
        item_row=np.r_[4, 9, np.full(n - 2, 7), 1, 2].astype(np.int32),
        time=np.r_[np.arange(n), 5, 5],
        weight=np.zeros(n + 2, np.float32),
        kind=np.full(n + 2, NEGATIVE, np.int8),
        split=np.zeros(n + 2, np.int8),
    )
    negatives = ExplicitNegatives.of(data, 10, has_times=True)
    users, times = np.array([0, 1, 0, 0, 1]), np.array([n, 5, 0, 500, 4])
    found = negatives.latest(users, times, 4)
    expected = [[7, 9, 4, -1], [2, 1, -1, -1], [4, -1, -1, -1], [7, 9, 4, -1], [-1] * 4]
    assert found.tolist() == expected


def test_nothing_later_than_the_example_and_nothing_of_the_test_split(tmp_path: Path) -> None:
    """Every list has items of its own, named by its second, so that an item tells when it was shown."""
    rng = np.random.default_rng(11)
    rows = []
    for user in range(8):
        for second in sorted(rng.choice(90, 14, replace=False).tolist()):
            shown = "|".join(f"s{second:02d}-{place}" for place in range(4))
            rows.append([f"u{user}", f"i{rng.integers(40)}", second, f"{shown}|i{rng.integers(40)}"])
    path = write_csv(tmp_path / "log.csv", ["who", "what", "when", "shown"], rows)
    columns = {"user": "who", "item": "what", "time": "when", "time_unit": "s", "impressions": "shown"}
    dataset = prepare(files_config(tmp_path, path, data__source__columns=columns))
    data = dataset.interactions
    fitted = data.select(data.split == SPLITS["train"])
    negatives = ExplicitNegatives.of(fitted, dataset.num_catalogue_items, dataset.has_times)
    examples = fitted.select(fitted.kind == POSITIVE)
    count = 80
    found = negatives.latest(examples.user_row.astype(np.int64), examples.time, count)
    held_out = data.select(data.split != SPLITS["train"])
    checked = 0
    for user, second, row in zip(examples.user_row, examples.time // 1_000_000, found, strict=True):
        items = dataset.item_ids.ids(row[row >= 0])
        assert len(set(items)) == len(items)
        seconds = [int(item[1:3]) for item in items if item.startswith("s")]
        assert seconds == sorted(seconds, reverse=True)
        # The example's own list is there whole and in its order, ahead of all others.
        own = [item for item in items if item.startswith("s")][:4]
        assert own == [f"s{second:02d}-{place}" for place in range(4)]
        later = held_out.time[held_out.user_row == user] // 1_000_000
        assert max(seconds) == second < later.min()
        liked = set(fitted.item_row[(fitted.user_row == user) & (fitted.kind == POSITIVE)].tolist())
        assert not liked & set(row.tolist())
        checked += len(items)
    assert checked > 500
