from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.datasets import files_config, write_csv
from twotower.config import SplitConfig
from twotower.data.filters import drop_small, reduce_repeats, sort
from twotower.data.prepare import prepare
from twotower.data.reading import NO_SPLIT
from twotower.data.splits import assign_splits, count_ties
from twotower.errors import ConfigError, DataError

TRAIN, VALIDATION, TEST = 0, 1, 2


def columns(rows: list[tuple[int, ...]]) -> dict[str, Any]:
    """Columns of (user, item, time, weight, kind) rows in source order, sorted."""
    table = np.array([(*r, *(1, 0)[len(r) - 3 :]) for r in rows], dtype=np.int64).reshape(-1, 5)
    result = {
        "user_row": table[:, 0].astype(np.int32),
        "item_row": table[:, 1].astype(np.int32),
        "time": table[:, 2].copy(),
        "weight": table[:, 3].astype(np.float32),
        "kind": table[:, 4].astype(np.int8),
        "split": np.full(len(table), NO_SPLIT, dtype=np.int8),
    }
    sort(result)
    return result


def users(*sizes: int) -> dict[str, Any]:
    """Users with the given numbers of interactions, one after another."""
    return columns([(u, n, 100 * u + n) for u, size in enumerate(sizes) for n in range(size)])


def split(
    data: dict[str, Any], kind: str, *, seed: int = 3, has_times: bool = True, **shares: Any
) -> list[int]:
    config = SplitConfig(kind=kind, **shares)  # type: ignore[arg-type]
    return assign_splits(data, config, has_times, seed).tolist()


def test_temporal_user_holds_out_the_last_ceil_share_of_each_user() -> None:
    # 11: ceil(2.2) = 3 test, ceil(0.8) = 1 validation. 10: 2 and 1. 2: one test, none left to validate.
    found = split(users(11, 10, 2, 1, 3), "temporal_user")
    expected = [0] * 7 + [1] + [2] * 3 + [0] * 7 + [1] + [2] * 2 + [0, 2] + [0] + [0, 1, 2]
    assert found == expected


def test_a_share_that_is_not_exact_in_binary_does_not_round_up() -> None:
    assert 0.07 * 100 > 7
    assert split(users(100), "temporal_user", test_share=0.07).count(TEST) == 7


def test_the_order_in_the_file_decides_in_one_time_where_it_is_said_to() -> None:
    data = columns([(0, item, 5) for item in (9, 3, 7, 1, 8)])
    assert data["item_row"].tolist() == [9, 3, 7, 1, 8]
    assert split(data, "temporal_user", ties="order") == [0, 0, 0, 1, 2]


def moments(*sizes: int) -> dict[str, Any]:
    """One user with moments of so many interactions, and one with ten single ones."""
    rows = [(0, 100 * at + n, at) for at, size in enumerate(sizes) for n in range(size)]
    return columns(rows + [(1, n, n) for n in range(10)])


@pytest.mark.parametrize(
    ("sizes", "kind", "expected"),
    [
        # 12: ceil(2.4) = 3 test, which cut the moment of four; of the 8 left ceil(.8) = 1 cuts that of three.
        ((5, 3, 4), "temporal_user", [0] * 5 + [1] * 3 + [2] * 4),
        # The moment that is cut is the first, which stays in train.
        ((10, 1, 1), "temporal_user", [0] * 10 + [2] * 2),
        ((9, 2), "leave_one_out", [0] * 9 + [2] * 2),
        ((2, 1, 9), "temporal_user", [0] * 2 + [1] + [2] * 9),
        ((4, 3, 2), "leave_one_out", [0] * 4 + [1] * 3 + [2] * 2),
        ((1, 1, 1), "leave_one_out", [0, 1, 2]),
    ],
)
def test_a_moment_stays_on_one_side(sizes: tuple[int, ...], kind: str, expected: list[int]) -> None:
    assert split(moments(*sizes), kind)[: sum(sizes)] == expected


def test_a_user_of_one_moment_is_all_train() -> None:
    rows = [(0, n, 7) for n in range(9)] + [(1, n, n) for n in range(9)]
    assert split(columns(rows), "temporal_user")[:9] == [0] * 9
    with pytest.raises(DataError, match=r"split\.ties: together at 3 different times"):
        split(columns(rows[:9]), "temporal_user")


