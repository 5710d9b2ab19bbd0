"""Files of queries offline: what the retriever answers each, whatever the file's kind, and bad rows."""

from __future__ import annotations

import csv
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from jobs import recommend as job
from tests.generations import catalogue_vectors
from tests.recommendations import recommend_config, run_until_killed
from tests.shop import NUM_ITEMS, NUM_USERS, build_store
from twotower.artefacts import read_manifest
from twotower.cluster import recommend as module
from twotower.cluster.recommend import recommend
from twotower.cluster.recommend_parts import QUERIES_SCHEMA, CheckQueries, Recommend, check_part, part_name
from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.data.query_files import find_query_files, scan
from twotower.errors import ConfigError, DataError
from twotower.generations.generation import Generation
from twotower.model.checkpoint import Checkpoint
from twotower.retrieval.query import HistoryItem, Query
from twotower.retrieval.retriever import Retriever

K = 7
YEAR = {"year": {"gte": 1985}}
WAR = {"genres": {"any_of": ["War"]}}
BASE: list[dict[str, Any]] = [
    {"query_id": "known", "user_id": "3"},
    {"query_id": "given", "user_id": "4", "history": ["1001", {"item_id": "1002", "weight": 0.5}]},
    {"history": [{"item_id": "1005", "time": "2023-12-01T00:00:00Z"}, "1009"], "at": "2023-11-30"},
    {"query_id": "features", "features": {"age": 31, "group": "red"}},
    {},
    {"query_id": "nobody", "user_id": "no such user"},
    {"user_id": "5", "filter": WAR, "exclude_items": ["1003", "1004"]},
    {"user_id": "6", "allow_items": ["1001", "1002", "1003", "1010", "nothing"], "exclude_seen": False},
    {"query_id": "none", "user_id": "7", "allow_items": []},
    {"query_id": "fewer", "user_id": "8", "k": 2},
    {"user_id": "9", "filter": {"year": {"gte": 1980, "lt": 2000}, **WAR}},
]
ROWS = BASE + [{"query_id": f"user-{i}", "user_id": str(i)} for i in range(NUM_USERS)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Dataset, Path]:
    return build_store(tmp_path_factory.mktemp("queries"))


@pytest.fixture(scope="module")
def config(store: tuple[Config, Dataset, Path], tmp_path_factory: pytest.TempPathFactory) -> Config:
    return recommend_config(store[0], tmp_path_factory.mktemp("out"), K, actors=2)


@pytest.fixture(scope="module")
def retriever(store: tuple[Config, Dataset, Path]) -> Retriever:
    return Retriever.open(store[2])


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    names = sorted({name for row in rows for name in row})
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            # Line ends inside of a cell are no ends of a row.
            cells = {n: v if isinstance(v, str) else json.dumps(v, indent=1) for n, v in row.items()}
            writer.writerow(cells)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    """Columns of the types that other tools write: structs, lists of structs, timestamps."""

    def item(value: Any) -> dict[str, Any]:
        value = value if isinstance(value, dict) else {"item_id": value}
        time = value.get("time")
        return {**value, "time": time and datetime.fromisoformat(time)}

    columns: dict[str, list[Any]] = {}
    for name in sorted({name for row in rows for name in row}):
        values = [row.get(name) for row in rows]
        if name == "history":
            values = [v and [item(i) for i in v] for v in values]
        if name == "at":
            values = [v and datetime.fromisoformat(v).replace(tzinfo=UTC) for v in values]
        columns[name] = values
    pq.write_table(pa.table(columns), path, **options)
    return path


def table_of(directory: Path) -> pa.Table:
    return ds.dataset(directory / "parts").to_table()


def answers_of(directory: Path) -> dict[str, list[dict[str, Any]]]:
    lists: dict[str, list[dict[str, Any]]] = {}
    for row in table_of(directory).to_pylist():
        mine = lists.setdefault(row["query_id"], [])
        mine.append(row)
        assert row["rank"] == len(mine)
    return lists


