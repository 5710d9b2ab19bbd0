"""The baselines: equal to slow loops and another library, blind to the test, left out with a reason."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import sparse

from twotower.config.evaluation import BASELINES as REGISTERED
from twotower.config.evaluation import EaseConfig, EvaluationConfig, IalsConfig, ItemKnnConfig
from twotower.data.interactions import Interactions
from twotower.data.knowledge import Rules, holdout
from twotower.errors import ConfigError
from twotower.evaluation.baselines import fitted as module
from twotower.evaluation.baselines import popular_order, recent_order
from twotower.evaluation.baselines.ease import EaseScores, fit_ease, size
from twotower.evaluation.baselines.fit import fit, wanted, write_known, write_orders
from twotower.evaluation.baselines.ials import fit_ials
from twotower.evaluation.baselines.matrix import fit_matrix, query_matrix
from twotower.evaluation.baselines.memory import available_bytes
from twotower.evaluation.baselines.neighbours import item_similarity, products
from twotower.evaluation.baselines.protocol import fitted_names
from twotower.evaluation.baselines.rankers import open_ranker
from twotower.evaluation.matrix import open_matrix, write_matrix
from twotower.evaluation.metrics import ndcg_at_k

BASELINES, FITTED = REGISTERED.names, fitted_names()
NUM_USERS, NUM_ITEMS, NUM_OUTSIDE = 31, 23, 2
DAY = 86_400_000_000


@pytest.fixture
def rng():
    return np.random.default_rng(17)


def dataset_of(rows, num_users=NUM_USERS, num_items=NUM_ITEMS, has_times=True):
    """A dataset of (user, item, time, split, kind), in the order of users and times."""
    rows = sorted(rows, key=lambda row: (row[0], row[2]))
    users, items, times, splits, kinds = (np.array(column) for column in zip(*rows, strict=True))
    interactions = Interactions.of(
        num_users,
        user_row=users.astype(np.int32),
        item_row=items.astype(np.int32),
        time=times.astype(np.int64) * has_times,
        weight=np.ones(len(rows), np.float32),
        kind=kinds.astype(np.int8),
        split=splits.astype(np.int8),
    )
    return SimpleNamespace(
        path="stub",
        has_times=has_times,
        ties="together",
        interactions=interactions,
        num_users=num_users,
        num_items=num_items + NUM_OUTSIDE,
        num_catalogue_items=num_items,
    )


def random_rows(rng, num_users=NUM_USERS, num_items=NUM_ITEMS, test_shift=0):
    """A log with negatives, repeats, items outside the catalogue, and three splits in time."""
    rows = []
    for user in range(num_users):
        count = int(rng.integers(4, 12))
        # Two groups of taste, so that there is something to learn.
        near = rng.integers(0, num_items // 2, count) + (user % 2) * (num_items // 2)
        items = np.where(rng.random(count) < 0.7, near, rng.integers(0, num_items + NUM_OUTSIDE, count))
        for place, item in enumerate(items.tolist()):
            split = 0 if place < count - 3 else 1 if place < count - 2 else 2
            if split == 2:
                item = (item + test_shift) % num_items
            kind = 1 if split == 0 and rng.random() < 0.1 else 0
            rows.append((user, item, (place + 1) * DAY, split, kind))
            if split == 0 and kind == 0 and rng.random() < 0.2:
                rows.append((user, item, (place + 1) * DAY, split, kind))
    return rows


def slow_matrix(rows, splits):
    """Users by items, 1 where there is a positive of the splits."""
    matrix = np.zeros((NUM_USERS, NUM_ITEMS))
    for user, item, _, split, kind in rows:
        if split in splits and kind == 0 and item < NUM_ITEMS:
            matrix[user, item] = 1.0
    return matrix


@pytest.fixture
def rows(rng):
    return random_rows(rng)


@pytest.fixture
def dataset(rows):
    return dataset_of(rows)


@pytest.fixture
def held(dataset):
    return holdout(dataset.interactions, "test", Rules.of(dataset, "exclude"))


def fitted(tmp_path, dataset, held, names=BASELINES, **settings):
    config = EvaluationConfig(**settings)
    write_known(tmp_path, dataset, held.user_rows)
    found = write_orders(tmp_path, dataset, names)
    return found | {name: fit(name, tmp_path, dataset, config, 1, 5) for name in FITTED if name in names}


def test_matrices_hold_what_is_known(rows, dataset, held):
    np.testing.assert_array_equal(fit_matrix(dataset, "test").toarray(), slow_matrix(rows, (0, 1)))
    np.testing.assert_array_equal(fit_matrix(dataset, "validation").toarray(), slow_matrix(rows, (0,)))
    known = query_matrix(dataset, "test", held.user_rows).toarray()
    # Every test interaction is later than the others here, so that all of them are known.
    np.testing.assert_array_equal(known, slow_matrix(rows, (0, 1))[held.user_rows])
    assert 0 < known.sum() < known.size


def test_queries_know_nothing_of_their_own_time_or_later(rows):
    """As in a random split: train interactions at and after the first of the test are not known."""
    moved = [(u, i, 50 * DAY if s == 0 and i % 2 else t, s, k) for u, i, t, s, k in rows]
    dataset = dataset_of(moved)
    held = holdout(dataset.interactions, "test", Rules.of(dataset, "exclude"))
    known = query_matrix(dataset, "test", held.user_rows).toarray()
    expected = slow_matrix([row for row in moved if row[2] < 50 * DAY], (0, 1))[held.user_rows]
    np.testing.assert_array_equal(known, expected)
    assert known.sum() < fit_matrix(dataset, "test")[held.user_rows].sum()


def test_matrix_files(tmp_path, rng):
    matrix = sparse.random(9, 14, density=0.3, format="csr", rng=rng, dtype=np.float32)
    write_matrix(tmp_path / "m", matrix)
    opened = open_matrix(tmp_path / "m")
    np.testing.assert_array_equal(opened.toarray(), matrix.toarray())
    np.testing.assert_array_equal(opened[2:7].toarray(), matrix[2:7].toarray())


def slow_similarity(matrix, neighbours, tfidf):
    """Cosines of columns in float64; of each row the largest, the smaller column first where equal."""
    weighted = matrix.copy()
    if tfidf:
        for user in range(len(matrix)):
            weighted[user] *= np.log(matrix.shape[1]) - np.log(1 + matrix[user].sum())
    count = matrix.shape[1]
    similarity = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            norm = np.linalg.norm(weighted[:, i]) * np.linalg.norm(weighted[:, j])
            similarity[i, j] = weighted[:, i] @ weighted[:, j] / norm if norm else 0.0
        order = np.lexsort((np.arange(count), -similarity[i].round(6)))
        similarity[i, order[neighbours:]] = 0.0
    return similarity


@pytest.mark.parametrize("tfidf", [False, True])
def test_similarities_equal_the_slow_loop(rows, tfidf):
    matrix = slow_matrix(rows, (0, 1))
    found = item_similarity(sparse.csr_matrix(matrix), 6, tfidf)
    expected = slow_similarity(matrix, 6, tfidf)
    assert np.diff(found.indptr).max() == 6
    # Equal ones at the cut are any of several after rounding, so that values are compared row by row.
    np.testing.assert_allclose(
        np.sort(found.toarray(), axis=1), np.sort(expected, axis=1), rtol=1e-5, atol=1e-6
    )
    whole = item_similarity(sparse.csr_matrix(matrix), NUM_ITEMS, tfidf)
    np.testing.assert_allclose(whole.toarray(), slow_similarity(matrix, NUM_ITEMS, tfidf), atol=1e-6)
    assert products(sparse.csr_matrix(matrix)) == sum(int(row.sum()) ** 2 for row in matrix)


@pytest.mark.filterwarnings("ignore:Method expects CSR input")
@pytest.mark.parametrize(("kind", "tfidf"), [("CosineRecommender", False), ("TFIDFRecommender", True)])
def test_similarities_equal_those_of_implicit(rows, kind, tfidf):
    from implicit import nearest_neighbours

    matrix = sparse.csr_matrix(slow_matrix(rows, (0, 1)))
    model = getattr(nearest_neighbours, kind)(K=NUM_ITEMS, num_threads=1)
    model.fit(matrix, show_progress=False)
    found = item_similarity(matrix, NUM_ITEMS, tfidf)
    np.testing.assert_allclose(found.toarray(), model.similarity.toarray(), rtol=1e-5, atol=1e-6)


def slow_ease(matrix, l2):
    gram = matrix.T @ matrix + l2 * np.eye(matrix.shape[1])
    inverse = np.linalg.inv(gram)
    weights = np.eye(len(gram)) - inverse / np.diag(inverse)
    return weights


@pytest.mark.parametrize("num_users", [NUM_USERS, 9])
def test_ease_equals_the_closed_form(tmp_path, rows, num_users):
    """With more users than items by the items' inverse, with fewer by the users'."""
    matrix = slow_matrix(rows, (0, 1))[:num_users]
    # What was fitted there before does not matter.
    fit_ease(tmp_path, sparse.csr_matrix(slow_matrix(rows, (0,))[: 40 - num_users]), 1.0)
    assert (tmp_path / "users").is_dir() == (num_users > NUM_ITEMS)
    fit_ease(tmp_path, sparse.csr_matrix(matrix), 7.5)
    assert (tmp_path / "users").is_dir() == (num_users < NUM_ITEMS)
    known = slow_matrix(rows, (0, 1))
    scores = EaseScores(tmp_path)(sparse.csr_matrix(known, dtype=np.float32))
    np.testing.assert_allclose(scores, known @ slow_ease(matrix, 7.5), rtol=1e-4, atol=1e-5)
    assert np.abs(scores).max() > 0.05


def test_ease_without_an_inverse_says_what_to_raise(tmp_path):
    twice = sparse.csr_matrix(np.ones((4, 2)))
    with pytest.raises(ConfigError, match=r"evaluation.ease.l2 \(1e-30\) is too small"):
        fit_ease(tmp_path, twice, 1e-30)


def test_ease_of_items_that_nobody_has_is_zero(tmp_path, rows):
    matrix = slow_matrix(rows, (0, 1))
    matrix[:, [0, 11]] = 0.0
    fit_ease(tmp_path, sparse.csr_matrix(matrix), 3.0)
    known = slow_matrix(rows, (0,))
    scores = EaseScores(tmp_path)(sparse.csr_matrix(known, dtype=np.float32))
    assert (scores[:, [0, 11]] == 0).all()
    known[:, [0, 11]] = 0.0
    np.testing.assert_allclose(scores, known @ slow_ease(matrix, 3.0), rtol=1e-4, atol=1e-5)


def test_ease_in_blocks_of_rows(tmp_path, rows, monkeypatch):
    from twotower.evaluation.baselines import ease

    monkeypatch.setattr(ease, "_ROWS_AT_ONCE", 4)
    matrix = slow_matrix(rows, (0, 1))
    fit_ease(tmp_path, sparse.csr_matrix(matrix), 7.5)
    scores = EaseScores(tmp_path)(sparse.csr_matrix(matrix, dtype=np.float32))
    np.testing.assert_allclose(scores, matrix @ slow_ease(matrix, 7.5), rtol=1e-4, atol=1e-5)


def test_ials_queries_solve_their_normal_equations(tmp_path, rows):
    matrix = slow_matrix(rows, (0, 1))
    known = matrix[[3, 8]]
    config = IalsConfig(factors=5, iterations=4, alpha=3.0)
    fit_ials(tmp_path, sparse.csr_matrix(matrix), sparse.csr_matrix(known), config, 2.0, 1, 9)
    items = np.load(tmp_path / "items.npy").astype(float)
    queries = np.load(tmp_path / "queries.npy")
    for row, mine in zip(known, queries, strict=True):
        confidence = np.where(row > 0, 3.0, 1.0)
        left = items.T @ (confidence[:, None] * items) + 2.0 * np.eye(5)
        np.testing.assert_allclose(mine, np.linalg.solve(left, items.T @ (confidence * row)), rtol=1e-3)
    assert np.abs(queries).max() > 0.05


def test_ials_is_the_same_for_any_number_of_threads(tmp_path, rows):
    matrix = sparse.csr_matrix(slow_matrix(rows, (0, 1)))
    config = IalsConfig(factors=5, iterations=4)
    for threads in (1, 2):
        fit_ials(tmp_path / str(threads), matrix, matrix[:3], config, 2.0, threads, 9)
    one, two = (np.load(tmp_path / str(threads) / "items.npy") for threads in (1, 2))
    np.testing.assert_array_equal(one, two)


def lists_of(tmp_path, held, name, k):
    ranker = open_ranker(name, tmp_path)
    cut = min(5, len(held))
    parts = [(0, cut), (cut, len(held))]
    return np.concatenate([ranker(start, held.part(start, stop), k) for start, stop in parts])


@pytest.mark.parametrize("name", ["item_knn_cosine", "item_knn_tfidf", "ease"])
def test_lists_equal_slow_scores(tmp_path, rows, dataset, held, name):
    # All neighbours count, so that no equal ones are cut.
    settings = {"ease": EaseConfig(l2=[4.0]), "item_knn": ItemKnnConfig(neighbours=NUM_ITEMS)}
    fitted(tmp_path, dataset, held, [name], **settings)
    matrix = slow_matrix(rows, (0, 1))
    known = matrix[held.user_rows]
    if name == "ease":
        scores = known @ slow_ease(matrix, 4.0)
    else:
        whole = slow_similarity(matrix, NUM_ITEMS, name == "item_knn_tfidf")
        scores = known @ whole
    ranked = lists_of(tmp_path, held, name, 6)
    for place, row in enumerate(ranked):
        masked = set(held.part(place, place + 1).masked_rows.tolist())
        assert masked.isdisjoint(row.tolist())
        best = np.sort([score for item, score in enumerate(scores[place]) if item not in masked])[::-1]
        positive = best[:6] > 0
        np.testing.assert_allclose(scores[place][row][positive], best[:6][positive], rtol=1e-3, atol=1e-4)


def test_unrelated_items_follow_by_popularity(tmp_path):
    # Items 0 and 1 go together; 4, 3 and 2 are popular in that order and with nobody who has 0 or 1.
    rows = [(0, 0, 1, 0, 0), (1, 0, 1, 0, 0), (1, 1, 2, 0, 0), (0, 2, 9, 2, 0)]
    rows += [
        (user, item, 1, 0, 0) for item, users in ((4, 9), (3, 6), (2, 3)) for user in range(5, 5 + users)
    ]
    dataset = dataset_of(rows, num_items=5)
    held = holdout(dataset.interactions, "test", Rules.of(dataset, "exclude"))
    fitted(tmp_path, dataset, held, ["item_knn_cosine"])
    assert lists_of(tmp_path, held, "item_knn_cosine", 5).tolist() == [[1, 4, 3, 2, -1]]


@pytest.mark.parametrize("name", FITTED)
def test_who_knows_nothing_is_given_what_is_popular(tmp_path, rows, name):
    rows = [row for row in rows if row[0] != 4 or row[3] == 2]
    dataset = dataset_of(rows)
    held = holdout(dataset.interactions, "test", Rules.of(dataset, "exclude"))
    fitted(tmp_path, dataset, held, [name])
    place = held.user_rows.tolist().index(4)
    ranked = lists_of(tmp_path, held, name, NUM_ITEMS)
    assert ranked[place].tolist() == popular_order(dataset).tolist()
    assert ranked[place - 1].tolist() != ranked[place].tolist()


@pytest.mark.parametrize("name", BASELINES)
def test_nothing_of_the_test_split_is_fitted(tmp_path, name):
    logs = [random_rows(np.random.default_rng(2), test_shift=shift) for shift in (0, 7)]
    assert logs[0] != logs[1]
    datasets = [dataset_of(log) for log in logs]
    held = holdout(datasets[0].interactions, "test", Rules.of(datasets[0], "include"))
    lists = []
    for number, dataset in enumerate(datasets):
        folder = tmp_path / str(number)
        assert fitted(folder, dataset, held, [name])[name].left_out is None
        lists.append(lists_of(folder, held, name, 9))
    np.testing.assert_array_equal(*lists)


def test_every_baseline_finds_planted_tastes(tmp_path, rng):
    """Two groups of users and items, of whom nobody takes anything of the other's."""
    rows = []
    for user in range(30):
        items = rng.permutation(10)[:6] + 10 * (user % 2)
        rows += [(user, int(i), p, 2 if p == 5 else 0, 0) for p, i in enumerate(items)]
    dataset = dataset_of(rows, num_users=30, num_items=20)
    held = holdout(dataset.interactions, "test", Rules.of(dataset, "exclude"))
    fitted(tmp_path, dataset, held, ials=IalsConfig(l2=[0.1], factors=2))
    for name in FITTED:
        ranked = lists_of(tmp_path, held, name, 4)
        assert ((ranked >= 10) == (held.user_rows % 2 == 1)[:, None]).all(), name


