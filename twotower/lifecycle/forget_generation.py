"""A generation without some users: another generation, which shares all that is not theirs.

A generation never changes, so that what reads one never sees two contents mixed, and an id says which content
answered. The one without the users has an id of its own, which follows from the id of the other and the
vocabulary that is left: a run that was killed finds what it made. Its manifest says in whose place it stands
(``replaces``), so that publications go on without being rewritten.

Item popularity stays, as a sum over all users. Scores of popular items follow the seen sets that are left.

Symbols: U users.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.artefacts import building, fingerprint, link_or_copy, locked, read_manifest, write_manifest
from twotower.data.forget import Erasure
from twotower.data.histories import without_users
from twotower.data.vocabulary import Vocabulary, vocabulary_hash
from twotower.errors import ArtefactError
from twotower.generations.files import (
    FACTS,
    HISTORY_CUT,
    ITEM_IDS,
    KIND,
    column_file,
    file_facts,
    read_shard_facts,
    write_shard_facts,
)
from twotower.generations.generation import Generation
from twotower.generations.prune import WORK
from twotower.generations.store import Store
from twotower.index.parts import save_array
from twotower.model.features import encode_columns
from twotower.model.forget import forget_in_checkpoint

_PERSONAL = ("user_ids.arrow", "users/", "model/")
"""Beginnings of the names of files that are of users, or that name the vocabulary."""


def erasure_of(generation: Generation, ids: Sequence[str]) -> Erasure | None:
    """Return what has to go from a generation, by what it holds; None where it knows none of the users."""
    rows = generation.user_ids.rows(ids, missing="negative")
    rows = np.unique(rows[rows >= 0])
    if not len(rows):
        return None
    user_ids = generation.user_ids.without(rows)
    # Updates add items behind those of the dataset.
    item_rows = _unseen(generation, user_ids.forgotten)
    item_ids = Vocabulary(generation.item_ids.array.slice(0, generation.schema.num_items)).without(item_rows)
    gone = np.zeros(len(user_ids), np.bool_)
    gone[user_ids.forgotten] = True
    values = {}
    for feature in generation.schema.query:
        if feature.spec.rows_are("query") == "values":
            column = generation.user_columns[feature.spec.name]
            own = np.setdiff1d(column[gone], column[~gone])
            values[feature.spec.name] = frozenset((feature.values or [])[i - 1] for i in own if i > 0)
    manifest = generation.manifest
    dataset = str(manifest["dataset_fingerprint"])
    hashes = str(manifest["vocabulary_hash"]), vocabulary_hash(user_ids, item_ids)
    return Erasure(len(rows), user_ids.forgotten, *hashes, item_rows, values, dataset, dataset)


def _unseen(generation: Generation, users: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the rows of items outside the catalogue that nobody has seen but some users: ascending."""
    _, stays = without_users(generation.seen_offsets, users)
    seen = np.unique(generation.seen_item_rows[stays])
    outside = np.arange(generation.schema.num_catalogue_items, generation.schema.num_items)
    return np.setdiff1d(outside, seen)


def blank_items(generation: Generation, erasure: Erasure) -> npt.NDArray[np.int64]:
    """Return the item rows whose ids go from a generation; what updates put into its catalogue stays."""
    return np.setdiff1d(erasure.item_rows, generation.answerable_rows())


def successor_id(generation_id: str, erasure: Erasure) -> str:
    """Return the id of a generation without the users."""
    return fingerprint({"generation": generation_id, "vocabulary": erasure.new_hash})


