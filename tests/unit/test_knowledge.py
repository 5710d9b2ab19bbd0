"""What a query knows, what is masked and what is relevant, against plain loops over every interaction."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.data.interactions import Interactions
from twotower.data.knowledge import Part, Rules, holdout, known
from twotower.schema import KINDS, SPLITS

NUM_USERS, NUM_ITEMS, NUM_CATALOGUE = 4, 9, 7
EARLIER = {"validation": ["train"], "test": ["train", "validation"]}


def log_of(seed: int, n: int) -> Interactions:
    """A log of few times, with every kind in every split wherever chance puts them."""
    rng = np.random.default_rng(seed)
    user, time = np.sort(rng.integers(0, NUM_USERS, n)), rng.integers(0, 6, n)
    order = np.lexsort((time, user))
    kind = rng.choice(list(KINDS.values()), n)
    return Interactions.of(
        NUM_USERS,
        user_row=user.astype(np.int32),
        item_row=rng.integers(0, NUM_ITEMS, n).astype(np.int32),
        time=time[order].astype(np.int64),
        # A negative of weight 0 is an impression.
        weight=rng.integers(0, 2, n).astype(np.float32),
        kind=kind.astype(np.int8),
        split=rng.choice(list(SPLITS.values()), n).astype(np.int8),
    )


def rules(**values: Any) -> Rules:
    return Rules(**{"num_catalogue_items": NUM_CATALOGUE, "has_times": True, "ties": "together"} | values)


def first_asked(log: Interactions, user: int, part: Part) -> int | None:
    """The row of the user's first held-out positive."""
    for row in range(len(log)):
        if (log.user_row[row], log.split[row], log.kind[row]) == (user, SPLITS[part], KINDS["positive"]):
            return row
    return None


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(0, 60),
    st.sampled_from(["validation", "test"]),
    st.booleans(),
    st.sampled_from(["together", "order"]),
)
def test_a_query_knows_what_a_loop_finds(seed: int, n: int, part: Part, has_times: bool, ties: Any) -> None:
    log = log_of(seed, n)
    found = known(log, part, rules(has_times=has_times, ties=ties))
    for row in range(n):
        asked = first_asked(log, log.user_row[row], part)
        expected = asked is not None and log.split[row] in [SPLITS[name] for name in EARLIER[part]]
        if expected and has_times:
            expected = row < asked if ties == "order" else log.time[row] < log.time[asked]
        assert found[row] == expected


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(0, 60),
    st.sampled_from(["validation", "test"]),
    st.sampled_from(["exclude", "include"]),
)
def test_what_is_masked_and_relevant_is_what_a_loop_finds(
    seed: int, n: int, part: Part, repeats: Any
) -> None:
    log = log_of(seed, n)
    held = holdout(log, part, rules(repeats=repeats))
    masked: dict[int, set[int]] = {user: set() for user in range(NUM_USERS)}
    wanted: dict[int, set[int]] = {user: set() for user in range(NUM_USERS)}
    for row in range(n):
        user, item = int(log.user_row[row]), int(log.item_row[row])
        if item >= NUM_CATALOGUE:
            continue
        if log.split[row] == SPLITS[part] and log.kind[row] == KINDS["positive"]:
            wanted[user].add(item)
        shown_only = log.kind[row] == KINDS["negative"] and log.weight[row] == 0
        if log.split[row] in [SPLITS[name] for name in EARLIER[part]] and not shown_only:
            masked[user].add(item)
    if repeats == "include":
        masked = {user: set() for user in masked}
    expected = {user: items - masked[user] for user, items in wanted.items() if items - masked[user]}
    assert held.user_rows.tolist() == sorted(expected)
    pairs = zip(
        held.user_rows.tolist(),
        itertools.pairwise(held.relevant_offsets),
        itertools.pairwise(held.masked_offsets),
        strict=True,
    )
    for user, relevant, left_out in pairs:
        assert held.relevant_rows[slice(*relevant)].tolist() == sorted(expected[user])
        assert held.masked_rows[slice(*left_out)].tolist() == sorted(masked[user])
        # What is masked is never what is asked for.
        assert not set(held.masked_rows[slice(*left_out)]) & set(held.relevant_rows[slice(*relevant)])


@pytest.mark.parametrize("part", ["validation", "test"])
def test_what_comes_at_or_after_the_question_changes_nothing_that_is_known(part: Part) -> None:
    log = log_of(5, 60)
    before = known(log, part, rules())
    assert before.any()
    later = ~before
    other = {name: column.copy() for name, column in log.columns().items()}
    # All that is not known becomes something else, but for when, and in which part, there is something.
    other["item_row"][later] = (other["item_row"][later] + 3) % NUM_ITEMS
    other["weight"][later] += 1
    after = known(Interactions.of(NUM_USERS, **other), part, rules())
    np.testing.assert_array_equal(before, after)