def test_recent_popularity_is_of_the_last_tenth_of_the_time():
    # Time 0 to 100: from 90 on is recent. Item 2 is the most popular, 1 and 0 are recent, 3 once before.
    rows = [(u, 2, 0, 0, 0) for u in range(6)] + [(0, 3, 10, 0, 0), (1, 1, 90, 1, 0), (2, 1, 100, 0, 0)]
    rows += [(3, 0, 95, 0, 0), (4, 4, 89, 0, 0), (4, 4, 200, 2, 0), (5, 0, 99, 0, 1)]
    dataset = dataset_of(rows, num_items=5)
    assert recent_order(dataset).tolist() == [1, 0, 2, 3, 4]
    assert popular_order(dataset).tolist()[0] == 2


def test_without_times_recent_popularity_is_left_out(tmp_path, rows):
    dataset = dataset_of(rows, has_times=False)
    assert recent_order(dataset) is None
    found = write_orders(tmp_path, dataset, BASELINES)
    assert found["recent_popularity"].left_out == "the interactions have no times"
    assert found["popularity"].left_out is None


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("ease", {"ease": EaseConfig(max_size=5)}, r"square of 2\d; evaluation.ease.max_size is 5"),
        ("ials", {"ials": IalsConfig(max_positives=9)}, r"positives are more than .*max_positives \(9\)"),
        ("item_knn_cosine", {"item_knn": ItemKnnConfig(max_products=9)}, r"more than .*max_products \(9\)"),
        ("item_knn_tfidf", {"item_knn": ItemKnnConfig(max_products=9)}, r"more than .*max_products \(9\)"),
    ],
)
def test_what_is_too_large_is_left_out_with_its_reason(tmp_path, dataset, held, name, settings, reason):
    found = fitted(tmp_path, dataset, held, [name], **settings)[name]
    assert re.search(reason, found.left_out)
    assert not (tmp_path / name).exists()