def test_other_kinds_at_the_time_of_a_held_out_moment_are_held_out_with_it() -> None:
    rows = [(0, 90, 2, 1, 2), (0, 91, 1, 1, 1), *((0, n, n) for n in range(3))]
    data = columns(rows)
    assert data["item_row"].tolist() == [0, 91, 1, 90, 2]  # by time, then as in the file
    assert split(data, "leave_one_out") == [0, 1, 1, 2, 2]
    assert split(data, "leave_one_out", ties="order") == [0, 0, 1, 1, 2]


def test_a_given_split_gets_a_whole_moment_for_validation() -> None:
    data = moments(4, 3, 2)
    data["split"][:] = [0] * 7 + [2] * 2 + [0] * 10
    assert split(data, "given")[:9] == [0] * 4 + [1] * 3 + [2] * 2


def test_ties_are_counted() -> None:
    data = columns([(0, 1, 5), (0, 2, 5), (0, 3, 6), (1, 1, 5), (1, 2, 6), (2, 4, 1), (2, 5, 1, 1, 1)])
    assert count_ties(data) == {"positives": 2, "users": 1}


def test_leave_one_out_takes_the_last_and_the_one_before() -> None:
    assert split(users(4, 3, 2, 1), "leave_one_out") == [0, 0, 1, 2, 0, 1, 2, 0, 2, 0]


def test_temporal_global_holds_out_all_that_happened_from_one_moment_on() -> None:
    rows = [(u, n, 10 * n + u) for u in range(4) for n in range(10)] + [(1, 50, 85, 1, 1), (2, 51, 20, 1, 2)]
    data = columns(rows)
    found = np.array(split(data, "temporal_global"))
    positive = data["kind"] == 0
    assert (found[positive] == TEST).sum() == 8
    assert (found[positive] == VALIDATION).sum() == 4  # ceil(0.1 * 32)
    assert data["time"][found == TEST].min() > data["time"][found == VALIDATION].max()
    assert data["time"][found == VALIDATION].min() > data["time"][found == TRAIN].max()
    assert found[data["item_row"] == 50].tolist() == [TEST]
    assert found[data["item_row"] == 51].tolist() == [TRAIN]


def test_temporal_global_puts_ties_at_the_moment_into_test() -> None:
    data = columns([(0, n, time) for n, time in enumerate([1, 2, 3, 4, 5, 6, 7, 7, 7, 7])])
    assert split(data, "temporal_global") == [0, 0, 0, 0, 0, 1, 2, 2, 2, 2]


def test_random_is_seeded_and_takes_the_share_of_each_user() -> None:
    data = users(20, 20, 7, 1)
    first = split(data, "random", seed=1)
    assert first == split(data, "random", seed=1)
    assert first != split(data, "random", seed=2)
    for start, size, tests, validations in ((0, 20, 4, 2), (20, 20, 4, 2), (40, 7, 2, 1), (47, 1, 0, 0)):
        part = first[start : start + size]
        assert (part.count(TEST), part.count(VALIDATION)) == (tests, validations)
    assert first[16:20] != [TEST] * 4  # not merely the last


def test_negatives_and_impressions_follow_the_users_time() -> None:
    rows = [(0, n, 10 * n) for n in range(10)]  # test from 80, validation at 70
    rows += [(0, 20, 5, 1, 1), (0, 21, 75, 1, 2), (0, 22, 79, 1, 1), (0, 23, 80, 1, 2), (0, 24, 999, 1, 1)]
    rows += [(1, n, 10 * n) for n in range(3)]
    rows += [(2, 30, 1, 1, 1), (2, 31, 9_999, 1, 2)]  # a user without positives
    data = columns(rows)
    found = dict(zip(data["item_row"].tolist(), split(data, "temporal_user"), strict=True))
    assert [found[i] for i in (20, 21, 22, 23, 24)] == [TRAIN, VALIDATION, VALIDATION, TEST, TEST]
    assert [found[i] for i in (30, 31)] == [TRAIN, TRAIN]


