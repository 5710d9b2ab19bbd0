"""Histories against a plain loop over each user's interactions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.data.histories import NEVER, Histories, Order
from twotower.data.interactions import Interactions
from twotower.errors import DataError
from twotower.schema import KINDS, SPLITS


def make_interactions(rng: np.random.Generator, num_users: int, n: int, num_items: int = 50) -> Interactions:
    user = np.sort(rng.integers(0, num_users, n)).astype(np.int32)
    time = rng.integers(0, 9, n).astype(np.int64)  # few distinct times: many ties
    order = np.lexsort((time, user))
    return Interactions.of(
        num_users,
        user_row=user,
        item_row=rng.integers(0, num_items, n).astype(np.int32),
        time=time[order],
        weight=rng.random(n).astype(np.float32),
        kind=rng.choice([KINDS["positive"], KINDS["negative"], KINDS["seen_only"]], n).astype(np.int8),
        split=np.full(n, SPLITS["train"], np.int8),
    )


def loop_before(data: Interactions, user: int, time: int | None, length: int) -> list[tuple[int, float]]:
    found = [
        (int(data.item_row[i]), float(data.weight[i]))
        for i in range(len(data))
        if data.user_row[i] == user
        and data.kind[i] == KINDS["positive"]
        and (time is None or data.time[i] < time)
    ]
    return found[::-1][:length]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 7), st.integers(0, 60), st.integers(1, 12))
def test_before_takes_the_latest_strictly_earlier_positives(
    seed: int, users: int, n: int, length: int
) -> None:
    rng = np.random.default_rng(seed)
    data = make_interactions(rng, users, n)
    histories = Histories.of(data)
    wanted_users = rng.integers(-1, users, 20)
    times = rng.integers(-1, 11, 20)
    rows, weights = histories.before(wanted_users, times, length)
    when = histories.times_before(wanted_users, times, length)
    assert ((when < times[:, None]) == ((rows >= 0) | (when == NEVER))).all()
    assert ((when == NEVER) == (rows < 0)).all()
    assert (np.sort(when)[:, ::-1] == when).all()
    everything, _ = histories.before(wanted_users, None, length)
    assert rows.shape == weights.shape == (20, length)
    for b, (user, time) in enumerate(zip(wanted_users, times, strict=True)):
        expected = loop_before(data, user, time, length)
        assert rows[b, : len(expected)].tolist() == [item for item, _ in expected]
        assert np.allclose(weights[b, : len(expected)], [w for _, w in expected])
        assert (rows[b, len(expected) :] == -1).all()
        assert (weights[b, len(expected) :] == 0).all()
        latest = loop_before(data, user, None, length)
        assert everything[b, : len(latest)].tolist() == [item for item, _ in latest]


def test_capped_histories_answer_like_complete_ones_up_to_the_cap(rng: np.random.Generator) -> None:
    data = make_interactions(rng, 11, 300)
    complete, capped = Histories.of(data), Histories.of(data, capped=5)
    assert len(capped.item_rows) < len(complete.item_rows)
    users = np.arange(11)
    for got, expected in zip(capped.before(users, None, 5), complete.before(users, None, 5), strict=True):
        np.testing.assert_array_equal(got, expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 7), st.integers(0, 80), st.integers(0, 6), st.integers(0, 9))
def test_what_capped_histories_reach_is_what_complete_ones_say(
    seed: int, users: int, n: int, length: int, more: int
) -> None:
    rng = np.random.default_rng(seed)
    data = make_interactions(rng, users, n)
    complete, capped = Histories.of(data), Histories.of(data, capped=length + more)
    asked = rng.integers(-1, users, 40)
    times = rng.integers(-1, 11, 40)
    got, expected = capped.before(asked, times, length)[0], complete.before(asked, times, length)[0]
    reached = capped.reaches(asked, got)
    np.testing.assert_array_equal(got[reached], expected[reached])
    # Nobody is refused of whom all is kept, or enough.
    counts = np.where(asked < 0, 0, np.diff(complete.offsets)[asked])
    assert reached[counts <= length + more].all()
    assert reached[(got >= 0).all(axis=1)].all()
    assert complete.reaches(asked, expected).all()


def loop_of_example(data: Interactions, row: int, length: int, order: str) -> list[int]:
    """What the example at a row of the log knows, the latest first."""
    found = []
    for i in range(len(data)):
        if data.user_row[i] != data.user_row[row] or data.kind[i] != KINDS["positive"]:
            continue
        other_item, earlier = data.item_row[i] != data.item_row[row], data.time[i] < data.time[row]
        if (
            (order == "times" and earlier)
            or (order == "rows" and i < row)
            or (order == "none" and other_item)
        ):
            found.append(int(data.item_row[i]))
    return found[::-1][:length]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 5),
    st.integers(1, 60),
    st.integers(1, 9),
    st.sampled_from([2, 5, 50]),
    st.sampled_from(["times", "rows", "none"]),
)
def test_an_example_knows_what_a_loop_finds(
    seed: int, users: int, n: int, length: int, items: int, order: Order
) -> None:
    rng = np.random.default_rng(seed)
    data = make_interactions(rng, users, n, items)  # few items: many of them again at one time
    histories = Histories.of(data)
    examples = np.flatnonzero(data.kind == KINDS["positive"])
    owners = data.user_row[examples].astype(np.int64)
    places = np.arange(len(examples)) - histories.offsets[owners]
    rows, weights = histories.of_examples(owners, places, length, order)
    assert rows.shape == weights.shape == (len(examples), length)
    for b, row in enumerate(examples):
        expected = loop_of_example(data, row, length, order)
        assert rows[b, : len(expected)].tolist() == expected
        assert (rows[b, len(expected) :] == -1).all()
        assert (weights[b, len(expected) :] == 0).all()


def test_a_position_of_another_user_is_refused(rng: np.random.Generator) -> None:
    histories = Histories.of(make_interactions(rng, 5, 80))
    with pytest.raises(DataError, match="outside the interactions of its user"):
        histories.of_examples([1], [1000], 3, "none")
