"""An update that is killed at any point: nothing has changed, and the same update done again finishes it."""

from __future__ import annotations

import json
import signal

import pytest

from tests.apart import run_apart
from tests.shop import NUM_ITEMS, build_store
from tests.updates import content
from twotower.config import Config
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.lifecycle.update import update_items

pytestmark = pytest.mark.slow

# The updater kills itself before it renames something to the name in the last argument, if there is one.
UPDATER = """
import os, signal, sys
from pathlib import Path
import pyarrow as pa
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.lifecycle.update import update_items

_, root, fatal = sys.argv

def watch(event, arguments):
    if fatal and event == "os.rename" and Path(os.fspath(arguments[1])).name == fatal:
        os.kill(os.getpid(), signal.SIGKILL)

store = Store(root)
items = Generation.open(store.path("g1"), verify=False).items
some = items.table([4, 7]).to_pylist()
given = [{**some[0], "year": 2031}, {**some[1], "item_id": "5001"}]
sys.addaudithook(watch)
update_items(store, pa.Table.from_pylist(given, items.schema), ["1001", "1002"])
print(store.current())
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return build_store(tmp_path_factory.mktemp("killed"))[0]


def test_a_killed_update_changes_nothing_and_is_finished_by_the_next_one(shop: Config) -> None:
    store = Store(shop.store)
    before = content(store)
    for name in ("tombstones.npy", "index.faiss", "item_rows.npy", "shard.json", "manifest.json"):
        done = run_apart(UPDATER, store.root, name)
        assert done.returncode == -signal.SIGKILL, (name, done.stderr)
        assert content(store) == before, name
        assert (store.current(), store.generations()) == ("g1", ["g1"])

    # Finished, but not published.
    done = run_apart(UPDATER, store.root, "CURRENT")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert store.current() == "g1"
    (name,) = set(store.generations()) - {"g1"}
    Generation.open(store.path(name), verify=True)

    done = run_apart(UPDATER, store.root, "")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == name == store.current()
    generation = Generation.open(store.path(name), verify=True)
    assert generation.num_items == NUM_ITEMS + 1 - 2
    assert {k: v for k, v in content(store).items() if k in before} == {
        **before,
        "CURRENT": content(store)["CURRENT"],
        "publications.jsonl": content(store)["publications.jsonl"],
    }
    # What the killed ones left beside it is gone with the one that finished.
    assert not [p for p in (store.root / "generations").iterdir() if p.name.endswith(".partial")]
    assert json.loads((store.root / "publications.jsonl").read_text().splitlines()[-1])["id"] == name
    assert update_items(store, None, ["1001", "1002"]).unchanged == 2
