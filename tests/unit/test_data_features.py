from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from tests.datasets import files_config, grid, write_csv
from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.errors import DataError
from twotower.features.columns import as_lists
from twotower.values import as_categories

ID = {"name": "item_id", "type": "id"}


def dataset(
    tmp_path: Path,
    item: list[dict[str, Any]] | None = None,
    query: list[dict[str, Any]] | None = None,
    items: pd.DataFrame | None = None,
    users: pd.DataFrame | None = None,
    form: str = "parquet",
) -> Dataset:
    log = write_csv(tmp_path / "log.csv", ["who", "what", "when"], grid())
    changes: dict[str, Any] = {}
    for side, frame in (("items", items), ("users", users)):
        if frame is not None:
            path = tmp_path / f"{side}.{form}"
            frame.to_parquet(path) if form == "parquet" else frame.to_csv(path, index=False)
            changes[f"data__source__{side}"] = {"path": str(path), "id": "id"}
    changes["features__item"] = [ID, *(item or [])]
    changes["features__query"] = [{"name": "history", "type": "history"}, *(query or [])]
    return prepare(files_config(tmp_path, log, **changes))


def catalogue(**columns: list[Any]) -> pd.DataFrame:
    return pd.DataFrame({"id": [f"i{n}" for n in range(23)], **columns})


def cycle(*values: Any) -> list[Any]:
    return [values[n % len(values)] for n in range(23)]


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_values_are_fitted_by_frequency_and_then_name(tmp_path: Path, form: str) -> None:
    shelves = cycle("b", "a", "c", "c", None)  # c 9, a 5, b 5
    genres = cycle("x|y", "y| z|", None, "y")  # y 17, x 6, z 6
    found = dataset(
        tmp_path,
        [
            {"name": "shelf", "type": "categorical"},
            {"name": "genres", "type": "multi_hot"},
            {"name": "top", "type": "categorical", "column": "shelf", "max_values": 1},
        ],
        items=catalogue(shelf=shelves, genres=genres),
        form=form,
    )
    values = {f.spec.name: f.values for f in found.schema.item}
    assert values == {"item_id": None, "shelf": ["c", "a", "b"], "genres": ["y", "x", "z"], "top": ["c"]}
    assert found.item_table(["shelf", "genres"]).slice(0, 2).to_pylist() == [
        {"shelf": "b", "genres": "x|y"},
        {"shelf": "a", "genres": "y| z|"},
    ]


def test_lists_are_taken_as_they_are(tmp_path: Path) -> None:
    found = dataset(
        tmp_path,
        [{"name": "tags", "type": "multi_hot"}],
        items=catalogue(tags=cycle(["p|q", "r"], [], None, ["r", None])),
    )
    assert found.schema.item[1].values == ["r", "p|q"]


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_numbers_are_fitted_without_the_missing_ones(tmp_path: Path, form: str) -> None:
    prices = cycle(10.0, 20.0, None, 90.0)
    found = dataset(
        tmp_path,
        [
            {"name": "price", "type": "numeric"},
            {"name": "log_price", "type": "numeric", "column": "price", "transform": "log1p"},
            {"name": "same", "type": "numeric"},
        ],
        items=catalogue(price=prices, same=[3] * 23),
        form=form,
    )
    known = np.array([p for p in prices if p is not None])
    _, price, log_price, same = found.schema.item
    assert (price.mean, price.std) == pytest.approx((known.mean(), known.std()), rel=1e-12)
    assert (log_price.mean, log_price.std) == pytest.approx(
        (np.log1p(known).mean(), np.log1p(known).std()), rel=1e-12
    )
    assert (same.mean, same.std) == (3.0, 1.0)
    stored = found.item_table(["price"]).column("price")
    assert stored.type in (pa.int64(), pa.float64())
    assert stored.to_pylist() == prices


def test_query_features_are_fitted_on_the_user_table(tmp_path: Path) -> None:
    users = pd.DataFrame({"id": ["u1", "u0", "new"], "job": ["cook", "cook", "smith"], "age": [20, 30, 40]})
    found = dataset(
        tmp_path,
        query=[{"name": "job", "type": "categorical"}, {"name": "age", "type": "numeric"}],
        users=users,
    )
    assert found.schema.query[1].values == ["cook", "smith"]
    assert found.schema.query[2].mean == 30
    assert found.num_users == 8
    assert found.user_table(["age"]).column("age").to_pylist() == [30, 20, None, None, None, None, None, 40]


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_vectors_of_the_declared_width(tmp_path: Path, form: str) -> None:
    vectors = cycle([0.5, 1.0, -2.0], [1.0, 2.0, 3.0])
    found = dataset(
        tmp_path, [{"name": "image", "type": "vector", "dim": 3}], items=catalogue(image=vectors), form=form
    )
    column = found.item_table(["image"]).column("image")
    assert column.type == pa.list_(pa.float32(), 3)
    assert column.to_pylist() == vectors


