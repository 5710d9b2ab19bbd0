"""What is read of items that training did not know: maps from features, in histories and in profiles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests import planted
from tests.generations import plain_generation
from twotower.config import parse_config
from twotower.data.prepare import prepare
from twotower.errors import NotAllowedError
from twotower.model.batch import Bag
from twotower.model.checkpoint import Checkpoint, weights_of, write_checkpoint
from twotower.model.described import describe_items
from twotower.model.features import QueryFeatures, encode_columns, item_batch
from twotower.model.towers import TwoTower
from twotower.model.unknown_items import RIDGE, RidgeSums
from twotower.retrieval.query import HistoryItem, HistoryUse, Query
from twotower.retrieval.retriever import Retriever


def test_the_map_is_a_weighted_ridge_regression() -> None:
    """Against least squares over rows that stand for the ridge, on standardised features."""
    rng = np.random.default_rng(0)
    n, width, dims = 57, 5, {"a": 3, "b": 4}
    x = rng.normal(size=(n, width)) * [1, 10, 0.1, 3, 1] + [0, 5, 1, -2, 7]
    x[:, 4] = 7  # says nothing
    rows = {name: x @ rng.normal(size=(width, dim)) + rng.normal(size=(n, dim)) for name, dim in dims.items()}
    weights = rng.uniform(0.5, 4, n)
    whole, parts = RidgeSums(width, dims), [RidgeSums(width, dims) for _ in range(2)]

    def add(sums: RidgeSums, part: slice) -> None:
        sums.add(
            torch.from_numpy(x[part]).float(),
            {name: torch.from_numpy(r[part]).float() for name, r in rows.items()},
            torch.from_numpy(weights[part]),
        )

    add(whole, slice(None))
    add(parts[0], slice(20))
    add(parts[1], slice(20, None))
    parts[0].total += parts[1].total
    share = weights / weights.sum()
    mean = share @ x
    deviation = np.sqrt(share @ (x - mean) ** 2)
    z = (x - mean)[:, :4] / deviation[:4]
    for name, dim in dims.items():
        centre = share @ rows[name]
        root = np.sqrt(share)[:, None]
        left = np.vstack([root * z, np.sqrt(RIDGE) * np.eye(4)])
        right = np.vstack([root * (rows[name] - centre), np.zeros((4, dim))])
        expected = centre + z @ np.linalg.lstsq(left, right, rcond=None)[0]
        for sums in (whole, parts[0]):
            found = sums.maps()[name].double().numpy()
            np.testing.assert_allclose(x @ found[:-1] + found[-1], expected, rtol=1e-3, atol=1e-3)


def test_no_item_gives_no_map() -> None:
    found = RidgeSums(3, {"a": 2}).maps()["a"]
    assert found.shape == (4, 2)
    assert not found.any()


HISTORIES: dict[str, dict[str, Any]] = {
    "mean": {"pooling": "mean"},
    "weighted": {"pooling": "weighted"},
    "recency": {"pooling": "recency", "decay": 0.8},
    "attention": {"pooling": "attention"},
    "transformer": {"pooling": "transformer", "transformer": {"blocks": 1}},
    "own table": {"share": False, "dim": 6, "pooling": "mean"},
}


NOBODY = [-1, -1, -1]
ROWS = [[3, -2, 7, -1, -9], [-1, -9, -9, -9, -9], [4, 5, -9, -9, -9]]
"""Histories of item rows; -1 and -2 are the described items, -9 is none."""
SHARES = np.array([[1, 0.5, 2, 1, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]], np.float32)


def model_of(root: Path, history: str, hashed: bool = False) -> TwoTower:
    values = planted.make_config(root, HISTORIES[history], profile=True).to_json()
    values["train"]["epochs"] = 1
    if hashed:
        values["features"]["item"][0] |= {"buckets": 23, "hashes": 3}
    return planted.trained(parse_config(values)).model.eval()


def histories(described: int) -> np.ndarray:
    """The histories with the described items in rows from ``described`` on."""
    rows = np.array(ROWS)
    return np.where(rows == -9, -1, np.where(rows < 0, described - 1 - rows, rows))


@pytest.mark.parametrize("history", HISTORIES)
def test_a_described_item_is_read_as_one_with_its_vector_as_row(history: str, tmp_path: Path) -> None:
    """Against a model in which the rows of two other items, whom no history has, are the vectors."""
    model = model_of(tmp_path, history)
    schema, n = model.schema, model.schema.num_items
    columns = encode_columns(schema.item, pa.table({"genre": ["Horror", "Comedy"]}))
    described = describe_items(model, columns, 2)
    name = "query_history" if history == "own table" else "id_of_item"
    assert described.vectors[name].shape == (2, model.tables[name].shape[1])
    assert (described.vectors[name][0] - described.vectors[name][1]).abs().max() > 0.01
    np.testing.assert_array_equal(described.profiles["taste"].sum(1), 1)
    profiles = {"taste": np.random.default_rng(1).random((n, 3), dtype=np.float32)}
    features = QueryFeatures(schema, profiles)
    found = model.encode_queries(features(NOBODY, {}, histories(n), SHARES, described=described))
    before = model.encode_queries(features(NOBODY, {}, histories(0), SHARES))
    profiles["taste"][:2] = described.profiles["taste"]
    model.tables[name].data[1:3] = described.vectors[name]
    expected = model.encode_queries(features(NOBODY, {}, histories(0), SHARES))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # The last query has none of them, and the others read something else before.
    assert ((before - expected).abs().max(1).values > 1e-3).tolist() == [True, True, False]


@pytest.mark.parametrize("history", ["weighted", "transformer"])
def test_histories_of_hashed_ids_read_described_items_too(history: str, tmp_path: Path) -> None:
    """Against a model whose table has the sum of the rows of each id."""
    model, plain = model_of(tmp_path / "a", history, hashed=True), model_of(tmp_path / "b", history)
    schema, n = model.schema, model.schema.num_items
    assert model.tables["id_of_item"].shape != plain.tables["id_of_item"].shape
    described = describe_items(model, encode_columns(schema.item, pa.table({"genre": ["Horror", None]})), 2)
    profiles = {"taste": np.ones((n, 3), np.float32)}
    batch = item_batch(schema, np.arange(n), {"genre": np.zeros((n, 1), np.int32)})
    bag = batch["item_id"]
    assert isinstance(bag, Bag)
    plain.tables["id_of_item"].data[1:] = model.lookup("id_of_item", bag).detach()
    plain.towers.load_state_dict(model.towers.state_dict())
    args = (NOBODY, {}, histories(n), SHARES)
    found = model.encode_queries(QueryFeatures(schema, profiles)(*args, described=described))
    expected = plain.encode_queries(QueryFeatures(plain.schema, profiles)(*args, described=described))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_of_items_that_nobody_had_are_what_the_map_says(tmp_path: Path) -> None:
    """And the item tower reads the unknown id for them, as for items that come later."""
    trainer = planted.trained(planted.make_config(tmp_path))
    model, counts = trainer.model.eval(), trainer.source.item_counts()
    never = np.flatnonzero(counts == 0)
    assert len(never) == 2
    # As where a training starts from one that did not know more of them.
    model.unknown_items.untrained.fill_(True)
    trainer._fit_unknown(model, trainer.inputs, trainer.world)
    np.testing.assert_array_equal(np.flatnonzero(model.unknown_items.untrained.numpy()), never + 1)
    inputs = trainer.inputs.items(never)
    vectors = model.unknown_items.vectors(model.item_features(inputs))["id_of_item"]
    torch.testing.assert_close(model.tables["id_of_item"].data[never + 1], vectors)
    assert (vectors[0] - vectors[1]).abs().max() > 0.1
    later = item_batch(model.schema, [-1, -1], {"genre": trainer.inputs._item_columns["genre"][never]})
    torch.testing.assert_close(model.encode_items(inputs), model.encode_items(later))


@pytest.fixture(scope="module")
def updated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generation of a trained model, to which items of both genres were added."""
    return planted.build_store(planted.make_config(tmp_path_factory.mktemp("planted")))[1]


