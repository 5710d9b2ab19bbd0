"""Updates: what they count, that repeating one does nothing, what they refuse, and who wins of two."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from jobs import update_items as job
from tests.generations import edit_index
from tests.shop import NUM_ITEMS, build_store, fresh_checkpoint
from tests.updates import Item, content, copied, items_of, table_of, write_config
from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.errors import ArtefactError, ArtefactMismatchError, ConfigError, DataError, RefusedError
from twotower.generations.files import write_shard_facts
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.lifecycle.delta import equal_rows
from twotower.lifecycle.update import update_items
from twotower.model.checkpoint import Checkpoint
from twotower.model.towers import TwoTower
from twotower.retrieval.retriever import Query, Retriever


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Dataset, Path]:
    """A published generation; do not change it."""
    return build_store(tmp_path_factory.mktemp("updates"))


@pytest.fixture(scope="module")
def items(shop: tuple[Config, Dataset, Path]) -> dict[str, Item]:
    return items_of(shop[2])


@pytest.fixture
def config(shop: tuple[Config, Dataset, Path], tmp_path: Path) -> Config:
    """With a copy of the store."""
    return copied(shop[0], tmp_path / "runs")


@pytest.fixture
def store(config: Config) -> Store:
    return Store(config.store)


@pytest.fixture
def run(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    file = write_config(config, tmp_path / "config.yaml")

    def call(*arguments: str) -> tuple[int, dict[str, Any], str]:
        code = job.main(["--config", str(file), *arguments])
        out, err = capsys.readouterr()
        return code, {} if code else json.loads(out.splitlines()[-1].partition(" ")[2]), err

    return call


def test_the_job_from_files_as_the_source_has_them(run: Any, store: Store, tmp_path: Path) -> None:
    """The columns of the id and the title have the names of the configuration, here item and name."""
    new = {
        "item": [1003, 5001],
        "name": ["Other", "New"],
        "genres": ["War", "Drama|War"],
        "year": [2031, 2032],
    }
    others = {
        "brand": ["b", None],
        "rating": [None, 2.5],
        "in_stock": ["true", "false"],
        "added": ["2026-01-02"] * 2,
    }
    pacsv.write_csv(pa.table({**new, **others, "colour": ["red", "blue"]}), tmp_path / "new.csv")
    pq.write_table(pa.table({"item": [1010, 1011]}), tmp_path / "gone.parquet")
    files = ["--items", str(tmp_path / "new.csv"), "--delete", str(tmp_path / "gone.parquet")]
    code, result, err = run(*files, "--delete-id", "1012", "1013")
    assert code == 0, err
    assert "'colour'; what is there is left out" in err
    expected = {"base": "g1", "added": 1, "changed": 1, "deleted": 4, "unchanged": 0, "published": True}
    assert {name: result[name] for name in expected} == expected
    assert result["share"] == pytest.approx(6 / NUM_ITEMS)
    assert store.current() == result["generation"] == Path(result["path"]).name
    found = (
        Retriever.open(store.path(result["generation"]))
        .retrieve(Query(k=200, fields=["title", "year"]))
        .items
    )
    told = {item["item_id"]: item for item in found}
    assert len(told) == NUM_ITEMS + 1 - 4
    assert (told["1003"]["title"], told["5001"]["year"]) == ("Other", 2032)

    before = content(store)
    code, again, _ = run(*files, "--delete-id", "1012", "1013")
    assert (code, again["generation"], again["base"]) == (0, result["generation"], result["generation"])
    assert (again["added"], again["changed"], again["deleted"], again["unchanged"]) == (0, 0, 0, 6)
    assert content(store) == before


def test_the_job_without_publishing_and_other_pointers(run: Any, store: Store) -> None:
    code, result, _ = run("--delete-id", "1001", "--no-publish")
    assert (code, result["published"], store.current()) == (0, False, "g1")
    assert store.has(result["generation"])
    code, _, err = run("--delete-id", "1001", "--pointer", "candidate")
    assert code == 2
    assert "candidate of" in err
    assert "names no generation to update" in err
    store.publish("g1", "candidate")
    code, published, _ = run("--delete-id", "1001", "--pointer", "candidate")
    # What is there already is published, not made again.
    assert published["generation"] == result["generation"]
    assert store.pointers() == {"CURRENT": "g1", "candidate": result["generation"]}
    assert run()[0] == 2
    code, _, err = run("--delete-id", "nothing")
    assert code == 2
    assert "--ignore-missing" in err
    code, result, _ = run("--delete-id", "nothing", "--ignore-missing")
    assert (code, result["unchanged"], result["generation"]) == (0, 1, "g1")


def test_rows_with_missing_values_are_compared() -> None:
    nan, names = float("nan"), ["x", "y"]
    first = pa.table([[1.0, nan, None, nan, 2.0], [["a"], [], None, ["b"], ["a"]]], names=names)
    second = pa.table([[1.0, nan, None, 0.0, 2.0], [["a"], [], None, ["b"], []]], names=names)
    assert equal_rows(first, second).tolist() == [True, True, True, False, False]


def test_an_index_recall_below_the_target_is_published_with_force_only(store: Store) -> None:
    edit_index(store.path("g1"), index_recall=0.5)
    before = content(store)
    with pytest.raises(RefusedError, match="is not published"):
        update_items(store, None, ["1001"])
    assert content(store) == before
    assert update_items(store, None, ["1001"], force=True).published


def _twice(items: dict[str, Item]) -> list[Item]:
    return [items["1001"], items["1002"], {**items["1001"], "year": 1999}]


BAD: list[tuple[str, Callable[[dict[str, Item], Path], tuple[Any, list[str]]], type[Exception], str]] = [
    ("an id twice", lambda i, g: (table_of(_twice(i), g), []), DataError, "'1001' are given more than once"),
    ("a deletion twice", lambda i, g: (None, ["1001", "1001"]), DataError, "are deleted more than once"),
    ("both", lambda i, g: (table_of([i["1001"]], g), ["1001"]), DataError, "both given and deleted"),
    ("unknown deletions", lambda i, g: (None, ["1001", "x", "y"]), DataError, "2 of 3 items to delete"),
    ("everything deleted", lambda i, g: (None, list(i)), DataError, "deletes every item"),
    (
        "no feature column",
        lambda i, g: (table_of([i["1001"]], g).drop_columns(["genres"]), []),
        DataError,
        "needs column 'genres'",
    ),
    (
        "no attribute column",
        lambda i, g: (table_of([i["1001"]], g).drop_columns(["brand"]), []),
        DataError,
        "no column 'brand'",
    ),
    (
        "text for a number",
        lambda i, g: (pa.Table.from_pylist([{**i["1001"], "year": "soon"}]), []),
        DataError,
        "year",
    ),
    (
        "an infinite number",
        lambda i, g: (pa.Table.from_pylist([{**i["1001"], "year": float("inf")}]), []),
        DataError,
        "year",
    ),
    (
        "text for an attribute's number",
        lambda i, g: (pa.Table.from_pylist([{**i["1001"], "rating": "good"}]), []),
        ConfigError,
        "column 'rating' of type string can not be read as number",
    ),
    (
        "a null id",
        lambda i, g: (table_of([{**i["1001"], "item_id": None}], g), []),
        DataError,
        "1 of 1 items given have no item_id",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("given", "error", "says"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_leaves_the_store_as_it_was(
    store: Store, items: dict[str, Item], given: Any, error: type[Exception], says: str
) -> None:
    before = content(store)
    table, deletes = given(items, store.path("g1"))
    with pytest.raises(error, match=says):
        update_items(store, table, deletes)
    assert content(store) == before
    assert update_items(store, None, ["1001"]).deleted == 1


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_vector_that_can_not_be_searched_leaves_the_store_as_it_was(
    store: Store, items: dict[str, Item], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    encode = TwoTower.encode_items
    monkeypatch.setattr(TwoTower, "encode_items", lambda self, batch: encode(self, batch) * value)
    before = content(store)
    with pytest.raises(ConfigError, match="zero" if value == 0 else "NaN|finite"):
        update_items(store, table_of([{**items["1001"], "year": 1999}], store.path("g1")))
    assert content(store) == before


def test_files_that_can_not_be_read_as_items(run: Any, store: Store, tmp_path: Path) -> None:
    before = content(store)
    pacsv.write_csv(pa.table({"item": [1, 1], "genres": ["War", "War"]}), tmp_path / "twice.csv")
    pacsv.write_csv(pa.table({"genres": ["War"]}), tmp_path / "no-id.csv")
    for name, says in (("twice.csv", "'1'"), ("no-id.csv", "'item'"), ("nothing.csv", "nothing.csv")):
        code, _, err = run("--items", str(tmp_path / name))
        assert code == 2
        assert says in err
    assert content(store) == before


def test_towers_of_another_training_are_refused(
    shop: tuple[Config, Dataset, Path], store: Store, items: dict[str, Item], tmp_path: Path
) -> None:
    other = fresh_checkpoint(shop[0], shop[1], tmp_path / "other", seed=4)
    table = table_of([{**items["1001"], "year": 1999}], store.path("g1"))
    model = store.path("g1") / "model"
    kept = tmp_path / "kept"
    shutil.copytree(model, kept)
    # The weights alone, and then with their manifest.
    for names in (["model.safetensors"], [p.name for p in other.path.iterdir()]):
        for name in names:
            shutil.copyfile(other.path / name, model / name)
        before = content(store)
        with pytest.raises((ArtefactMismatchError, ArtefactError)):
            update_items(store, table)
        assert content(store) == before
        shutil.rmtree(model)
        shutil.copytree(kept, model)
    update = update_items(store, table)
    path = store.path(update.generation)
    assert (
        Checkpoint.open(path / "model").fingerprint
        == Generation.open(path).manifest["checkpoint_fingerprint"]
    )
    # A delta that says it is of other towers is refused when it is opened.
    write_shard_facts(path / "shards" / "delta", 1, other.fingerprint, "Flat")
    with pytest.raises(ArtefactMismatchError, match="different trainings do not fit"):
        Generation.open(path, verify=False)


def test_of_two_updaters_one_wins_and_the_other_says_so(
    store: Store, items: dict[str, Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    both_ready = threading.Barrier(2, timeout=60)
    publish = Store.publish

    def publish_together(self: Store, *args: Any, **kwargs: Any) -> str | None:
        both_ready.wait()
        return publish(self, *args, **kwargs)

    monkeypatch.setattr(Store, "publish", publish_together)
    changed = table_of(
        [{**items["1001"], "year": 1999}, {**items["1002"], "item_id": "5001"}], store.path("g1")
    )
    outcomes: dict[str, Any] = {}

    def update(name: str, *args: Any) -> None:
        try:
            outcomes[name] = update_items(store, *args)
        except RefusedError as error:
            outcomes[name] = error

    threads = [
        threading.Thread(target=update, args=("changes", changed)),
        threading.Thread(target=update, args=("deletes", None, ["1003"])),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    lost = [o for o in outcomes.values() if isinstance(o, RefusedError)]
    won = [o for o in outcomes.values() if not isinstance(o, RefusedError)]
    assert (len(won), len(lost)) == (1, 1)
    assert f"names {won[0].generation}" in str(lost[0])
    assert store.current() == won[0].generation
    assert set(store.generations()) == {"g1", won[0].generation}
    assert [p.name for p in (store.root / "generations").iterdir() if not p.name.endswith(".lock")] in (
        ["g1", won[0].generation],
        [won[0].generation, "g1"],
    )
    # The loser tries again, on what the winner made.
    update_items(store, changed)
    update_items(store, None, ["1003"])
    final = Generation.open(store.path(str(store.current())))
    assert final.num_items == NUM_ITEMS


def test_what_is_shared_is_not_written_again(store: Store, items: dict[str, Item]) -> None:
    update = update_items(store, table_of([{**items["1001"], "year": 1999}], store.path("g1")), ["1002"])
    base, made = store.path("g1"), store.path(update.generation)
    files = Generation.open(made).manifest["files"]
    own = {name for name in files if not (base / name).exists() or not (made / name).samefile(base / name)}
    assert own == {"tombstones.npy"} | {name for name in files if name.startswith("shards/delta/")}
    # A prune of the base leaves what the update holds.
    store.prune(1)
    assert store.generations() == [update.generation]
    Generation.open(made)


def test_updates_that_cancel_out_answer_as_the_build_does(store: Store, items: dict[str, Item]) -> None:
    answers = Retriever.open(store.path("g1")).retrieve(Query(k=200, user_id="3", exclude_seen=False)).items
    update_items(store, table_of([{**items["1001"], "year": 1999}], store.path("g1")), ["1002"])
    update_items(store, table_of([items["1002"]], store.path("g1")))
    last = update_items(store, table_of([items["1001"]], store.path("g1")))
    again = Retriever.open(store.path(last.generation)).retrieve(
        Query(k=200, user_id="3", exclude_seen=False)
    )
    assert [i["item_id"] for i in again.items] == [i["item_id"] for i in answers]
    np.testing.assert_allclose([i["score"] for i in again.items], [i["score"] for i in answers], atol=1e-6)
