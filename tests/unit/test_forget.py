"""Users who are forgotten: nothing of them is left, everybody else is answered as before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from jobs import forget as job
from tests.forgetting import (
    COLOUR,
    GONE,
    HISTORY,
    ITEM,
    answers,
    copy_of,
    dataset_of,
    files_with,
    make_shop,
    others,
    successors,
)
from tests.generations import plain_generation
from tests.updates import content, write_config
from twotower.artefacts import locked, read_manifest
from twotower.config import Config
from twotower.data.prepare import prepare
from twotower.errors import DataError, RefusedError
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.lifecycle.forget import REQUEST, forget_users
from twotower.lifecycle.update import update_items
from twotower.model.checkpoint import Checkpoint
from twotower.retrieval.query import Query
from twotower.retrieval.retriever import Retriever


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict[str, str]]:
    """Before anybody is forgotten; do not change it."""
    return make_shop(tmp_path_factory.mktemp("made"))


@pytest.fixture
def shop(made: tuple[Config, dict[str, str]], tmp_path: Path) -> Config:
    """A copy, with its hard links."""
    return copy_of(made[0], tmp_path)


@pytest.fixture
def store(shop: Config) -> Store:
    return Store(shop.store)


def test_nothing_of_the_user_is_left(made: Any, shop: Config, store: Store) -> None:
    names = made[1]
    before = dataset_of(shop)
    row, item = before.user_ids.row(GONE), before.item_ids.row(ITEM)
    held = {Path(p).parts[0] for p in files_with(shop.home, GONE)}
    assert held == {"datasets", "recommendations", "store"}
    assert {Path(p).parts[0] for p in files_with(shop.home, COLOUR)} == {"checkpoints", "datasets", "store"}
    theirs = before.interactions.user_row == row
    seen = Generation.open(store.path("build")).seen(row)
    assert theirs.any()
    assert len(seen)
    expected = {
        ("dataset", before.path.name): {
            "users": 1,
            "interactions": int(theirs.sum()),
            "feature_values": 1,
            "item_ids": 1,
        },
        ("checkpoint", "first"): {"users": 1},
        ("checkpoint", "second"): {"users": 1},
        ("recommendations", "build-0123abcd"): {"users": 1, "rows": 4},
    }

    done = forget_users(shop, store, [GONE])
    assert (done.users, done.missing, done.left) == (1, 0, [])
    changes = {(c.kind, c.name): c.removed for c in done.changes if c.kind not in ("generation", "leftover")}
    assert changes == expected
    found = {c.name: c.removed for c in done.changes if c.kind == "generation"}
    assert {name: counts["seen_items"] for name, counts in found.items()} == {
        name: len(seen) for name in names.values()
    }

    assert files_with(shop.home, GONE, COLOUR, ITEM) == set()
    after = dataset_of(shop)
    assert len(after.interactions) == len(before.interactions) - theirs.sum()
    assert not (after.interactions.user_row == row).any()
    assert after.user_ids.id(row) == ""
    assert after.user_ids.row(GONE) is None
    assert after.user_ids.row("") is None
    assert after.user_table().slice(row, 1).to_pylist() == [{"user_id": "", "age": None, "group": None}]
    assert after.counts["interactions"] == len(after.interactions)
    assert after.counts["forgotten_users"] == 1
    assert set(successors(store)) == set(names.values())
    for name in store.generations():
        generation = Generation.open(store.path(name), verify=True)
        assert len(generation.seen(row)) == 0
        assert len(generation.histories.of_user(row)[0]) == 0
        assert generation.histories.cut is not None
        assert not generation.histories.cut[row]
        missing = {n: column[row].tolist() for n, column in generation.user_columns.items()}
        assert missing == {"age": [0.0, 1.0], "colour": [-1]}
        table = generation.checkpoint().model.tables["id_of_user"].detach().numpy()
        np.testing.assert_array_equal(table[row + 1], table[0])
    # Everything that is his in the model, and nothing else, is as for an unknown user.
    for name in ("first", "second"):
        old = safetensors.numpy.load_file(made[0].checkpoints / name / "model.safetensors")
        new = safetensors.numpy.load_file(shop.checkpoints / name / "model.safetensors")
        colour = next(f for f in before.schema.query if f.spec.name == "colour").values.index(COLOUR)
        own = {"tables.id_of_user": row + 1, "tables.query_colour": colour + 1}
        own["tables.id_of_item"] = item + 1
        for tensor, values in old.items():
            if tensor in own:
                assert not np.array_equal(values[own[tensor]], values[0])
                values[own[tensor]] = values[0]
            np.testing.assert_array_equal(new[tensor], values)
    assert read_manifest(shop.recommendations / "build-0123abcd", "recommendations")["num_rows"] == 36 * 4
    part = pq.ParquetFile(next((shop.recommendations / "build-0123abcd" / "parts").glob("part-0*")))
    assert part.schema_arrow.metadata[b"num_users"] == b"20"


@pytest.mark.slow
def test_everybody_else_is_answered_as_before(made: Any, shop: Config, store: Store) -> None:
    everybody = others(dataset_of(shop))
    names = list(made[1].values())
    before = {name: answers(store.path(name), everybody) for name in names}
    unknown = {name: answers(store.path(name), ["nobody"], history=HISTORY) for name in names}
    assert answers(store.path("build"), [GONE])[GONE][0] == "personal"
    forget_users(shop, store, [GONE])
    for old, new in successors(store).items():
        path = store.path(new)
        assert answers(path, everybody) == before[old]
        theirs = answers(path, [GONE, "", "nobody"], history=HISTORY)
        assert theirs[GONE] == theirs[""] == theirs["nobody"] == unknown[old]["nobody"]
        assert answers(path, [GONE])[GONE] == answers(path, ["nobody"])["nobody"]
        assert answers(path, [GONE])[GONE][0] == "popular"
        assert Retriever.open(path).retrieve(Query(k=1)).generation == new


def test_what_generations_share_stays_shared(made: Any, shop: Config, store: Store) -> None:
    names = made[1]

    def inodes(name: str) -> dict[str, int]:
        files = store.manifest(name)["files"]
        return {file: (store.path(name) / file).stat().st_ino for file in files}

    before = {name: inodes(name) for name in store.generations()}
    shared = {f for f, inode in before["build"].items() if before[names["update"]].get(f) == inode}
    assert {"user_ids.arrow", "model/model.safetensors", "shards/00000/index.faiss"} < shared
    forget_users(shop, store, [GONE])
    to = successors(store)
    after = {old: inodes(to[old]) for old in before}
    assert {f for f, i in after["build"].items() if after[names["update"]].get(f) == i} == shared
    large = {
        f for f in before["build"] if f.startswith(("shards/", "items/")) and not f.endswith("shard.json")
    }
    assert len(large) > 5
    assert {f for f, inode in after["build"].items() if before["build"][f] == inode} >= large
    update = store.manifest(to[names["update"]])
    assert update["delta"]["base"] == to["build"]


@pytest.mark.slow
def test_everything_still_fits_together(made: Any, shop: Config, store: Store) -> None:
    names = made[1]
    forget_users(shop, store, [GONE])
    to = successors(store)
    assert store.pointers() == {"CURRENT": to[names["update"]], "candidate": to["other"]}
    # What the same configuration prepared before is found, and is the forgotten one.
    dataset = prepare(shop)
    assert dataset.fingerprint == dataset_of(shop).fingerprint
    for name in ("first", "second"):
        checkpoint = Checkpoint.open(shop.checkpoints / name)
        checkpoint.require_dataset(dataset)
        assert checkpoint.dataset_fingerprint == dataset.fingerprint
    manifest = store.manifest(to["build"])
    assert manifest["vocabulary_hash"] == dataset.vocabulary_hash
    assert manifest["dataset_fingerprint"] == dataset.fingerprint
    first = Checkpoint.open(shop.checkpoints / "first")
    assert manifest["checkpoint_fingerprint"] == first.fingerprint
    plain_generation(shop, dataset, first, "again")
    built, kept = Generation.open(store.path("again")), Generation.open(store.path(to["build"]))
    for name, facts in built.manifest["files"].items():
        # Popularity is counted anew, without him.
        if name not in ("popularity.npy", "config.json"):
            assert facts == kept.manifest["files"][name], name
    store.publish("again", "next")
    # One step back from the update is the build, two are the other build.
    assert store.rollback().id == to["build"]
    assert store.rollback().id == to["other"]
    with pytest.raises(RefusedError, match="nothing to roll back"):
        store.rollback()
    store.publish(to["build"])
    update = update_items(store, deletes=["1003"])
    assert store.current() == update.generation
    assert (
        Retriever.open(store.path(update.generation)).retrieve(Query(user_id=GONE, k=3)).strategy == "popular"
    )
    # And again, after another user.
    forget_users(shop, store, ["14"])
    assert successors(store)["build"] == successors(store)[to["build"]]
    assert store.rollback().id == successors(store)["build"]
    assert dataset_of(shop).counts["forgotten_users"] == 2


def test_twice_is_once(shop: Config, store: Store) -> None:
    forget_users(shop, store, [GONE, "14"])
    before = content_of(shop.home)
    with pytest.raises(DataError, match=r"2 of 2 users are known nowhere .*'zz-erase-me-4711', '14'"):
        forget_users(shop, store, [GONE, "14"])
    done = forget_users(shop, store, [GONE, "14", "never"], ignore_missing=True)
    assert (done.users, done.missing, done.changes) == (3, 3, [])
    assert content_of(shop.home) == before


def content_of(root: Path) -> dict[str, bytes]:
    """All files but locks, by path."""
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file() and not p.name.endswith(".lock")
    }


def test_a_dry_run_and_unknown_ids_change_nothing(shop: Config, store: Store) -> None:
    before = content_of(shop.home)
    dry = forget_users(shop, store, [GONE], dry_run=True)
    with pytest.raises(DataError, match="1 of 2 users are known nowhere.*'never'"):
        forget_users(shop, store, [GONE, "never"])
    assert content_of(shop.home) == before
    done = forget_users(shop, store, [GONE, "never"], ignore_missing=True)
    assert done.missing == 1
    assert [c for c in done.changes if c.kind != "leftover"] == dry.changes


def test_a_dataset_of_nobody_else_is_refused(shop: Config, store: Store) -> None:
    before = content_of(shop.home)
    with pytest.raises(DataError, match="has interactions of these users only; delete the directory"):
        forget_users(shop, store, [GONE, *others(dataset_of(shop))])
    assert content_of(shop.home) == before


def test_what_killed_runs_left_is_gone(shop: Config, store: Store) -> None:
    for folder in (shop.datasets, shop.checkpoints, shop.reports, shop.recommendations):
        (folder / ".x.partial").mkdir(parents=True)
        (folder / ".x.partial" / "data").write_text(GONE)
    (shop.checkpoints / ".runs" / "train-0" / "checkpoint").mkdir(parents=True)
    for name in ("generations/.y.partial", "generations/.z.pruned", ".work/w-build"):
        (store.root / name).mkdir(parents=True)
        (store.root / name / "data").write_text(GONE)
    done = forget_users(shop, store, [GONE])
    assert files_with(shop.home, GONE) == set()
    left = {c.name for c in done.changes if c.kind == "leftover"}
    assert {
        "datasets/.x.partial",
        "checkpoints/.runs/train-0",
        "generations/.y.partial",
        ".work/w-build",
    } <= left


@pytest.mark.parametrize("lock", ["store/.work/0abc.lock", "datasets/.x.prepare.lock", "reports/.r.lock"])
def test_who_is_at_work_is_waited_for(shop: Config, store: Store, lock: str) -> None:
    before = content_of(shop.home)
    with locked(shop.home / lock), pytest.raises(RefusedError, match="other processes are at work on"):
        forget_users(shop, store, [GONE])
    assert content_of(shop.home) == before


def test_what_was_made_before_is_not_published_again(made: Any, shop: Config, store: Store) -> None:
    """A build that ended later, one that was copied back, and a dataset prepared again from the raw files."""
    forget_users(shop, store, [GONE])
    current = store.current()
    shutil.copytree(made[0].store / "generations" / "build", store.path("build"))
    with pytest.raises(RefusedError, match="made with users who have been forgotten since"):
        store.publish("build")
    assert store.current() == current
    # Who knows better may.
    store.publish("build", force=True)
    assert store.publications()[-1].reasons[0].startswith("it was made with users")
    # The next run finds it, whatever is left of the dataset.
    forget_users(shop, store, [GONE])
    assert store.current() == successors(store)["build"]
    assert files_with(shop.home, GONE, COLOUR, ITEM) == set()


@pytest.mark.slow
def test_a_publisher_in_between_is_seen_or_refused(
    shop: Config, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update that has built and not yet published, and a publisher between looking and swapping."""
    late: list[Any] = []

    class Slow(Store):
        """Users are forgotten when everything is built, and before it is published."""

        def publish(self, *args: Any, **kwargs: Any) -> Any:
            late.append(args)
            with pytest.raises(RefusedError, match="come between again and again"):
                forget_users(shop, store, [GONE])
            return super().publish(*args, **kwargs)

    monkeypatch.setattr("twotower.lifecycle.forget.busy", lambda *_: [])
    with pytest.raises(RefusedError, match="made with users"):
        update_items(Slow(store.root), deletes=["1007"])
    assert late
    # Neither has left it half done: the pointer is past him, and the next run does what was asked for.
    assert GONE not in Generation.open(store.path(str(store.current()))).user_ids
    assert GONE in dataset_of(shop).user_ids
    forget_users(shop, store, [])
    assert files_with(shop.home, GONE) == set()

    # One that gets in after the forgetter has looked is forgotten in the next round.
    plain, calls = Store.succeed, []

    def succeed(self: Store, *names: str) -> Any:
        if not calls:
            calls.append(names)
            store.rollback()
        return plain(self, *names)

    monkeypatch.setattr(Store, "succeed", succeed)
    before = store.current()
    forget_users(shop, store, ["14"])
    assert calls
    assert store.current() not in (None, before)
    assert files_with(shop.home, GONE) == set()
    for name in store.generations():
        assert "14" not in Generation.open(store.path(name)).user_ids


