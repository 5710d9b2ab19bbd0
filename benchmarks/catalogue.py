"""Published generations of generated catalogues with trained towers, kept for the next run.

What they are made of names them, as in any pipeline, so a change of the code of a stage that changes its
result also changes the name; what is there already is taken as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.delta import DIM, configuration
from twotower.cluster.build import build_generation
from twotower.cluster.train import train
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.generations.generation import Generation
from twotower.generations.store import Store
from twotower.index.choice import choose

WORK = Path(__file__).parents[1] / "runs" / "benchmarks"
_HISTORY = 20
SEQUENCE_DIM, SEQUENCE_LENGTH = 64, 50


@dataclass(frozen=True)
class Catalogue:
    """A store whose pointer names the generation of one catalogue."""

    config: Config
    dataset: Dataset
    generation: Path

    @property
    def index(self) -> dict[str, Any]:
        """Facts of the index from the manifest."""
        return dict(Generation.open(self.generation, verify=False).manifest["index"])


def catalogue(
    name: str,
    num_items: int,
    factory: str,
    configured: Callable[[Path, int], Config] = configuration,
) -> Catalogue:
    """Return a catalogue that is built and published, building what is not there yet.

    Args:
        name: of the folder below the work folder.
        num_items: items.
        factory: FAISS factory string of each shard.
        configured: makes the configuration from the folder and the number of items; by default there are as
            many interactions as items, and a fortieth of the users.
    """
    values = configured(WORK / name, num_items).to_json()
    values["name"] = f"items-{num_items}"
    values["index"]["factory"] = factory
    config = parse_config(values)
    dataset = prepare(config)
    generation = build_generation(config, dataset, train(config, dataset, fit="all", epochs=1))
    store = Store(config.store)
    if store.current() != generation.name:
        store.publish(generation.name)
    return Catalogue(config, dataset, generation)


def disjoint_catalogues(name: str, num_items: int, dim: int) -> list[Catalogue]:
    """Return two generations of one store that have users, but no item, in common.

    Args:
        name: of the folder below the work folder.
        num_items: items of each.
        dim: embedding_dim.
    """
    made = []
    for prefix, seed in (("a", 1), ("b", 2)):
        values = configuration(WORK / name, num_items).to_json()
        values["data"]["source"]["seed"] = seed
        values["model"]["embedding_dim"] = dim
        drawn = prepare(parse_config(values))
        values["name"] = f"items-{num_items}"
        values["data"]["source"] = _with_other_ids(drawn, drawn.path / "files", prefix)
        config = parse_config(values)
        dataset = prepare(config)
        generation = build_generation(config, dataset, train(config, dataset, fit="all", epochs=1))
        made.append(Catalogue(config, dataset, generation))
    return made


def _with_other_ids(dataset: Dataset, folder: Path, prefix: str) -> dict[str, Any]:
    """Write a dataset as files, every item id behind a prefix, and return their source section."""
    folder.mkdir(exist_ok=True)
    log = dataset.interactions
    ids = pc.binary_join_element_wise(prefix, dataset.item_ids.array, "")
    users = np.repeat(np.arange(dataset.num_users), np.diff(log.user_offsets))
    table = {"user": dataset.user_ids.array.take(users), "item": ids.take(log.item_row), "time": log.time}
    pq.write_table(pa.table(table), folder / "interactions.parquet")
    items = dataset.item_table()
    place = items.column_names.index("item_id")
    renamed = pc.binary_join_element_wise(prefix, items["item_id"], "")
    pq.write_table(items.set_column(place, "item_id", renamed), folder / "items.parquet")
    return {
        "kind": "files",
        "interactions": str(folder / "interactions.parquet"),
        "columns": {"user": "user", "item": "item", "time": "time", "time_unit": "us"},
        "items": {"path": str(folder / "items.parquet"), "id": "item_id", "title": "title"},
    }


def chosen_factory(num_items: int, dim: int = DIM) -> str:
    """Return the factory string that auto picks for a catalogue of vectors of a width."""
    return choose(configuration(WORK, num_items).index, num_items, dim).factory


def sequence_configuration(root: Path, num_items: int) -> Config:
    """Return a catalogue whose queries are histories read by a transformer, most of them of full length.

    Its users have 80 items each on average, and a quarter as many in all as there are items: what is trained
    matters little to what a request takes.
    """
    values = configuration(root, num_items).to_json()
    values["data"]["source"] |= {"num_interactions": num_items // 4, "num_users": num_items // 320}
    values["features"]["query"] = [
        {
            "name": "history",
            "type": "history",
            "dim": SEQUENCE_DIM,
            "max_length": SEQUENCE_LENGTH,
            "pooling": "transformer",
            "transformer": {"blocks": 2},
        }
    ]
    values["features"]["item"][0]["dim"] = SEQUENCE_DIM
    tower = {"hidden": [], "norm": "none", "dropout": 0.0, "residual": "id"}
    values["model"] = {"embedding_dim": SEQUENCE_DIM, "query_tower": tower, "item_tower": tower}
    return parse_config(values)


def requests(
    dataset: Dataset, k: int, count: int = 1_000, seed: int = 0, length: int = _HISTORY
) -> list[dict[str, Any]]:
    """Return requests of users drawn at random: half name the user, half bring his latest items instead.

    Args:
        dataset: of the users.
        k: items wanted.
        count: of requests.
        seed: of the draw.
        length: most items that a request brings.
    """
    rng = np.random.default_rng(seed)
    log = dataset.interactions
    found: list[dict[str, Any]] = []
    for row in rng.integers(0, dataset.num_users, count).tolist():
        if len(found) % 2:
            found.append({"user_id": dataset.user_ids.id(row), "k": k})
            continue
        end = int(log.user_offsets[row + 1])
        begin = max(int(log.user_offsets[row]), end - length)
        found.append({"history": dataset.item_ids.ids(log.item_row[begin:end]), "k": k})
    return found


def write_bodies(path: Path, bodies: list[dict[str, Any]]) -> Path:
    """Write requests as JSON, one a line, and return the path."""
    path.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    return path
