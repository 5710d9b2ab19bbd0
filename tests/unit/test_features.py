"""Encoding of columns and queries, each value derived by hand."""

import re
import zlib

import numpy as np
import pyarrow as pa
import pytest
import torch

from twotower.errors import DataError
from twotower.features.text import text_buckets
from twotower.model.batch import Bag, forget
from twotower.model.features import QueryFeatures, encode_columns, item_batch, profile_values
from twotower.schema import (
    CategoricalFeature,
    FeatureSchema,
    FittedFeature,
    HistoryFeature,
    IdFeature,
    MultiHotFeature,
    NumericFeature,
    ProfileFeature,
    TextFeature,
    VectorFeature,
)

GENRES = FittedFeature(spec=MultiHotFeature(name="genres", dim=3), values=["Drama", "Comedy", "War"])
YEAR = FittedFeature(spec=NumericFeature(name="year"), mean=1990.0, std=10.0)
STUDIO = FittedFeature(spec=CategoricalFeature(name="studio", dim=2), values=["a", "b"])
TITLE = FittedFeature(spec=TextFeature(name="title", dim=2, buckets=97, ngram=3, max_length=5))
CLIP = FittedFeature(spec=VectorFeature(name="clip", dim=2))
ITEM = FittedFeature(spec=IdFeature(name="item_id", dim=4))
TABLE = pa.table(
    {
        "genres": ["Comedy|Drama", "", None, "Western|War|War"],
        "year": [2000, None, 1980, 1990],
        "studio": ["b", "zzz", None, "a"],
        "title": ["Ab", None, "The Long Good Friday", ""],
        "clip": pa.array([[1.0, 2.0], None, [3.0, 4.0], [0.5, 0.0]], pa.list_(pa.float32(), 2)),
    }
)


def schema(query: list[FittedFeature]) -> FeatureSchema:
    item = [ITEM, GENRES, YEAR, STUDIO, TITLE, CLIP]
    return FeatureSchema(query=query, item=item, num_users=3, num_items=6, num_catalogue_items=4)


def test_static_columns_by_hand() -> None:
    columns = encode_columns([ITEM, GENRES, YEAR, STUDIO, TITLE, CLIP], TABLE)
    assert "item_id" not in columns
    # Drama 1, Comedy 2, War 3, unknown 0; a set is in ascending order without repeats.
    assert columns["genres"].tolist() == [[1, 2], [-1, -1], [-1, -1], [0, 3]]
    assert columns["year"].tolist() == [[1, 0], [0, 1], [-1, 0], [0, 0]]
    assert columns["studio"].tolist() == [[2], [0], [-1], [1]]
    assert columns["clip"].tolist() == [[1, 2], [0, 0], [3, 4], [0.5, 0]]
    title = columns["title"]
    assert title.shape == (4, 5)  # cut at max_length
    assert (title[1] == -1).all()
    assert title[0, :3].tolist() == text_buckets("ab", TITLE.spec)
    assert text_buckets("ab", TITLE.spec) != text_buckets("ba", TITLE.spec)


@pytest.mark.parametrize("max_length", [1, 3, 8, 1000])
@pytest.mark.parametrize("text", ["ab", "Toy Story (1995)", "a " * 50, "x" * 40, "-- --", "Ünïcode wörds"])
def test_words_come_first_and_then_their_n_grams(text: str, max_length: int) -> None:
    spec = TextFeature(name="t", buckets=1 << 20, ngram=3, max_length=max_length)
    words = re.findall(r"\w+", text.lower())
    grams = [f"<{w}>"[i : i + 3] for w in words for i in range(len(w))]
    pieces = [*(f"w:{w}" for w in words), *grams][:max_length]
    assert text_buckets(text, spec) == [zlib.crc32(p.encode()) % (1 << 20) for p in pieces]


def test_numbers_that_leave_nothing_of_the_others_are_refused() -> None:
    encode_columns([YEAR], pa.table({"year": [1e9, -1e9]}))
    for value in (1e300, -1e300):
        with pytest.raises(DataError, match=r"1e\+300 is over 1e\+15 standard deviations away"):
            encode_columns([YEAR], pa.table({"year": [1990.0, value]}))


def test_a_missing_column_is_missing_in_every_row() -> None:
    columns = encode_columns([GENRES, YEAR, STUDIO, TITLE, CLIP], pa.table({"other": [1, 2]}))
    assert (columns["genres"] == -1).all()
    assert columns["year"].tolist() == [[0, 1], [0, 1]]
    assert (columns["studio"] == -1).all()
    assert (columns["title"] == -1).all()
    assert (columns["clip"] == 0).all()


def test_lists_and_numbers_as_categories() -> None:
    lists = pa.table({"genres": [["War", "Drama"], []], "studio": [1, 2]})
    studio = FittedFeature(spec=CategoricalFeature(name="studio"), values=["2"])
    columns = encode_columns([GENRES, studio], lists)
    assert columns["genres"].tolist() == [[1, 3], [-1, -1]]
    assert columns["studio"].tolist() == [[0], [1]]


