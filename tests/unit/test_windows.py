"""Windows: each example reads, of its user's history, what it knows and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from twotower.data.histories import Histories, Order
from twotower.data.windows import Stretches, Windows, stride_of
from twotower.model.sequences import lay_out

LENGTH = 7


def histories(seed: int = 3) -> Histories:
    """Users of 0 to 60 items, many of them at equal times; one has 23 items at one time."""
    rng = np.random.default_rng(seed)
    sizes = np.array([0, 1, 2, 7, 8, 9, 0, 60, 31, 5, 13, 40])
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    times = [np.sort(rng.integers(0, max(size // 2, 1), size)) for size in sizes]
    times[11][10:33] = times[11][10]
    times[11].sort()
    # The last time of one user is the first one of the next.
    times[4][:] += times[3].max() - times[4].min()
    n = offsets[-1]
    items = rng.integers(0, 50, n).astype(np.int32)
    return Histories(offsets, items, np.concatenate(times), np.ones(n, np.float32))


def windows_of(found: Histories, order: Order) -> tuple[Windows, np.ndarray, np.ndarray]:
    """Return windows of some of the positions as examples, these, and their users."""
    users = np.repeat(np.arange(found.num_users), np.diff(found.offsets))
    examples = np.flatnonzero(np.random.default_rng(1).random(len(users)) < 0.8)
    return Windows.of(found, examples, users[examples], LENGTH, order), examples, users[examples]


@pytest.mark.parametrize("order", ["times", "rows"])
def test_an_example_reads_the_latest_items_that_it_knows(order: Order) -> None:
    found = histories()
    windows, examples, users = windows_of(found, order)
    batch = np.random.default_rng(2).permutation(len(examples))
    batch[[3, 50]] = -1
    user_rows = np.where(batch < 0, -1, users[batch] + 1_000)
    stretches = windows.stretches(batch, user_rows)
    begins = np.cumsum(stretches.lengths) - stretches.lengths
    cut, names, empty = 0, {}, 0
    for query, example in enumerate(batch):
        mine = int(stretches.of_query[query])
        if example < 0:
            assert (mine, stretches.known[query]) == (-1, 0)
            continue
        position, user = examples[example], users[example]
        first = found.offsets[user]
        everything = [
            int(found.item_rows[p])
            for p in range(first, found.offsets[user + 1])
            if (p < position if order == "rows" else found.times[p] < found.times[position])
        ]
        if not everything:
            assert (mine, stretches.known[query]) == (-1, 0)
            empty += 1
            continue
        begin, count = begins[mine], stretches.known[query]
        read = stretches.item_rows[begin : begin + count].tolist()
        assert read == everything[-len(read) :]
        assert len(read) <= LENGTH
        if len(everything) <= LENGTH:
            assert read == everything
        else:
            assert len(read) > LENGTH - stride_of(LENGTH)
            cut += len(read) < LENGTH
        assert stretches.names is not None
        place = len(everything) - len(read)
        assert names.setdefault(int(stretches.names[mine]), (user, place)) == (user, place)
    assert cut > 10
    assert empty > 3
    assert len(names) == len(stretches.lengths) == len(set(names.values()))


def test_a_stretch_ends_where_its_last_reader_reads_and_has_one_name_everywhere() -> None:
    windows, _, users = windows_of(histories(), "times")
    whole = windows.stretches(np.arange(len(users)), users)
    assert whole.names is not None
    for part in np.array_split(np.arange(len(users)), 9):
        some = windows.stretches(part, users[part])
        assert some.names is not None
        assert np.array_equal(some.names, whole.names[np.unique(whole.of_query[part][whole.known[part] > 0])])
        for stretch, length in enumerate(some.lengths):
            assert length == some.known[some.of_query == stretch].max()


def test_windows_are_shuffled_as_a_whole() -> None:
    windows, examples, _ = windows_of(histories(), "times")
    everyone = np.arange(len(examples))
    order = windows.shuffled(np.random.default_rng(5), everyone)
    assert sorted(order) == everyone.tolist()
    window = np.searchsorted(windows.first, order, side="right") - 1
    changes = np.count_nonzero(window[1:] != window[:-1])
    assert changes == len(windows) - 1
    assert window.tolist() != sorted(window)
    some = everyone[20:90:3]
    part = windows.shuffled(np.random.default_rng(5), some)
    assert sorted(part) == some.tolist()
    window = np.searchsorted(windows.first, part, side="right") - 1
    assert np.count_nonzero(window[1:] != window[:-1]) == len(set(window.tolist())) - 1


def test_histories_of_queries_are_stretches_of_their_own() -> None:
    rows = np.array([[4, 9, -1], [-1, -1, -1], [3, 2, 1]])
    found = Stretches.of_histories(rows)
    assert found.item_rows.tolist() == [9, 4, 1, 2, 3]
    assert found.lengths.tolist() == [2, 3]
    assert found.of_query.tolist() == [0, -1, 1]
    assert found.known.tolist() == [2, 0, 3]
    assert found.names is None
    none = Stretches.of_histories(np.empty((2, 0), np.int64))
    assert (len(none.lengths), none.known.tolist()) == (0, [0, 0])


@pytest.mark.parametrize("seed", range(5))
def test_stretches_share_rows_without_touching(seed: int) -> None:
    rng = np.random.default_rng(seed)
    width = int(rng.integers(5, 40))
    lengths = np.minimum(rng.geometric(0.15, 300), width)
    rows, columns = lay_out(lengths, width)
    taken = np.zeros((rows.max() + 1, width), int)
    for row, column, length in zip(rows, columns, lengths, strict=True):
        assert column + length <= width
        taken[row, column : column + length] += 1
    assert taken.max() == 1
    assert taken.any(axis=1).all()
    assert taken.mean() > 0.85