@pytest.fixture(scope="module")
def retriever(updated: Path) -> Retriever:
    return Retriever.open(updated)


def genres(retriever: Retriever, *history: HistoryItem, k: int = 10) -> list[str]:
    found = retriever.retrieve(Query(k=k, history=list(history), fields=["genre"])).items
    return [item["genre"] for item in found]


@pytest.mark.parametrize("genre", planted.GENRES)
def test_an_item_of_after_the_training_leads_to_its_genre(retriever: Retriever, genre: str) -> None:
    added = HistoryItem(f"new-{genre.lower()}")
    assert genres(retriever, added) == [genre] * 10
    # What the request itself says of an item that nobody knows counts as much.
    told = HistoryItem("nobody knows it", features={"genre": genre})
    assert genres(retriever, told) == [genre] * 10
    first, second = (retriever.retrieve(Query(k=5, history=[h])) for h in (added, told))
    scores = {item["item_id"]: item["score"] for item in second.items}
    for item in first.items:
        assert item["score"] == pytest.approx(scores.get(item["item_id"], item["score"]), abs=1e-5)
    assert first.strategy == second.strategy == "history"
    assert first.history == second.history == HistoryUse(by_features=1)


def test_items_of_the_other_genre_move_an_answer(retriever: Retriever) -> None:
    known = [HistoryItem("i0"), HistoryItem("i1")]
    other = [
        HistoryItem("new-horror"),
        *(HistoryItem(f"x{i}", features={"genre": "Horror"}) for i in range(9)),
    ]
    query = Query(k=62, history=known)
    both = retriever.retrieve(Query(k=62, history=[*known, *other], exclude_seen=False))

    def mean(answer: Any, genre: str) -> float:
        return float(np.mean([i["score"] for i in answer.items if planted.genre_of(i["item_id"]) == genre]))

    def without_added(answer: Any) -> Any:
        return replace(answer, items=[i for i in answer.items if i["item_id"] not in planted.ADDED])

    before, after = without_added(retriever.retrieve(query)), without_added(both)
    assert mean(after, "Horror") > mean(before, "Horror") + 0.2
    assert mean(after, "Comedy") < mean(before, "Comedy") - 0.2
    assert both.history == HistoryUse(by_id=2, by_features=10)