def test_shares_count_positives_only() -> None:
    rows = [(0, n, n) for n in range(10)] + [(0, 100 + n, n, 1, 2) for n in range(40)]
    data = columns(rows)
    positive = data["kind"] == 0
    assert np.array(split(data, "temporal_user"))[positive].tolist() == [0] * 7 + [1] + [2] * 2


@pytest.mark.parametrize("has_times", [True, False])
def test_a_given_split_without_validation_gets_one_out_of_train(has_times: bool) -> None:
    data = users(12, 3)
    data["split"][:] = [0] * 10 + [2] * 2 + [0, 0, 2]
    found = split(data, "given", has_times=has_times, validation_share=0.25)
    assert [at for at, part in enumerate(found) if part == TEST] == [10, 11, 14]
    assert found[:10].count(VALIDATION) == 3
    assert found[12:14].count(VALIDATION) == 1
    if has_times:
        assert found[7:10] == [VALIDATION] * 3


def test_a_given_validation_is_taken_as_it_is() -> None:
    data = users(6)
    data["split"][:] = [1, 0, 2, 0, 2, 0]
    assert split(data, "given") == [1, 0, 2, 0, 2, 0]


def test_kinds_that_the_source_can_not_serve() -> None:
    for kind in ("temporal_user", "temporal_global", "leave_one_out"):
        with pytest.raises(ConfigError, match=rf"split\.kind: {kind} needs times"):
            split(users(9), kind, has_times=False)
    with pytest.raises(ConfigError, match="given needs a source with a split"):
        split(users(9), "given")


@pytest.mark.parametrize(
    ("sizes", "kind", "empty"),
    [
        ((1, 1), "temporal_user", "validation and the test split"),
        ((2, 2), "temporal_user", "the validation split"),
        ((2, 1), "leave_one_out", "the validation split"),
        ((1,), "temporal_global", "train and the validation split"),
    ],
)
def test_an_empty_split_is_an_error_with_a_remedy(sizes: tuple[int, ...], kind: str, empty: str) -> None:
    with pytest.raises(DataError, match=rf"{empty} empty .*use another split\.kind or other shares"):
        split(users(*sizes), kind)


# ---- repeats and small users


def reduced(rows: list[tuple[int, ...]], policy: Any) -> list[tuple[int, int, int, float, int]]:
    data = columns(rows)
    before = len(data["kind"])
    data["split"][:] = TRAIN
    gone = reduce_repeats(data, policy)
    names = ("user_row", "item_row", "time", "weight", "kind")
    assert before - gone == len(data["kind"])
    return list(zip(*(data[n].tolist() for n in names), strict=True))


REPEATED = [(0, 1, 30, 4), (0, 1, 10, 1), (1, 1, 5, 9), (0, 2, 20, 7), (0, 1, 20, 2)]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("first", [(0, 1, 10, 1, 0), (0, 2, 20, 7, 0), (1, 1, 5, 9, 0)]),
        ("last", [(0, 2, 20, 7, 0), (0, 1, 30, 4, 0), (1, 1, 5, 9, 0)]),
        ("sum", [(0, 2, 20, 7, 0), (0, 1, 30, 7, 0), (1, 1, 5, 9, 0)]),
        ("keep", [(0, 1, 10, 1, 0), (0, 2, 20, 7, 0), (0, 1, 20, 2, 0), (0, 1, 30, 4, 0), (1, 1, 5, 9, 0)]),
    ],
)
def test_repeats_of_one_user_and_item(policy: str, expected: list[Any]) -> None:
    assert reduced(REPEATED, policy) == expected


def test_an_impression_never_displaces_an_opinion() -> None:
    rows = [(0, 1, 10, 1, 2), (0, 1, 20, 3, 0), (0, 1, 30, 1, 2), (0, 2, 5, 1, 2), (0, 2, 6, 1, 2)]
    assert reduced(rows, "last") == [(0, 2, 6, 1, 2), (0, 1, 20, 3, 0)]
    assert reduced(rows, "first") == [(0, 2, 5, 1, 2), (0, 1, 20, 3, 0)]
    assert reduced(rows, "sum") == [(0, 2, 6, 1, 2), (0, 1, 20, 3, 0)]
    assert len(reduced(rows, "keep")) == 5