def test_missing_vectors_stay_missing(tmp_path: Path) -> None:
    vectors = cycle([0.5, 1.0], None)
    found = dataset(tmp_path, [{"name": "image", "type": "vector", "dim": 2}], items=catalogue(image=vectors))
    assert found.item_table(["image"]).column("image").to_pylist() == vectors


WRONG: list[tuple[dict[str, Any], list[Any], str]] = [
    (
        {"type": "numeric"},
        cycle("12", "dear", "7"),
        r"column 'f' is numeric, but 8 of 23 values are no numbers, such as 'dear'",
    ),
    ({"type": "numeric"}, cycle([1.0], [2.0]), r"column 'f' is numeric, but has type list"),
    ({"type": "numeric"}, cycle(1.0, np.inf), r"column 'f' holds 11 infinite values"),
    (
        {"type": "numeric", "transform": "log1p"},
        cycle(1.0, -3.5),
        r"log1p needs numbers above -1, and the smallest is -3\.5",
    ),
    (
        {"type": "vector", "dim": 3},
        cycle([1.0, 2.0, 3.0], [1.0, 2.0]),
        r"declared with dim 3, but 11 of 23 .* such as 2 in row 2",
    ),
    ({"type": "vector", "dim": 3}, cycle(1.0), r"is a vector, but has type double"),
    ({"type": "vector", "dim": 1}, cycle(["a"]), r"is a vector, but holds no numbers"),
    ({"type": "vector", "dim": 2}, cycle([1.0, np.nan]), r"missing or infinite elements"),
    ({"type": "categorical"}, cycle([1]), r"'f', column 'f': a categorical feature holds text, numbers"),
    ({"type": "multi_hot"}, cycle(4), r"'f', column 'f': a multi_hot feature holds separated text or lists"),
]


@pytest.mark.parametrize(("spec", "values", "message"), WRONG)
def test_columns_that_do_not_fit_their_feature(
    tmp_path: Path, spec: Any, values: list[Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        dataset(tmp_path, [{"name": "f", **spec}], items=catalogue(f=values))


def test_an_unknown_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"features\.item 'genre' needs column 'genre', and the item table does not have it; its "
        r"columns are item_id, title, genres",
    ):
        dataset(tmp_path, [{"name": "genre", "type": "multi_hot"}], items=catalogue(genres=cycle("a")))


def test_a_query_feature_needs_a_user_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"features\.query 'age' needs column 'age' .* has no user table"):
        dataset(tmp_path, query=[{"name": "age", "type": "numeric"}])


def test_categories_of_any_type_are_text() -> None:
    assert as_categories(pa.array([3, None, -4])).to_pylist() == ["3", None, "-4"]
    assert as_categories(pa.array([3.0, None, float("nan"), 2.5, 1e300])).to_pylist() == [
        "3", None, None, "2.5", "1e+300",
    ]  # fmt: skip
    assert as_categories(pa.array([True, None])).to_pylist() == ["true", None]
    assert as_categories(pa.array(["a", "a"]).dictionary_encode()).to_pylist() == ["a", "a"]


def test_lists_of_any_form() -> None:
    assert as_lists(pa.array(["a|b", "", None, " c |"]), "|").to_pylist() == [["a", "b"], [], None, ["c"]]
    assert as_lists(pa.array([[1, 2], [], None, [3]]), "|").to_pylist() == [["1", "2"], [], None, ["3"]]
    sliced = pa.array(["x", "a|b", None]).slice(1)
    assert as_lists(sliced, "|").to_pylist() == [["a", "b"], None]


def test_a_bare_title_column_is_the_title_and_reserved_names_do_not_clash(tmp_path: Path) -> None:
    frame = catalogue(title=cycle("T"), item_row=cycle(5), item_id=cycle("wrong"))
    found = dataset(tmp_path, items=frame)
    assert found.item_table().column_names == ["item_id", "title"]
    assert found.item_table().slice(4, 1).to_pylist() == [{"item_id": "i4", "title": "T"}]