def test_ease_that_does_not_fit_into_memory_is_left_out(tmp_path, dataset, held, monkeypatch):
    monkeypatch.setattr(module, "available_bytes", lambda: 5_000)
    found = fitted(tmp_path, dataset, held, ["ease"])["ease"]
    assert found.left_out == "it takes about 0.0 GB of memory, and 0.0 GB are free"
    monkeypatch.setattr(module, "available_bytes", lambda: None)
    assert fitted(tmp_path, dataset, held, ["ease"])["ease"].left_out is None


def test_size_is_that_of_the_weights():
    matrix = sparse.csr_matrix(np.ones((4, 9)))
    assert size(matrix) == 6
    assert size(sparse.csr_matrix(np.ones((90, 9)))) == 9
    # Users and items without a positive take no room.
    wide = sparse.csr_matrix((np.ones(4), ([0, 1, 2, 3], [5, 6, 7, 8])), shape=(500, 500))
    assert size(wide) == 4


@pytest.mark.parametrize("name", ["ease", "ials"])
def test_regularisation_is_chosen_on_validation(tmp_path, dataset, held, name):
    values = [1.0, 40.0, 5000.0] if name == "ease" else [5000.0, 1.0, 40.0]
    section = EaseConfig(l2=values) if name == "ease" else IalsConfig(l2=values, factors=6)
    found = fitted(tmp_path / "chosen", dataset, held, [name], **{name: section})[name]
    scores = []
    asked = holdout(dataset.interactions, "validation", Rules.of(dataset, "exclude"))
    train = fit_matrix(dataset, "validation")
    known = query_matrix(dataset, "validation", asked.user_rows)
    order = np.arange(NUM_ITEMS)
    for l2 in values:
        if name == "ease":
            fit_ease(tmp_path / "one", train, l2)
        else:
            fit_ials(tmp_path / "one", train, known, section, l2, 1, 5)
        ranked = module.regularised_ranker(name, tmp_path / "one", known, order)(0, asked, 10)
        scores.append(ndcg_at_k(ranked, asked.relevant_offsets, asked.relevant_rows, 10).mean())
    assert len(set(scores)) > 1
    assert found.settings["l2"] == values[int(np.argmax(scores))] != values[0]
    assert found.settings["l2_chosen_by"] == "validation"
    # Fitted again on train and validation.
    again = section.model_copy(update={"l2": [found.settings["l2"]]})
    other = fitted(tmp_path / "set", dataset, held, [name], **{name: again})[name]
    assert other.settings["l2_chosen_by"] == "configuration"
    first, second = (lists_of(tmp_path / folder, held, name, 9) for folder in ("chosen", "set"))
    np.testing.assert_array_equal(first, second)


