"""A shop with a user who is to be forgotten, and where to look for him."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from tests.generations import plain_generation
from tests.shop import fresh_checkpoint, make_config, write_files
from twotower.artefacts import write_manifest
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.generations.store import Store
from twotower.lifecycle.update import update_items
from twotower.retrieval.query import HistoryItem, Query
from twotower.retrieval.retriever import Retriever

GONE = "zz-erase-me-4711"
"""Id of the user; nobody else is called anything like it."""
COLOUR = "chartreuse-of-4711"
"""Value of a feature that he alone has."""
ITEM = "zz-only-bought-by-4711"
"""Id of an item outside the catalogue that he alone has had."""
_WAS = "13"


def make_files(root: Path) -> Config:
    """Write the raw files, and return their configuration."""
    write_files(root / "files")
    for name in ("interactions", "users"):
        path = root / "files" / f"{name}.csv"
        table = pacsv.read_csv(path)
        ids = table.column("user").cast(pa.string())
        his = pc.equal(ids, _WAS)
        table = table.set_column(0, "user", pc.if_else(his, GONE, ids))
        if name == "interactions":
            table = table.set_column(1, "item", table.column("item").cast(pa.string()))
            own = {"user": [GONE], "item": [ITEM], "time": [1_700_000_000], "event": ["like"]}
            table = pa.concat_tables([table, pa.table(own)])
        if name == "users":
            table = table.set_column(2, "group", pc.if_else(his, COLOUR, table.column("group")))
        pacsv.write_csv(table, path)
    values = make_config(root).to_json()
    values["index"]["attributes"] = {"year": {}}
    return parse_config(values)


def fill(config: Config, store: Store, dataset: Dataset) -> dict[str, str]:
    """Make two builds, an update of the first, and publish all; returns the ids by build, update, other."""
    first = fresh_checkpoint(config, dataset, config.checkpoints / "first")
    second = fresh_checkpoint(config, dataset, config.checkpoints / "second", seed=4)
    plain_generation(config, dataset, second, "other")
    plain_generation(config, dataset, first, "build")
    store.publish("other")
    store.publish("build")
    update = update_items(store, deletes=["1001", "1002"]).generation
    store.publish("other", "candidate")
    return {"build": "build", "update": update, "other": "other"}


def lists_of(config: Config, generation: Path) -> Path:
    """The top 4 of all users, in two files, as the job leaves them."""
    retriever = Retriever.open(generation)
    ids = [i for i in Dataset.open(next(config.datasets.glob("files-*"))).user_ids.array.to_pylist() if i]
    directory = config.recommendations / f"{generation.name}-0123abcd"
    (directory / "parts").mkdir(parents=True)
    num_rows = 0
    for number, users in enumerate((ids[:20], ids[20:])):
        answers = retriever.retrieve_batch([Query(user_id=i, k=4) for i in users])
        rows = [
            {"user_id": i, "rank": rank, "item_id": item["item_id"], "score": item["score"]}
            for i, answer in zip(users, answers, strict=True)
            for rank, item in enumerate(answer.items, 1)
        ]
        table = pa.Table.from_pylist(rows).replace_schema_metadata({"num_users": str(len(users))})
        pq.write_table(table, directory / "parts" / f"part-{number}.parquet", compression="zstd")
        num_rows += len(rows)
    write_manifest(directory, "recommendations", {"id": directory.name, "num_rows": num_rows})
    return directory


def make_shop(root: Path) -> tuple[Config, dict[str, str]]:
    """Everything that is made from the files; returns the configuration and ids of generations."""
    config = make_files(root)
    store = Store(config.store)
    names = fill(config, store, prepare(config))
    lists_of(config, store.path("build"))
    return config, names


def files_with(root: Path, *needles: str) -> set[str]:
    """Files below a folder that hold one of the texts, as they are and in Parquet."""
    found = set()
    for path in (p for p in sorted(root.rglob("*")) if p.is_file()):
        texts = [path.read_bytes()]
        if path.suffix == ".parquet":
            with contextlib.suppress(pa.ArrowInvalid):
                texts.append(str(pq.read_table(path).to_pydict()).encode())
        if any(n.encode() in text for n in needles for text in texts):
            found.add(path.relative_to(root).as_posix())
    return found


def answers(path: Path, users: Iterable[str], **query: Any) -> dict[str, Any]:
    """What a generation answers to users, by id; unknown ones ask with a history too."""
    retriever = Retriever.open(path)
    at = 1_800_000_000_000_000
    found = {
        user: retriever.retrieve(Query(user_id=user, k=200, at=at, fields=["title"], **query))
        for user in users
    }
    return {user: (answer.strategy, answer.items) for user, answer in found.items()}


HISTORY = [HistoryItem("1005"), HistoryItem("1040", weight=0.5)]


def others(dataset: Dataset) -> list[str]:
    """Ids of everybody else."""
    return [i for i in dataset.user_ids.array.to_pylist() if i not in (GONE, "")]


def trained_row(table: np.ndarray, row: int) -> np.ndarray:
    """The embedding of a user row."""
    return table[row + 1]


def copy_of(config: Config, root: Path) -> Config:
    """A copy of everything, with its hard links."""
    first: dict[int, str] = {}

    def link(source: str, target: str) -> str:
        inode = os.stat(source).st_ino
        if inode in first:
            os.link(first[inode], target)
        else:
            first[inode] = shutil.copy2(source, target)
        return target

    shutil.copytree(config.home, root / "runs" / config.name, copy_function=link)
    values = config.to_json()
    values["storage"]["root"] = str(root / "runs")
    return parse_config(values)


def dataset_of(config: Config) -> Dataset:
    """The one dataset there is."""
    return Dataset.open(next(config.datasets.glob("files-*")))


def successors(store: Store) -> dict[str, str]:
    """The generation that stands in the place of each."""
    return {old: name for name in store.generations() for old in store.manifest(name).get("replaces", [])}
