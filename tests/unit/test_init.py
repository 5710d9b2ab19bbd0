"""``twotower init``: files of many shapes become a configuration that loads and prepares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import cli, prepare
from jobs.init import clocks, features, names
from jobs.init.look import Column
from tests.own_files import SHAPES
from twotower.config import Config, FilesSource, load_config


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _init(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["init", "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["init", "--quiet", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.strip()
    assert line.startswith("twotower init: ")
    assert "\n" not in line
    return line


def _source(config: Config) -> FilesSource:
    assert isinstance(config.data.source, FilesSource)
    return config.data.source


MAPPED = {
    "movielens": {
        "user": "userId",
        "item": "movieId",
        "time": "timestamp",
        "time_unit": "s",
        "value": "rating",
    },
    "retail": {
        "user": "CustomerID",
        "item": "StockCode",
        "time": "InvoiceDate",
        "time_format": "%m/%d/%Y %H:%M",
        "value": "Quantity",
    },
    "clickstream": {
        "user": "visitorid",
        "item": "itemid",
        "time": "timestamp",
        "time_unit": "ms",
        "event": "event",
    },
    "semicolons": {"user": "Kunde", "item": "Artikel", "time": "Datum", "time_format": "%d.%m.%Y"},
    "timestamps": {"user": "listener", "item": "track_id", "time": "played_at"},
    "bare": {"user": "uid", "item": "article"},
}
TABLES = {
    "movielens": ("movies.csv", None),
    "clickstream": ("products.parquet", None),
    "semicolons": (None, "Kunden.csv"),
    "timestamps": ("tracks.parquet", None),
}
FEATURES = {
    "movielens": {"title": "text", "genres": "multi_hot"},
    "clickstream": {
        "category": "categorical",
        "price": "numeric",
        "available": "categorical",
        "tags": "multi_hot",
        "image": "vector",
    },
    "timestamps": {"name": "text", "artist": "categorical", "year": "numeric"},
}
ATTRIBUTES = {
    "movielens": {"genres"},
    "clickstream": {"category", "price", "available", "tags", "added"},
    "timestamps": {"artist", "year"},
}
UNSURE = {
    "movielens": ["links.csv describes items as well", "tags.csv (80 rows) could be a log"],
    "retail": ["Description, UnitPrice of", "Country of", "is read as cp1252"],
    "clickstream": [],
    "semicolons": ["no item table"],
    "timestamps": [],
    "bare": ["no column of likes.tsv holds times", "no item table"],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_understood_and_prepares(
    shape: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(Path(path).relative_to(here)) for path in SHAPES[shape](here)]
    result = _init(capsys, *paths)
    text = Path("config.yaml").read_text()
    config = load_config("config.yaml")
    source = _source(config)
    assert source.columns.model_dump(exclude_defaults=True) == MAPPED[shape]
    items, users = TABLES.get(shape, (None, None))
    assert (source.items and source.items.path) == items
    assert (source.users and source.users.path) == users
    own = {f.name: f.type for f in config.features.item if f.type != "id"}
    assert own == FEATURES.get(shape, {})
    assert set(config.index.attributes) == ATTRIBUTES.get(shape, set())
    assert len(result["unsure"]) == len(UNSURE[shape])
    for start, said in zip(sorted(UNSURE[shape]), sorted(result["unsure"]), strict=True):
        assert start in said
    for sentence in result["unsure"]:
        assert " ".join(sentence.split()[:4]) in text.replace("\n#   ", " ")
    assert "different values in" in text
    assert prepare.main(["--config", "config.yaml", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_interactions"] > 0


def test_rows_of_a_shop_become_what_they_mean(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SHAPES["retail"](here)
    _init(capsys, "online_retail.csv")
    data = load_config("config.yaml").data
    assert data.on_bad_rows == "drop"
    assert data.positives.min_value == 1.0
    assert _source(load_config("config.yaml")).encoding == "cp1252"
    text = Path("config.yaml").read_text()
    assert "333 without a user id" in text
    assert "43 rows are not above 0" in text


def test_events_have_weights_by_their_names(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = SHAPES["clickstream"](here)
    _init(capsys, *[str(Path(path).relative_to(here)) for path in paths])
    source = _source(load_config("config.yaml"))
    assert source.events == {"view": 0.3, "addtocart": 0.7, "transaction": 1.0, "impression": "seen_only"}
    assert source.interactions == "events-2015-0*.csv"


def test_nothing_is_overwritten_unless_that_is_asked_for(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SHAPES["bare"](here)
    Path("mine.yaml").write_text("mine")
    line = _refused(capsys, "likes.tsv", "--output", "mine.yaml")
    assert "mine.yaml is there already; --force" in line
    assert Path("mine.yaml").read_text() == "mine"
    _init(capsys, "likes.tsv", "--output", "mine.yaml", "--force")
    assert load_config("mine.yaml").name == "mine"
    assert _refused(capsys, "likes.tsv", "--output", ".").endswith("is a folder; give the path of a file")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("log.jsonl", '{"user": 1}\n', "of no kind that can be read"),
        ("log.csv", "196\t242\t3\t881250949\n186\t302\t3\t891717742\n", "line of column names"),
        ("items.csv", "sku,price\na,1.5\nb,2.5\nc,3.5\n", "looks like a log of interactions"),
        ("empty.csv", "user,item\n", "has no rows"),
        ("none.csv", None, "names no file"),
    ],
)
def test_what_can_not_be_guessed_is_refused_in_one_line(
    name: str, text: str | None, says: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        Path(name).write_text(text)
    assert says in _refused(capsys, name)
    assert not Path("config.yaml").exists()


def _log(path: str, header: str, rows: int = 600, **kinds: Any) -> None:
    rng = np.random.default_rng(7)
    lines = [header]
    for n in range(rows):
        lines.append(",".join(str(make(rng, n)) for make in kinds.values()))
    Path(path).write_text("\n".join(lines) + "\n")


def test_without_hints_in_names_values_decide_and_that_is_said(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _log(
        "x.csv",
        "a,b,c",
        a=lambda rng, n: rng.integers(0, 40),
        b=lambda rng, n: f"z{rng.integers(0, 50)}",
        c=lambda rng, n: 1_700_000_000 + 60 * n,
    )
    unsure = _init(capsys, "x.csv")["unsure"]
    columns = _source(load_config("config.yaml")).columns
    assert (columns.user, columns.item, columns.time, columns.time_unit) == ("a", "b", "c", "s")
    assert any("which column is the user" in sentence for sentence in unsure)
    assert any("which column is the item" in sentence for sentence in unsure)


def test_days_that_could_be_months_are_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _log(
        "log.csv",
        "user,item,date",
        user=lambda rng, n: rng.integers(0, 30),
        item=lambda rng, n: rng.integers(0, 50),
        date=lambda rng, n: f"{rng.integers(1, 13):02d}/{rng.integers(1, 13):02d}/2023",
    )
    unsure = _init(capsys, "log.csv")["unsure"]
    assert any("could be written '%d/%m/%Y' as well" in sentence for sentence in unsure)
    assert "whole days only" in Path("config.yaml").read_text()


def test_two_columns_that_could_be_the_user_are_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _log(
        "log.csv",
        "customer_id,account_user,item,ts",
        customer=lambda rng, n: rng.integers(0, 30),
        user=lambda rng, n: rng.integers(0, 33),
        item=lambda rng, n: rng.integers(0, 50),
        ts=lambda rng, n: 1_700_000_000_000 + n,
    )
    unsure = _init(capsys, "log.csv")["unsure"]
    assert any("the user could be account_user" in sentence for sentence in unsure)
    assert _source(load_config("config.yaml")).columns.time_unit == "ms"


def test_a_catalogue_with_an_id_twice_is_left_out_and_told(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _log("log.csv", "user,sku", user=lambda rng, n: n % 30, sku=lambda rng, n: f"s{rng.integers(0, 60)}")
    rows = [f"s{n},name {n}" for n in range(60)]
    Path("goods.csv").write_text("\n".join(["sku,name", *rows, rows[3]]) + "\n")
    unsure = _init(capsys, "log.csv", "goods.csv")["unsure"]
    assert any("leave one row for each item" in sentence for sentence in unsure)
    assert _source(load_config("config.yaml")).items is None


def test_types_that_no_feature_has_break_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _log("log.csv", "user,sku", user=lambda rng, n: n % 30, sku=lambda rng, n: rng.integers(0, 60))
    n = 60
    odd = {
        "sku": pa.array(range(n)),
        "blob": pa.array([bytes([255, i]) for i in range(n)]),
        "nested": pa.array([{"a": i} for i in range(n)]),
        "structs": pa.array([[{"a": i}] for i in range(n)]),
        "nothing": pa.nulls(n),
        "gap": pa.array([1.0, float("inf")] * (n // 2)),
        "took": pa.array(range(n), pa.duration("s")),
        "shade": pa.array(["no", "1e3"] * (n // 2)).dictionary_encode(),
        "title": pa.array([f"thing {i}: a, b" for i in range(n)]),
        "item_id": pa.array(range(n, 2 * n)),
        "price tag (€)": pa.array([i + 0.5 for i in range(n)]),
    }
    pq.write_table(pa.table(odd), "goods.parquet")
    _init(capsys, "log.csv", "goods.parquet")
    config = load_config("config.yaml")
    own = {f.name: f.type for f in config.features.item}
    assert own == {"item_id": "id", "shade": "categorical", "title": "text", "price_tag": "numeric"}
    assert prepare.main(["--config", "config.yaml", "--quiet", "--json"]) == 0


def test_only_the_first_rows_are_looked_at(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SHAPES["bare"](here)
    _init(capsys, "likes.tsv", "--rows", "300")
    assert "the first 300 rows" in Path("config.yaml").read_text()
    assert "--rows 0" in _refused(capsys, "likes.tsv", "--rows", "0", "--force")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("customerID", ["customer", "id"]),
        ("movieid", ["movie", "id"]),
        ("INVOICE DATE", ["invoice", "date"]),
        ("user_ids", ["user", "id"]),
        ("AVGPrice2", ["avg", "price"]),
        ("colour", ["colour"]),
    ],
)
def test_words_of_names(name: str, found: list[str]) -> None:
    assert names.words(name) == found


@pytest.mark.parametrize(
    ("values", "unit", "time_format"),
    [
        ([1_700_000_000 + n for n in range(50)], "s", None),
        ([1_700_000_000_000_000 + n for n in range(50)], "us", None),
        ([20_230_101 + n % 28 for n in range(50)], None, "%Y%m%d"),
        ([f"2023-01-{1 + n % 28:02d}T10:00:00Z" for n in range(50)], None, None),
        ([f"{1 + n % 28} Feb 2023" for n in range(50)], None, "%d %b %Y"),
    ],
)
def test_times_of_every_form(values: list[Any], unit: str | None, time_format: str | None) -> None:
    found = clocks.written(Column("ts", pa.array(values), False))
    assert found is not None
    assert (found.unit, found.format) == (unit, time_format)


@pytest.mark.parametrize(
    "values", [[5, 9, 12] * 9, [400_000_000 + 7_654_321 * n for n in range(99)], ["x", "y"]]
)
def test_what_is_no_time(values: list[Any]) -> None:
    assert clocks.written(Column("number", pa.array(values), False)) is None


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["a|b", "b|c", "c", "a|b|c", "a|c"] * 4, "multi_hot"),
        (["['a', 'b']", "['b']", "['c', 'a']", "['c', 'b']", "['a']"] * 4, "multi_hot"),
        (["Home, Garden", "Toys", "Books"] * 9, "categorical"),
        ([f"A long title, of {n} words" for n in range(40)], "text"),
        ([f"{n:08x}" for n in range(40)], None),
        (["1", "2", "5"] * 9, "categorical"),
        ([str(n / 7) for n in range(40)], "numeric"),
    ],
)
def test_kinds_of_columns(cells: list[str], kind: str | None) -> None:
    use = features._use(Column("thing", pa.array(cells), True), False)
    assert (use.feature and use.feature["type"]) == kind
