from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from twotower.config import GeneratedSource
from twotower.data.dataset import Dataset
from twotower.data.generated import PlantedTastes, draw_all, true_scores
from twotower.data.sampling import popularity
from twotower.data.sources import generated as source_module
from twotower.errors import ConfigError, DataError
from twotower.schema import SPLITS


def source(**changes: Any) -> GeneratedSource:
    values = {"num_users": 2_300, "num_items": 190, "num_interactions": 40_000, "num_tastes": 7, "seed": 3}
    return GeneratedSource(kind="generated", **{**values, **changes})


def drawn(tastes: PlantedTastes) -> tuple[Any, Any, Any]:
    user, item, time = (np.concatenate(part) for part in zip(*draw_all(tastes), strict=True))
    return user, item, time


def test_draws_are_different_items_in_time_order_about_as_many_as_asked() -> None:
    user, item, time = drawn(PlantedTastes(source()))
    assert len(user) == pytest.approx(40_000, rel=0.05)
    assert len(np.unique(user * 1_000 + item)) == len(user)
    assert np.array_equal(np.unique(user), np.arange(2_300))
    same = user[1:] == user[:-1]
    assert (np.diff(user) >= 0).all()
    assert (np.diff(time)[same] > 0).all()
    counts = np.bincount(user)
    assert counts.min() >= 5
    assert counts.max() > 3 * np.median(counts)
    assert (time.max() - time.min()) / 86_400e6 < 2 * 366


def test_a_user_does_not_depend_on_the_number_of_users() -> None:
    few = PlantedTastes(source(num_users=1_024, num_interactions=17_391))
    many = PlantedTastes(source(num_users=2_048, num_interactions=34_782))
    assert few._log_mean == many._log_mean
    for of_few, of_many in zip(few.draw(0), many.draw(0), strict=True):
        assert np.array_equal(of_few, of_many)


def test_chunks_of_any_size_hold_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(chunk_rows: int) -> list[tuple[Any, ...]]:
        monkeypatch.setattr(source_module, "CHUNK_ROWS", chunk_rows)
        chunks = list(source_module.Generated(source()).chunks(None))  # type: ignore[arg-type]
        assert len(chunks) == (1 if chunk_rows > 40_000 else 3)
        return [
            row
            for c in chunks
            for row in zip(
                c.rows.tolist(), c.user.to_pylist(), c.item.to_pylist(), c.time.to_pylist(), strict=True
            )
        ]

    assert rows(1 << 20) == rows(1)


def test_true_scores_are_log_probabilities_that_the_draws_follow() -> None:
    # Ten interactions of 190 items: drawing without repeats changes the probabilities little.
    planted = source(num_users=3_000, num_interactions=15_000, popularity_exponent=0.4)
    user, item, _ = drawn(PlantedTastes(planted))
    scores = true_scores(planted, [f"u{u}" for u in range(3_000)])
    assert scores.shape == (3_000, 190)
    assert scores.dtype == np.float32
    assert np.exp(scores.astype(np.float64)).sum(axis=1) == pytest.approx(np.ones(3_000), abs=1e-4)
    expected = np.exp(scores.astype(np.float64))
    # Calibration: of all (user, item) pairs with a score in a band, the share that was drawn first.
    first = np.append(True, user[1:] != user[:-1])
    hit = np.zeros_like(expected, dtype=bool)
    hit[user[first], item[first]] = True
    for low, high in ((0.0005, 0.005), (0.005, 0.02), (0.02, 0.1)):
        band = (expected >= low) & (expected < high)
        assert hit[band].mean() == pytest.approx(expected[band].mean(), rel=0.15)


def test_true_scores_of_some_users_are_rows_of_all() -> None:
    everyone = true_scores(source(), [f"u{u}" for u in range(2_300)])
    some = [2_299, 0, 1_024, 1_023, 0]
    assert np.array_equal(true_scores(source(), [f"u{u}" for u in some]), everyone[some])


@pytest.mark.parametrize("text", ["u2300", "7", "u07", "u-1", "ux", "i3", ""])
def test_an_id_that_is_no_generated_user_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"is no generated user; they are u0 to u2299"):
        true_scores(source(), ["u1", text])


def test_the_seed_changes_everything_and_the_same_seed_nothing() -> None:
    first, again, other = (drawn(PlantedTastes(source(seed=s))) for s in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[1][:100], other[1][:100])


def test_items_carry_their_tastes_genre_first() -> None:
    made = source_module.Generated(source())
    rows = made.item_table(None).data.to_pylist()  # type: ignore[arg-type]
    genres = source_module.genre_names(7)
    lengths = set()
    for number, row in enumerate(rows):
        parts = row["genres"].split("|")
        assert row["item_id"] == f"i{number}"
        assert parts[0] == genres[made.tastes.taste[number]]
        assert len(set(parts)) == len(parts)
        assert row["title"].endswith(f"({row['year']})")
        lengths.add(len(parts))
    assert lengths == {1, 2, 3}
    assert len(set(source_module.genre_names(30))) == 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_interactions": 2_000}, r"must be at least 2 for each of the 2,300 users"),
        ({"num_interactions": 2_300 * 60}, r"too many of 190 items; use at most 52,900"),
        ({"num_tastes": 100}, r"num_tastes \(100\) must be at most half of num_items \(190\)"),
    ],
)
def test_sizes_that_contradict_each_other(changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PlantedTastes(source(**changes))


def test_the_true_model_ranks_far_above_popularity(small_dataset: Dataset) -> None:
    assert isinstance(small_dataset.source, GeneratedSource)
    data = small_dataset.interactions
    scores = true_scores(small_dataset.source, small_dataset.user_ids.array.to_pylist())
    train = data.select(data.split != SPLITS["test"])
    test = data.select(data.split == SPLITS["test"])
    counts = popularity(train, small_dataset.num_items).astype(np.float32)
    assert counts.sum() == len(train) > 0

    def recall(values: Any) -> float:
        values[train.user_row, train.item_row] = -np.inf
        top = np.argsort(-values, axis=1, kind="stable")[:, :10]
        wanted = np.zeros(values.shape, dtype=bool)
        wanted[test.user_row, test.item_row] = True
        hits = np.take_along_axis(wanted, top, axis=1).sum(axis=1)
        sizes = wanted.sum(axis=1)
        return float((hits[sizes > 0] / sizes[sizes > 0]).mean())

    by_truth, by_popularity = recall(scores.copy()), recall(np.tile(counts, (small_dataset.num_users, 1)))
    assert by_truth > 2.5 * by_popularity
    assert by_popularity > 0