@pytest.fixture(scope="module")
def answered(
    ray_local: Any,
    config: Config,
    store: tuple[Config, Dataset, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    file = write_jsonl(tmp_path_factory.mktemp("files") / "queries.jsonl", ROWS)
    return recommend(config, store[2], str(file))


def expected_query(row: dict[str, Any]) -> Query:
    """The query of a row, made without the checks of requests."""

    def micros(text: str) -> int:
        return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1e6)

    values = {"k": K, **row}
    values.pop("query_id", None)
    if "history" in values:
        items = [i if isinstance(i, dict) else {"item_id": i} for i in values["history"]]
        values["history"] = [
            HistoryItem(i["item_id"], micros(i["time"]) if "time" in i else None, i.get("weight", 1.0))
            for i in items
        ]
    if "at" in values:
        values["at"] = micros(values["at"])
    return Query(**values)


def test_every_query_gets_what_the_retriever_answers(answered: Path, retriever: Retriever) -> None:
    lists = answers_of(answered)
    strategies = set()
    for place, row in enumerate(ROWS):
        answer = retriever.retrieve(expected_query(row))
        found = lists.pop(row.get("query_id", str(place)), [])
        assert [hit["item_id"] for hit in found] == [item["item_id"] for item in answer.items], row
        scores = [item["score"] for item in answer.items]
        np.testing.assert_allclose([hit["score"] for hit in found], scores, atol=2e-6)
        for hit in found:
            assert (hit["user_id"], hit["strategy"]) == (row.get("user_id"), answer.strategy)
        strategies.add(answer.strategy)
        assert len(found) == (0 if row.get("query_id") == "none" else len(answer.items))
    assert not lists
    assert strategies == {"personal", "history", "features", "popular"}


def test_answers_are_those_of_brute_force(answered: Path, store: tuple[Config, Dataset, Path]) -> None:
    """Items are ranked by the vectors of queries and items alone, without index, merge or filter plans."""
    _, dataset, path = store
    vectors = catalogue_vectors(Checkpoint.open(path / "model"), dataset)
    opened = Retriever.open(path)
    items = dataset.item_table().to_pylist()
    war = np.array(["War" in item["genres"].split("|") for item in items])
    query = Query(k=NUM_ITEMS, user_id="5", exclude_seen=False)
    embedding = opened.encode([query]).vectors[0]
    scores = vectors @ embedding
    seen = Generation.open(path).seen(5)
    out = np.isin(np.arange(NUM_ITEMS), seen) | np.isin(
        dataset.item_ids.ids(np.arange(NUM_ITEMS)), ["1003", "1004"]
    )
    ranked = [i for i in np.argsort(-scores) if war[i] and not out[i]][:K]
    assert [hit["item_id"] for hit in answers_of(answered)["6"]] == dataset.item_ids.ids(ranked)
    assert len(ranked) > 2


def test_the_manifest_accounts_for_every_query(answered: Path) -> None:
    manifest = read_manifest(answered, "recommendations")
    table = table_of(answered)
    assert table.schema.equals(QUERIES_SCHEMA)
    assert manifest["num_queries"] == len(ROWS)
    assert manifest["num_empty"] == 1
    assert manifest["num_rows"] == table.num_rows
    assert manifest["num_parts"] == len(list(answered.glob("parts/*"))) > 4
    assert pd.read_parquet(answered / "parts").groupby("query_id").size().max() == K


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_items_of_after_the_training_are_read_by_what_a_file_says_of_them(
    kind: str, store: tuple[Config, Dataset, Path], tmp_path: Path
) -> None:
    """What an actor does; without Ray."""
    told = {"item_id": "brand new", "features": {"genres": ["War"], "year": 1999}}
    entries = [[told, {"item_id": "1001"}], [{"item_id": "what?"}, {"item_id": "1001"}], [told]]
    rows = [{"query_id": str(i), "history": history} for i, history in enumerate(entries)]
    path, generation = tmp_path / f"queries.{kind}", str(store[2])
    if kind == "jsonl":
        write_jsonl(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    (file,) = find_query_files(str(path), "--queries")
    (part,) = scan(file, 10).ranges(0, 10)
    batch = pa.table({name: [value] for name, value in part.items()})
    checked = CheckQueries(generation, K, True, "cpu", 1)(batch).to_pylist()
    assert [row["bad"] for row in checked] == [0]
    Recommend(generation, str(tmp_path), K, True, [], None, "cpu", 1)(batch)
    written = tmp_path / part_name(0, len(rows))
    counts = check_part(written, len(rows), K)
    assert counts == {"num_rows": 3 * K, "num_empty": 0, "num_by_features": 2, "num_ignored": 1}
    lists = pq.read_table(written).to_pylist()
    retriever = Retriever.open(store[2])
    for row in rows:
        items = [HistoryItem(h["item_id"], features=h.get("features", {})) for h in row["history"]]
        answer = retriever.retrieve(Query(k=K, history=items))
        found = [hit["item_id"] for hit in lists if hit["query_id"] == row["query_id"]]
        assert found == [item["item_id"] for item in answer.items]


def test_files_of_all_kinds_and_many_files_give_the_same(
    answered: Path, config: Config, store: tuple[Config, Dataset, Path], tmp_path: Path
) -> None:
    (tmp_path / "many").mkdir()
    write_jsonl(tmp_path / "many" / "0.ndjson", ROWS[:3])
    write_csv(tmp_path / "many" / "1.csv", ROWS[3:14])
    write_parquet(tmp_path / "many" / "2.parquet", ROWS[14:], row_group_size=5)
    paths = [
        write_csv(tmp_path / "queries.csv", ROWS),
        write_parquet(tmp_path / "queries.parquet", ROWS, row_group_size=11),
        tmp_path / "many",
    ]
    mine = recommend_config(config, config.storage.root, K)
    expected = table_of(answered).sort_by([("query_id", "ascending"), ("rank", "ascending")])
    for path in paths:
        directory = recommend(mine, store[2], str(path))
        assert directory != answered
        found = table_of(directory).sort_by([("query_id", "ascending"), ("rank", "ascending")])
        assert found.drop_columns("score").equals(expected.drop_columns("score")), path
        np.testing.assert_allclose(found["score"], expected["score"], atol=2e-6)


def test_the_whole_run_has_a_filter_lists_and_fields(
    ray_local: Any, config: Config, store: tuple[Config, Dataset, Path], tmp_path: Path
) -> None:
    """For users and queries alike, on top of what queries say."""
    _, dataset, path = store
    mine = recommend_config(config, tmp_path, K, recommend={"filter": YEAR, "fields": ["title", "year"]})
    # With an id that is not known, and one twice.
    denied, allowed = tmp_path / "denied.csv", tmp_path / "allowed.parquet"
    denied.write_text("item\n1001\n1007\n1007\nnothing\n")
    listed = [f"{1000 + i}" for i in range(NUM_ITEMS) if i % 5]
    pq.write_table(pa.table({"item": listed}), allowed)
    file = write_jsonl(tmp_path / "queries.jsonl", ROWS)
    items = {row["item_id"]: row for row in dataset.item_table().to_pylist()}
    may = {
        i
        for i, item in items.items()
        if float(item["year"]) >= 1985 and i in listed and i not in ("1001", "1007")
    }
    assert 3 * K < len(may) < NUM_ITEMS - K
    opened = Retriever.open(path)
    for queries, names in ((None, ["user_id"]), (str(file), ["query_id", "user_id", "strategy"])):
        directory = recommend(mine, path, queries, str(allowed), str(denied))
        table = table_of(directory)
        assert table.column_names == [*names, "rank", "item_id", "score", "title", "year"]
        assert set(table["item_id"].to_pylist()) <= may
        assert all(r["title"] == items[r["item_id"]]["title"] for r in table.to_pylist())
        assert all(r["year"] == items[r["item_id"]]["year"] for r in table.to_pylist())
        rows = ROWS if queries else [{"query_id": str(i), "user_id": str(i)} for i in range(NUM_USERS)]
        lists: dict[str, list[str]] = {}
        for hit in table.to_pylist():
            lists.setdefault(hit[names[0]], []).append(hit["item_id"])
        for place, row in enumerate(rows):
            query = expected_query({**row, "k": NUM_ITEMS})
            best = [i["item_id"] for i in opened.retrieve(query).items if i["item_id"] in may]
            assert lists.get(row.get("query_id", str(place)), []) == best[: row.get("k", K)], row


BAD = [
    ('{"user_id": 42.0}', "user_id: 42.0 is no id"),
    ('{"user_id": "1"', "is not JSON"),
    ("[1]", "is not a JSON object"),
    ('{"userid": "1"}', "userid: there is no such key; did you mean 'user_id'?"),
    ('{"history": [1.5]}', "history[0].item_id: 1.5 is no id"),
    ('{"at": "yesterday"}', '"yesterday" is no ISO 8601 time'),
    ('{"k": 8}', "k: 8 is out of range; allowed: an integer from 1 to 7"),
    ('{"filter": {"colour": {"any_of": ["red"]}}}', "items have no attribute 'colour'"),
    ('{"filter": {"year": {"above": 1}}}', "'above' is no operator"),
    ('{"features": {"age": "old"}}', "'age' has the value 'old'"),
    ('{"features": {"shoe": 1}}', "no user column 'shoe'"),
    ('{"exclude_items": "1"}', 'exclude_items: "1" is not allowed'),
    ('{"query_id": true}', "query_id: true is no id"),
    ('{"fields": ["title"]}', "name them in recommend.fields"),
    ('{"user_id": "\\ud800"}', "is not JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_what_is_wrong_with_a_row(
    store: tuple[Config, Dataset, Path], tmp_path: Path, line: str, message: str
) -> None:
    (tmp_path / "q.jsonl").write_text("{}\n\n" + line + "\n{}\n")
    (part,) = scan(tmp_path / "q.jsonl", 64).ranges(0, 64)
    checker = CheckQueries(str(store[2]), K, True, device="cpu", threads=1)
    (facts,) = checker(pa.table({name: [value] for name, value in part.items()})).to_pylist()
    assert (facts["asked"], facts["bad"]) == (3, 1)
    (shown,) = facts["shown"]
    assert shown.startswith(f"{tmp_path}/q.jsonl row 3: ")
    assert message in shown


def test_bad_rows_are_named_before_anything_is_written(
    ray_local: Any, config: Config, store: tuple[Config, Dataset, Path], tmp_path: Path
) -> None:
    mine = recommend_config(config, tmp_path / "out", K)
    several = tmp_path / "several.jsonl"
    several.write_text("{}\n" * 18 + "".join(f"{line}\n" for line, _ in BAD) + "{}\n")
    with pytest.raises(DataError) as caught:
        recommend(mine, store[2], str(several))
    text = str(caught.value)
    assert text.startswith(
        f"{len(BAD)} of {len(BAD) + 19} queries can not be answered, and nothing was written:"
    )
    # Over several parts: the first ones, in their order.
    assert [f"row {n}: " in text for n in range(18, 26)] == [False] + [True] * 5 + [False] * 2
    assert text.endswith(f"and {len(BAD) - 5} more")
    assert not mine.recommendations.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.jsonl", "\n\n", "holds no query"),
        ("q.csv", "user_id\n", "holds no query"),
        ("q.csv", "", "is empty"),
        (
            "q.csv",
            "user_id,shoe\n1,2\n",
            r"column 'shoe': there is no such key; allowed: the keys k, user_id",
        ),
        ("q.csv", "user_id,fields\n1,2\n", r"name them in recommend.fields"),
        ("q.parquet", "nothing", "is not a readable file of queries"),
        ("q.txt", "1\n", r"--queries: .*q\.txt is of no kind that can be read; use \.parquet, .*\.jsonl"),
    ],
)
def test_files_that_are_none(
    config: Config, store: tuple[Config, Dataset, Path], tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    mine = recommend_config(config, tmp_path / "out", K)
    with pytest.raises(DataError, match=message):
        recommend(mine, store[2], str(tmp_path / name))
    assert not mine.recommendations.exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"filter": {"colour": {"any_of": ["red"]}}}, "recommend.filter: items have no attribute 'colour'"),
        ({"filter": {"year": {"gte": 9999}}}, "leave none of the 59 items"),
        ({"fields": ["colour"]}, "recommend.fields: 'colour' is no column"),
        ({"fields": ["item_id"]}, "recommend.fields: 'item_id' is no column"),
        ({"fields": ["title", "title"]}, "is there twice"),
    ],
)
def test_settings_that_do_not_fit_the_generation(
    config: Config, store: tuple[Config, Dataset, Path], tmp_path: Path, section: dict[str, Any], message: str
) -> None:
    mine = recommend_config(config, tmp_path, K, recommend=section)
    with pytest.raises(ConfigError, match=message):
        recommend(mine, store[2])
    assert not mine.recommendations.exists()