class Successors:
    """Writes generations without users; what several share is written once."""

    def __init__(self, store: Store) -> None:
        """Take the store; nothing is written yet."""
        self._store = store
        self._written: dict[tuple[Any, ...], Path] = {}
        """By what a file was made from, the file."""

    def write(self, old: Generation, erasure: Erasure) -> str:
        """Return the id of the generation without the users, made where it is not there; not published."""
        name = successor_id(old.id, erasure)
        with locked(self._store.root / WORK / f"{name}.lock"):
            if self._store.has(name):
                directory = self._store.fetch(name)
            else:
                directory = self._store.path(name)
                with building(directory) as partial:
                    self._write(old, erasure, partial, name)
        for file, made_from in _sources(old, erasure, blank_items(old, erasure)).items():
            self._written.setdefault(made_from, directory / file)
        return name

    def _write(self, old: Generation, erasure: Erasure, directory: Path, name: str) -> None:
        blank = blank_items(old, erasure)
        sources = _sources(old, erasure, blank)
        known = {file: self._written.get(made_from) for file, made_from in sources.items()}
        whole = all(known.get(file) for file in sources if file.startswith(_PERSONAL))
        for file, path in known.items():
            if path is not None and (whole or file == ITEM_IDS):
                link_or_copy(path, directory / file)
        if len(blank) and not (directory / ITEM_IDS).exists():
            old.item_ids.without(blank).write(directory / ITEM_IDS)
        if not whole:
            write_users(old, erasure.rows, directory)
            (directory / "model").mkdir()
            forget_in_checkpoint(old.path / "model", directory / "model", erasure)
        checkpoint = str(read_manifest(directory / "model", "checkpoint")["fingerprint"])
        for shard in old.manifest["shards"]:
            folder = directory / "shards" / shard["name"]
            if not (folder / FACTS).exists() and checkpoint != shard["checkpoint_fingerprint"]:
                folder.mkdir(parents=True, exist_ok=True)
                facts = read_shard_facts(old.path / "shards" / shard["name"])
                write_shard_facts(folder, facts["rows"], checkpoint, facts["factory"])
        files = dict(old.manifest["files"])
        for file in files:
            if (directory / file).exists():
                files[file] = file_facts(directory / file)
            elif file.startswith(_PERSONAL):
                raise ArtefactError(
                    f"{old.path} holds {file}, which this release can not empty; remove {old.id}"
                )
            else:
                link_or_copy(old.file(file), directory / file)
        delta = old.manifest["delta"]
        content = {
            **{k: v for k, v in old.manifest.items() if k not in ("kind", "schema_version")},
            "id": name,
            "checkpoint_fingerprint": checkpoint,
            "vocabulary_hash": erasure.new_hash,
            "shards": [{**s, "checkpoint_fingerprint": checkpoint} for s in old.manifest["shards"]],
            "delta": None if delta is None else {**delta, "base": successor_id(delta["base"], erasure)},
            "files": files,
            "replaces": [old.id, *old.manifest.get("replaces", ())],
            "forgotten_users": len(erasure.rows),
        }
        if content["dataset_fingerprint"] == erasure.old_dataset:
            content["dataset_fingerprint"] = erasure.new_dataset
        write_manifest(directory, KIND, content)


def write_users(old: Generation, rows: npt.NDArray[np.int64], directory: Path) -> None:
    """Write the users of a generation with nothing in some rows: ids, histories, seen sets, columns."""
    old.user_ids.without(rows).write(directory / "user_ids.arrow")
    users = directory / "users"
    users.mkdir()
    histories = old.histories
    offsets, stays = without_users(histories.offsets, rows)
    save_array(users / "history_offsets.npy", offsets)
    for name in ("item_rows", "times", "weights"):
        save_array(users / f"history_{name}.npy", getattr(histories, name)[stays])
    if HISTORY_CUT in old.manifest["files"]:
        cut = np.array(histories.cut)
        cut[rows] = False
        save_array(directory / HISTORY_CUT, cut)
    offsets, stays = without_users(old.seen_offsets, rows)
    save_array(users / "seen_offsets.npy", offsets)
    save_array(users / "seen_item_rows.npy", old.seen_item_rows[stays])
    missing = encode_columns(old.schema.query, pa.table({"": pa.nulls(1)}))
    for name, column in old.user_columns.items():
        emptied = np.array(column)
        # Ids are padded with -1, whatever their number.
        emptied[rows] = -1 if column.dtype == np.int32 else missing[name][0]
        save_array(users / column_file(name), emptied)


def _sources(old: Generation, erasure: Erasure, blank: npt.NDArray[np.int64]) -> dict[str, tuple[Any, ...]]:
    """Return what each file that is written anew is made from; the same for the same content."""
    files = old.manifest["files"]
    hashes = {name: facts["sha256"] for name, facts in files.items() if name.startswith(_PERSONAL)}
    users = (erasure.new_hash, erasure.new_dataset, *sorted(hashes.items()))
    found: dict[str, tuple[Any, ...]] = {name: (name, users) for name in hashes}
    if len(blank):
        found[ITEM_IDS] = (files[ITEM_IDS]["sha256"], *blank.tolist())
    for name, facts in files.items():
        if name.startswith("shards/") and name.endswith(f"/{FACTS}"):
            found[name] = (facts["sha256"], users)
    return found