def test_regularisation_is_not_chosen_where_that_is_dear(tmp_path, dataset, held):
    section = EaseConfig(l2=[7.0, 1.0], choose_up_to=3)
    found = fitted(tmp_path, dataset, held, ["ease"], ease=section)["ease"]
    assert found.settings == {"l2": 7.0, "l2_chosen_by": "configuration"}


def test_popularity_is_always_wanted():
    assert wanted([]) == ["popularity"]
    assert wanted(["ials", "ease"]) == ["popularity", "ease", "ials"]
    assert wanted(["auto"]) == list(BASELINES)


def test_users_with_everything_seen_have_empty_lists(tmp_path, dataset, held):
    everything = np.tile(np.arange(NUM_ITEMS), len(held))
    part = held.part(0, len(held))
    full = type(part)(
        part.user_rows,
        np.arange(len(held) + 1) * NUM_ITEMS,
        everything,
        part.relevant_offsets,
        part.relevant_rows,
        part.counts,
    )
    fitted(tmp_path, dataset, held)
    for name in BASELINES:
        assert (open_ranker(name, tmp_path)(0, full, 4) == -1).all(), name


def test_lists_longer_than_the_catalogue_are_padded(tmp_path, dataset, held):
    fitted(tmp_path, dataset, held)
    free = NUM_ITEMS - np.diff(held.masked_offsets)
    for name in BASELINES:
        ranked = lists_of(tmp_path, held, name, NUM_ITEMS + 4)
        assert ((ranked >= 0).sum(axis=1) == free).all(), name


def test_available_memory(tmp_path):
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert available_bytes(meminfo, cgroup) == 5000 * 1024
    cgroup.mkdir()
    (cgroup / "memory.max").write_text("max\n")
    assert available_bytes(meminfo, cgroup) == 5000 * 1024
    (cgroup / "memory.max").write_text("3000000\n")
    (cgroup / "memory.current").write_text("2000000\n")
    (cgroup / "memory.stat").write_text("anon 5\ninactive_file 400000\n")
    assert available_bytes(meminfo, cgroup) == 1_400_000
    assert available_bytes(tmp_path / "none", tmp_path / "none") is None
    assert available_bytes() > 0
