"""Cells that hold lists: one parser, whoever wrote them and whatever reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.datasets import files_config, grid, write_csv
from twotower import progress
from twotower.cells import other_separator, split_lists, split_numbers
from twotower.config import AttributeConfig
from twotower.data.attributes import attribute_table
from twotower.data.prepare import prepare
from twotower.errors import DataError
from twotower.features.columns import as_lists

HEADER = ["who", "what", "when"]
FORMS = {
    "separated": "a|b c",
    "with blanks": " a | |b c ",
    "python": "['a', 'b c']",
    "json": '["a", "b c"]',
    "numpy": "['a' 'b c']",
    "numpy over lines": "['a'\n 'b c']",
    "tuple": "('a', 'b c')",
    "postgres": '{a,"b c"}',
    "spark": "[a, b c]",
    "with nothing": "['a', None, '', 'b c']",
}


@pytest.mark.parametrize("form", list(FORMS))
def test_a_list_is_the_same_however_it_is_written(form: str) -> None:
    assert split_lists(pa.array([FORMS[form], None, ""]), "|").to_pylist() == [["a", "b c"], None, []]


def test_numbers_in_lists_are_decimal_text() -> None:
    texts = ["[1, 2]", "[1 2]", "[1. 2.]", "[1.0, 2.0]", "(1, 2)", "{1,2}", "1|2", "[1]", "[]", "[ ]"]
    expected = [["1", "2"]] * 7 + [["1"], [], []]
    assert split_lists(pa.array(texts), "|").to_pylist() == expected
    assert split_lists(pa.array(["[True, 1.5]", "[1e3 2.5]"]), "|").to_pylist() == [
        ["true", "1.5"],
        ["1000", "2.5"],
    ]


def test_brackets_that_are_no_list_are_text() -> None:
    texts = ["(no genres listed)", "[Drama]|[Comedy]", "(a)|(b)", "[Drama]", "a [b]"]
    expected = [["(no genres listed)"], ["[Drama]", "[Comedy]"], ["(a)", "(b)"], ["Drama"], ["a [b]"]]
    assert split_lists(pa.array(texts), "|").to_pylist() == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1 2 ... 8 9]", "numpy left out values"),
        ("[{'id': 1, 'name': 'a'}]", "a list holds a dict"),
        ("[[1, 2], [3]]", "a list holds a list"),
        ("{'id': 1}", "is a mapping"),
    ],
)
def test_lists_that_can_not_be_read_are_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_lists(pa.array(["[1]", text]), "|")


VALUE = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Z"], exclude_characters="'\"\\[]{}()|,"),
    min_size=1,
    max_size=6,
)


@settings(deadline=None)
@given(st.lists(st.lists(VALUE, min_size=1, max_size=4), min_size=1, max_size=5), st.sampled_from("|;,"))
def test_every_writer_is_read_back(lists: list[list[str]], separator: str) -> None:
    lists = [["x" + value.replace(";", "_") for value in values] for values in lists]
    writers: list[Any] = [str, json.dumps, lambda v: json.dumps(v, ensure_ascii=False), separator.join]
    for write in writers:
        assert split_lists(pa.array([write(v) for v in lists]), separator).to_pylist() == lists
    numpy = ["[" + " ".join(f"'{v}'" for v in values) + "]" for values in lists]
    assert split_lists(pa.array(numpy), separator).to_pylist() == lists


@settings(deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=5))
def test_every_writer_of_vectors_is_read_back(values: list[float]) -> None:
    array = np.array(values, np.float32)
    with np.printoptions(threshold=10_000, floatmode="unique"):
        texts = [
            str(values),
            str(array),
            json.dumps(values),
            " ".join(map(str, values)),
            str(tuple(values)).replace(",)", ")"),
        ]
    for text in texts:
        (found,) = split_numbers(pa.array([text])).to_pylist()
        assert [float(piece) for piece in found] == pytest.approx(values, rel=1e-6), text
    assert split_numbers(pa.array([None, "[]", ""])).to_pylist() == [None, None, None]


# ---- the readers of lists


@pytest.mark.parametrize("form", list(FORMS))
def test_every_reader_of_lists_reads_every_form(tmp_path: Path, form: str) -> None:
    items = pd.DataFrame({"sku": [f"i{n}" for n in range(23)], "tags": FORMS[form]})
    items["vec"] = ["[0.5, 1]", "0.5 1", "[0.5 1.]", "0.5;1"][0:1] * 23
    items.to_csv(tmp_path / "items.csv", index=False)
    log = write_csv(tmp_path / "log.csv", HEADER, grid())
    features = [
        {"name": "item_id", "type": "id"},
        {"name": "tags", "type": "multi_hot"},
        {"name": "vec", "type": "vector", "dim": 2},
    ]
    dataset = prepare(
        files_config(
            tmp_path,
            log,
            data__source__items={"path": str(tmp_path / "items.csv"), "id": "sku"},
            features__item=features,
        )
    )
    fitted = {f.spec.name: f for f in dataset.schema.item}
    assert fitted["tags"].values == ["a", "b c"]
    table = dataset.item_table()
    assert table.column("vec")[0].as_py() == [0.5, 1.0]
    tags = attribute_table(table, {"tags": AttributeConfig(separator="|")}).column("tags")
    assert tags[0].as_py() == ["a", "b c"]


def test_impressions_are_read_as_lists_are(tmp_path: Path) -> None:
    columns = {"user": "who", "item": "what", "time": "when", "time_unit": "s", "impressions": "shown"}
    found = []
    for form in ("a|b", " a | b ", "['a', 'b']", '["a", "b"]', "['a' 'b']", "[a, b]"):
        frame = pd.DataFrame(grid(), columns=HEADER).assign(shown=form)
        frame.to_csv(tmp_path / "log.csv", index=False)
        dataset = prepare(files_config(tmp_path, tmp_path / "log.csv", data__source__columns=columns))
        assert dataset.counts["impressions"] == 140
        assert dataset.num_items == 25
        found.append(dataset.fingerprint)
    assert len(set(found)) == 1


def test_lists_of_numbers_of_a_fixed_size_are_lists_of_texts() -> None:
    fixed = pa.array([[1, 2], None], pa.list_(pa.int32(), 2))
    assert as_lists(fixed, "|").to_pylist() == [["1", "2"], None]


# ---- another separator than the declared one


def tagged(tmp_path: Path, cells: list[str], separator: str) -> Any:
    items = pd.DataFrame(
        {"sku": [f"i{n}" for n in range(20)], "tags": [cells[n % len(cells)] for n in range(20)]}
    )
    items.to_csv(tmp_path / "items.csv", index=False)
    log = write_csv(tmp_path / "log.csv", HEADER, grid(num_items=20))
    return prepare(
        files_config(
            tmp_path,
            log,
            data__source__items={"path": str(tmp_path / "items.csv"), "id": "sku"},
            features__item=[
                {"name": "item_id", "type": "id"},
                {"name": "tags", "type": "multi_hot", "separator": separator},
            ],
        )
    )


@pytest.mark.parametrize(
    ("cells", "separator", "other"),
    [
        (["Comedy; Drama", "Action, Comedy"], ",", ";"),
        (["Comedy, Drama", "Action", "Drama, Action"], "|", ","),
        (["a|b", "c|d", "e"], ",", "|"),
    ],
)
def test_a_separator_that_is_not_the_files_is_refused(
    tmp_path: Path, cells: list[str], separator: str, other: str
) -> None:
    with pytest.raises(DataError, match=r"features\.item 'tags': .* cells of column 'tags' hold ") as error:
        tagged(tmp_path, cells, separator)
    assert repr(other) in str(error.value)


def test_a_separator_inside_values_is_no_separator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(progress, "say", said.append)
    cells = ["Home, Garden|Toys", "Toys", "Books|Home, Garden", "Sci-Fi"]
    assert sorted(tagged(tmp_path, cells, "|").schema.item[1].values) == [
        "Books",
        "Home, Garden",
        "Sci-Fi",
        "Toys",
    ]
    assert not any("not the separator" in line for line in said)
    cells = ["Home, Garden", "Toys, Games", "Books|Toys, Games"]
    tagged(tmp_path, cells, "|")  # most cells have a comma and no bar: it is said, but may be meant
    assert any("hold ',' and not the separator '|'" in line for line in said)
    assert other_separator(pa.array(["a,b", None, "c"]), ",") is None


def test_impressions_with_another_separator_are_refused(tmp_path: Path) -> None:
    frame = pd.DataFrame(grid(), columns=HEADER).assign(shown="i1, i2")
    frame.to_csv(tmp_path / "log.csv", index=False)
    columns = {"user": "who", "item": "what", "time": "when", "time_unit": "s", "impressions": "shown"}
    with pytest.raises(
        DataError, match=r"impressions such as 'i1, i2' hold ',' and not .*impressions_separator"
    ):
        prepare(files_config(tmp_path, tmp_path / "log.csv", data__source__columns=columns))