@pytest.mark.parametrize(
    ("feature", "column", "message"),
    [
        (YEAR, ["nineteen"], "'year' .string. can not be read as the numeric feature"),
        (CLIP, [[1.0, 2.0, 3.0]], "width \\[3\\], declared is dim 2"),
        (CLIP, [[float("nan"), 2.0]], "NaN"),
        (CLIP, [[2.0, -1e25]], r"vectors hold -1e\+25; 1e\+15 is the largest"),
        (
            FittedFeature(spec=NumericFeature(name="year", transform="log1p")),
            [-1.0],
            "log1p needs numbers above -1, and the smallest is -1",
        ),
    ],
)
def test_a_column_of_the_wrong_type_is_named(feature: FittedFeature, column: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_columns([feature], pa.table({feature.spec.name: column}))


def test_item_batch_averages_and_knows_the_unknown() -> None:
    s = schema([FittedFeature(spec=HistoryFeature(name="history", dim=4))])
    columns = {n: c[[3, 1]] for n, c in encode_columns(s.item, TABLE).items()}
    batch = item_batch(s, [3, -1], columns)
    ids, genres = batch["item_id"], batch["genres"]
    assert isinstance(ids, Bag)
    assert isinstance(genres, Bag)
    assert ids.ids.tolist() == [[4], [0]]
    assert genres.weights.tolist() == [[0.5, 0.5], [0, 0]]
    assert isinstance(batch["year"], torch.Tensor)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [("mean", [1 / 3] * 3), ("weighted", [0.5 / 2, 1.5 / 2, 0]), ("recency", [4 / 7, 2 / 7, 1 / 7])],
)
def test_history_pooling(pooling: str, expected: list[float]) -> None:
    feature = FittedFeature(spec=HistoryFeature(name="h", dim=4, pooling=pooling, decay=0.5, max_length=3))
    query = QueryFeatures(schema([feature]), {})
    batch = query([0, 1], {}, [[5, 0, 2, 1], [-1, -1, -1, -1]], [[0.5, 1.5, -3.0, 9], [0, 0, 0, 0]])
    bag = batch["h"]
    assert isinstance(bag, Bag)
    assert bag.ids.tolist() == [[6, 1, 3], [-1, -1, -1]]
    assert bag.weights[0].tolist() == pytest.approx(expected)
    assert bag.weights[1].tolist() == [0, 0, 0]


def test_profile_is_the_sum_over_the_count_with_clipped_weights() -> None:
    profile = FittedFeature(spec=ProfileFeature(name="p", of="genres", max_length=4))
    year = FittedFeature(spec=ProfileFeature(name="y", of="year"))
    s = schema([profile, year])
    values = profile_values(s, encode_columns(s.item, TABLE))
    assert values["p"].shape == (6, 4)
    query = QueryFeatures(s, values)
    # Items 0 (Drama, Comedy), 3 (unknown, War), 5 (outside the catalogue); the fifth is past max_length.
    batch = query([-1, 2], {}, [[0, 3, 5, 0, 0], [-1] * 5], [[0.5, 7.0, 1.0, -2.0, 1.0], [0] * 5])
    p = batch["p"]
    assert isinstance(p, torch.Tensor)
    assert p.tolist() == [[1 / 4, 0.5 / 4, 0.5 / 4, 1 / 4], [0, 0, 0, 0]]
    y = batch["y"]
    assert isinstance(y, torch.Tensor)
    assert y[0].item() == pytest.approx((0.5 * 1 + 1 * 0 + 0 + 0 + 1) / 5)


def test_too_wide_a_profile_is_refused() -> None:
    wide = FittedFeature(spec=MultiHotFeature(name="genres"), values=[str(i) for i in range(2000)])
    s = FeatureSchema(
        query=[FittedFeature(spec=ProfileFeature(name="p", of="genres"))],
        item=[wide],
        num_users=1,
        num_items=4,
        num_catalogue_items=4,
    )
    with pytest.raises(DataError, match="2001 wide; at most 1024"):
        profile_values(s, {"genres": np.zeros((4, 1), np.int32)})


def test_a_forgotten_id_is_the_unknown_row_once() -> None:
    several = Bag(
        torch.tensor([[4, 7, 7], [0, -1, -1], [2, 9, 5]]), torch.tensor([[1.0] * 3, [1, 0, 0], [1] * 3])
    )
    found = forget(several, torch.tensor([True, False, False]))
    assert found.ids.tolist() == [[0, -1, -1], [0, -1, -1], [2, 9, 5]]
    assert found.weights.tolist() == [[1, 0, 0], [1, 0, 0], [1, 1, 1]]
    single = forget(Bag(torch.tensor([[4], [7]]), torch.ones(2, 1)), torch.tensor([False, True]))
    assert single.ids.tolist() == [[4], [0]]
    assert single.weights.tolist() == [[1], [1]]
    assert forget(Bag(torch.zeros(0, 2).long(), torch.zeros(0, 2)), torch.zeros(0).bool()).ids.shape == (0, 2)