def test_other_content_and_other_settings_are_other_outputs(
    answered: Path, config: Config, store: tuple[Config, Dataset, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    calls: list[Any] = []

    def stop(*arguments: Any, **more: Any) -> Any:
        calls.append(arguments)
        raise InterruptedError

    monkeypatch.setattr(module, "work_through", stop)
    same = write_jsonl(tmp_path / "elsewhere.jsonl", ROWS)
    assert recommend(config, store[2], str(same)) == answered
    other = write_jsonl(tmp_path / "other.jsonl", ROWS[1:] + ROWS[:1])
    (tmp_path / "list.csv").write_text("item\n1001\n")
    listed = str(tmp_path / "list.csv")
    filtered = recommend_config(config, config.storage.root, K, recommend={"filter": YEAR})
    runs: list[tuple[Any, ...]] = [
        (config, store[2], str(other)),
        (config, store[2], str(same), listed),
        (config, store[2], str(same), None, listed),
        (filtered, store[2], str(same)),
    ]
    for run in runs:
        with pytest.raises(InterruptedError):
            recommend(*run)
    assert len(calls) == len(runs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_killed_run_goes_on_where_it_stopped(
    answered: Path,
    config: Config,
    store: tuple[Config, Dataset, Path],
    tmp_path: Path,
    monkeypatch: Any,
    kind: str,
) -> None:
    mine = recommend_config(config, tmp_path / "out", K)
    write = {"jsonl": write_jsonl, "csv": write_csv}[kind]
    file = write(tmp_path / f"queries.{kind}", ROWS)
    run_until_killed(mine, store[2], tmp_path, str(file))
    left = [p for p in mine.recommendations.iterdir() if p.suffix != ".lock"]
    assert [p.name.startswith(".") for p in left] == [True]
    kept = {p.name: p.stat().st_mtime_ns for p in (left[0] / "parts").glob("part-*.parquet")}
    assert len(kept) == 2
    workers = []
    real = module.work_through

    def spy(worker: Any, settings: Any, parts: Any, *rest: Any, **more: Any) -> Any:
        workers.append((worker.__name__, [part["start"] for part in parts]))
        return real(worker, settings, parts, *rest, **more)

    monkeypatch.setattr(module, "work_through", spy)
    directory = recommend(mine, store[2], str(file))
    # Not checked again, and without the two parts that were there.
    assert workers == [("Recommend", list(range(16, len(ROWS), 8)))]
    assert {n: (directory / "parts" / n).stat().st_mtime_ns for n in kept} == kept
    expected, found = answers_of(answered), answers_of(directory)
    assert {i: [h["item_id"] for h in hits] for i, hits in found.items()} == {
        i: [h["item_id"] for h in hits] for i, hits in expected.items()
    }


def test_a_file_that_changes_while_the_job_runs_is_an_error(
    ray_local: Any, config: Config, store: tuple[Config, Dataset, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    mine = recommend_config(config, tmp_path / "out", K)
    file = write_jsonl(tmp_path / "queries.jsonl", ROWS)
    real = module.work_through

    def change(worker: Any, *arguments: Any, **more: Any) -> Any:
        yield from real(worker, *arguments, **more)
        write_jsonl(file, ROWS[::-1])

    monkeypatch.setattr(module, "work_through", change)
    with pytest.raises(DataError, match=r"queries\.jsonl was changed while the job ran"):
        recommend(mine, store[2], str(file))


def test_the_job(ray_local: Any, store: tuple[Config, Dataset, Path], tmp_path: Path, capsys: Any) -> None:
    """From the command line, with exit code 2 for bad rows."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(recommend_config(store[0], store[0].storage.root, K).to_json()))
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"user_id": "1"}, {"user_id": 1.5}])
    assert job.main(["--config", str(path), "--queries", str(bad)]) == 2
    captured = capsys.readouterr()
    assert "bad.jsonl row 2: user_id: 1.5 is no id; allowed: text of 1 to 1024 characters" in captured.err
    # Ray may print there what it thinks of workers of earlier tests.
    assert "TWOTOWER_RESULT" not in captured.out
    good = write_jsonl(tmp_path / "good.jsonl", ROWS[:9])
    (tmp_path / "denied.csv").write_text("item\n1001\n")
    arguments = ["--queries", str(good), "--exclude-items", str(tmp_path / "denied.csv")]
    assert job.main(["--config", str(path), *arguments]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("TWOTOWER_RESULT ")]
    result = json.loads(line.removeprefix("TWOTOWER_RESULT "))
    assert (result["num_queries"], result["num_empty"], result["generation"]) == (9, 1, "g1")
    table = pq.read_table(result["path"])
    assert table.num_rows == result["num_rows"] > 0
    assert "1001" not in table["item_id"].to_pylist()
