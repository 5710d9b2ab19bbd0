"""Catalogues that change, for the tests of updates: items, stores, and what a store holds."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from twotower.config import Config, parse_config
from twotower.generations.generation import Generation
from twotower.generations.store import Store

Item = dict[str, Any]


def copied(config: Config, root: Path) -> Config:
    """A configuration whose store is a copy of another's."""
    values = config.to_json()
    values["storage"]["root"] = str(root)
    copy = parse_config(values)
    shutil.copytree(config.store, copy.store)
    return copy


def items_of(generation: Path) -> dict[str, Item]:
    """The items of a generation without updates, by id, in stored form."""
    opened = Generation.open(generation)
    return {item["item_id"]: item for item in opened.items.table(sorted(opened.base_rows())).to_pylist()}


def table_of(items: list[Item], generation: Path) -> pa.Table:
    """Items as what an update takes."""
    return pa.Table.from_pylist(items, Generation.open(generation, verify=False).items.schema)


def content(store: Store) -> dict[str, str]:
    """SHA-256 of every file that readers of a store could see, by path."""
    files = [p for p in sorted(store.root.rglob("*")) if p.is_file()]
    named = {str(p.relative_to(store.root)): p for p in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in named.items()
        if not any(part.startswith(".") for part in Path(name).parts)
    }


def write_config(config: Config, path: Path) -> Path:
    """The configuration as a file."""
    path.write_text(yaml.safe_dump(config.to_json()))
    return path