def test_a_checkpoint_without_its_dataset(shop: Config, store: Store) -> None:
    """A generation of the same vocabulary says whose rows are whose; without one nobody can."""
    shutil.rmtree(dataset_of(shop).path)
    done = forget_users(shop, store, [GONE])
    assert {c.kind for c in done.changes} >= {"checkpoint", "generation"}
    assert done.left == []
    assert files_with(shop.home, GONE, COLOUR, ITEM) == set()
    build = Generation.open(store.path(successors(store)["build"]))
    assert build.manifest["checkpoint_fingerprint"] == Checkpoint.open(shop.checkpoints / "first").fingerprint
    shutil.rmtree(shop.store)
    shutil.rmtree(shop.recommendations)
    done = forget_users(shop, store, ["14"], ignore_missing=True)
    assert [sentence.split(" is of a vocabulary")[0] for sentence in done.left] == [
        f"checkpoint {shop.checkpoints / name}" for name in ("first", "second")
    ]


@pytest.fixture
def run(shop: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    file = write_config(shop, tmp_path / "config.yaml")

    def call(*arguments: str) -> tuple[int, dict[str, Any], str]:
        code = job.main(["--config", str(file), *arguments])
        out, err = capsys.readouterr()
        return code, {} if code else json.loads(out.splitlines()[-1].partition(" ")[2]), out + err

    return call


def test_the_job(run: Any, shop: Config, store: Store, tmp_path: Path) -> None:
    assert run()[0] == 2
    pacsv.write_csv(pa.table({"user": [GONE, "14", GONE]}), tmp_path / "gone.csv")
    pq.write_table(pa.table({"user": [14, 15]}), tmp_path / "gone.parquet")
    code, result, shown = run("--users", str(tmp_path / "gone.csv"), "--dry-run")
    assert code == 0, shown
    assert (result["dry_run"], result["users"]) == (True, 2)
    assert "would be removed" in shown
    assert "not reached: the raw data" in shown
    assert files_with(shop.home, GONE)
    code, result, shown = run("--users", str(tmp_path / "gone.csv"))
    assert code == 0, shown
    assert {change["kind"] for change in result["changes"]} >= {"dataset", "checkpoint", "generation"}
    # Ids are not repeated to people or to logs.
    assert GONE not in shown
    assert files_with(shop.home, GONE) == set()
    code, _, shown = run("--users", str(tmp_path / "gone.parquet"))
    assert code == 2
    assert "'14'" in shown
    assert run("--users", str(tmp_path / "gone.parquet"), "--ignore-missing")[0] == 0
    assert "15" not in dataset_of(shop).user_ids
    assert not (shop.home / REQUEST).exists()
    assert content(store)