def test_what_is_known_of_an_item_comes_before_what_a_query_says(retriever: Retriever) -> None:
    for known in ("i0", "new-comedy"):
        plain, told = (
            retriever.retrieve(Query(k=9, history=[HistoryItem(known, features=features)]))
            for features in ({}, {"genre": "Horror"})
        )
        assert plain.items == told.items
        assert plain.history == told.history


def test_items_of_which_nothing_is_known_take_no_place(retriever: Retriever) -> None:
    known = [HistoryItem("i0"), HistoryItem("i40")]
    unknown = [HistoryItem("a"), HistoryItem("b", features={"genre": None}), HistoryItem("c", time=9)]
    plain = retriever.retrieve(Query(k=9, history=known, at=8))
    mixed = retriever.retrieve(Query(k=9, history=[known[0], *unknown, known[1]], at=8))
    assert mixed.items == plain.items
    assert plain.history == HistoryUse(by_id=2)
    # What is not before the moment is not counted.
    assert mixed.history == HistoryUse(by_id=2, ignored=2)
    nothing = retriever.retrieve(Query(k=9, history=unknown[:2]))
    assert (nothing.strategy, nothing.history) == ("popular", HistoryUse(ignored=2))


def test_a_batch_gives_each_query_its_own_items(retriever: Retriever) -> None:
    histories = [
        [HistoryItem("x", features={"genre": "Horror"}), HistoryItem("i0")],
        [HistoryItem("new-comedy")],
        [HistoryItem("x", features={"genre": "Comedy"}), HistoryItem("y", features={"genre": "Horror"})],
        [HistoryItem("i40")],
        [HistoryItem("z", features={"genre": "a new one"})],
    ]
    queries = [Query(k=7, history=h) for h in histories]
    together, single = retriever.retrieve_batch(queries), [retriever.retrieve(q) for q in queries]
    for one, other in zip(together, single, strict=True):
        assert one.history == other.history
        assert [i["item_id"] for i in one.items] == [i["item_id"] for i in other.items]
        assert [i["score"] for i in one.items] == pytest.approx([i["score"] for i in other.items], abs=1e-5)


@pytest.mark.parametrize(
    ("features", "said"),
    [
        ({"nothing": 1}, "history[1].features: the model reads no item column 'nothing'"),
        ({"genre": {"a": 1}}, "history[1].features: 'genre' has the value"),
    ],
)
def test_features_that_are_not_allowed(retriever: Retriever, features: dict[str, Any], said: str) -> None:
    query = Query(k=3, history=[HistoryItem("i0"), HistoryItem("x", features=features)])
    with pytest.raises(NotAllowedError) as caught:
        retriever.retrieve(query)
    assert said in caught.value.message
    assert caught.value.allowed
    with pytest.raises(NotAllowedError):
        retriever._inputs.check(query)


@pytest.mark.parametrize("profile", [False, True])
def test_models_without_a_map_read_profiles_or_nothing(profile: bool, tmp_path: Path) -> None:
    """Of an earlier release, whose checkpoints hold none."""
    values = planted.make_config(tmp_path, profile=profile).to_json()
    values["train"]["epochs"] = 1
    config = parse_config(values)
    dataset, weights = prepare(config), weights_of(planted.trained(config).model)
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("unknown_items.")}
    assert len(kept) < len(weights)
    directory = tmp_path / "old"
    directory.mkdir()
    write_checkpoint(directory, kept, dataset, config, {})
    checkpoint = Checkpoint.open(directory)
    assert not checkpoint.model.unknown_items.fitted
    assert not checkpoint.model.unknown_items.untrained.any()
    plain_generation(config, dataset, checkpoint, "old")
    retriever = Retriever.open(config.store / "generations" / "old")
    told = HistoryItem("x", features={"genre": "Horror"})
    answer = retriever.retrieve(Query(k=9, history=[HistoryItem("i0"), told]))
    alone = retriever.retrieve(Query(k=9, history=[HistoryItem("i0")]))
    assert answer.history == HistoryUse(by_id=1, by_features=int(profile), ignored=int(not profile))
    assert (answer.items == alone.items) is not profile
