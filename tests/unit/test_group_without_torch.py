"""A replica of a shard group needs no torch: it starts sooner and takes less memory without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.shop import build_store
from twotower.retrieval.generation import Generation
from twotower.retrieval.groups import GroupQuery, ShardGroup, pack_search
from twotower.retrieval.store import CURRENT

SEARCH = f"""
import json, sys
import serve.group
from twotower.retrieval.groups import answer, unpack_hits
from twotower.retrieval.holder import GroupHolder
from twotower.retrieval.store import store_at

holder = GroupHolder(store_at(sys.argv[1]), 0, 1)
holder.begin("{CURRENT}")
(name,) = holder.held
(hits,) = unpack_hits(answer(bytes.fromhex(sys.argv[2]), holder.held), name)
loaded = [m for m in ("torch", "faiss") if m in sys.modules]
print(json.dumps([name, hits.item_rows.tolist(), loaded]))
"""


def test_a_group_holds_and_searches_a_generation_without_torch(tmp_path: Path) -> None:
    config, _, path = build_store(tmp_path)
    generation = Generation.open(path)
    vector = generation.searcher().vectors([5])
    query = GroupQuery(7, np.array([5], np.int64), {"genres": {"any_of": ["War"]}})
    message = pack_search(generation.id, vector, [query])
    (expected,) = ShardGroup(generation, generation.shard_names).search(vector, [query])
    done = subprocess.run(
        [sys.executable, "-c", SEARCH, str(config.store), message.hex()],
        capture_output=True,
        text=True,
        check=True,
    )
    name, item_rows, loaded = json.loads(done.stdout)
    assert (name, loaded) == (generation.id, ["faiss"])
    assert item_rows == expected.item_rows.tolist() != []