def test_a_later_dislike_replaces_an_earlier_like() -> None:
    rows = [(0, 1, 10, 2, 0), (0, 1, 20, 5, 0), (0, 1, 30, 1, 1)]
    assert reduced(rows, "last") == [(0, 1, 30, 1, 1)]
    assert reduced(rows, "first") == [(0, 1, 10, 2, 0)]
    assert reduced([*rows, (0, 1, 40, 3, 0)], "sum") == [(0, 1, 40, 10, 0)]


@pytest.mark.parametrize("policy", ["first", "last", "sum"])
def test_a_repeat_in_the_test_split_takes_nothing_from_train(policy: Any) -> None:
    data = columns([(0, 1, 1, 2), (0, 1, 2, 3), (0, 2, 3), (0, 1, 4, 5), (0, 1, 5, 7)])
    data["split"][:] = [TRAIN] * 3 + [TEST] * 2
    assert reduce_repeats(data, policy) == 2
    assert data["item_row"].tolist() == [1, 2, 1]
    assert data["split"].tolist() == [TRAIN, TRAIN, TEST]
    assert data["weight"].tolist() == {"first": [2, 1, 5], "last": [3, 1, 7], "sum": [5, 1, 12]}[policy]


def test_repeats_across_blocks_of_users(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    from twotower.data import filters, interactions

    rows = [(int(u), int(i), int(t)) for u, i, t in rng.integers(0, [9, 7, 50], size=(400, 3))]
    whole = {policy: reduced(rows, policy) for policy in ("first", "last", "sum")}
    monkeypatch.setattr(filters, "user_blocks", lambda user: interactions.user_blocks(user, 5))
    for policy, expected in whole.items():
        assert reduced(rows, policy) == expected


def test_small_users_and_items_go_until_none_is_left() -> None:
    # Without item 9 (once) user 2 has one interaction; without him item 1 has two, which is enough.
    rows = [(0, 1, 1), (0, 2, 2), (1, 1, 1), (1, 2, 2), (2, 9, 1), (2, 1, 2)]
    data = columns(rows)
    assert drop_small(data, 3, 10, user_min=2, item_min=2, distinct=True) == 2
    assert data["user_row"].tolist() == [0, 0, 1, 1]
    assert set(data["item_row"].tolist()) == {1, 2}


def test_a_repeat_counts_towards_the_least_number_only_where_it_is_kept() -> None:
    rows = [(0, 1, 1), (0, 1, 2), (0, 1, 3), (1, 1, 1), (1, 2, 2)]
    for distinct, expected in ((True, [1, 1]), (False, [0, 0, 0, 1, 1])):
        data = columns(rows)
        drop_small(data, 2, 3, user_min=2, item_min=0, distinct=distinct)
        assert data["user_row"].tolist() == expected


def test_ids_that_are_left_out_leave_the_vocabularies(tmp_path: Path) -> None:
    rows = [[f"u{u}", f"i{n}", 10 * u + n] for u in range(4) for n in range(6)]
    rows = [["rare", "i0", 1], *rows, ["u1", "seldom", 99], ["rare", "i1", 2]]
    log = write_csv(tmp_path / "log.csv", ["who", "what", "when"], rows)
    items = write_csv(tmp_path / "items.csv", ["sku"], [["i5"], ["cold"], ["i0"], ["i1"]])
    table = {"path": str(items), "id": "sku"}
    least = {"user": 3, "item": 2}
    dataset = prepare(files_config(tmp_path, log, data__min_interactions=least, data__source__items=table))
    assert dataset.user_ids.ids(range(dataset.num_users)) == ["u0", "u1", "u2", "u3"]
    assert dataset.item_ids.ids(range(dataset.num_items)) == ["i5", "i0", "i1", "i2", "i3", "i4"]
    assert dataset.num_catalogue_items == 3
    assert dataset.counts["below_min_interactions"] == 3
    everything = prepare(files_config(tmp_path, log, data__source__items=table))
    assert everything.num_catalogue_items == 4
    with pytest.raises(DataError, match=r"data\.min_interactions \(user 50, item 0\) leaves no interactions"):
        prepare(files_config(tmp_path, log, data__min_interactions={"user": 50}))
