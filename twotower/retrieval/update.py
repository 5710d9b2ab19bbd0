"""Items that were added, changed or deleted since a generation was built: a new one in seconds.

Nothing that grows with the catalogue is read or written beyond its ids: base shards, users and towers are
shared with the generation that is updated. What differs from the full build lies in one exact shard and in
the list of base rows that are dead, so that a generation depends on the catalogue that the updates lead to,
not on their order (but for the rows of new items).

Symbols: D embedding_dim, n items of an update.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.artefacts import building, fingerprint, has_manifest, link_or_copy, locked, write_manifest
from twotower.data.dataset import ITEM_ROW
from twotower.data.fitting import stored_columns
from twotower.data.hashing import array_hash, table_hash
from twotower.data.vocabulary import Vocabulary
from twotower.errors import ArtefactError, ArtefactMismatchError, DataError, RefusedError
from twotower.index.build import build_shard, check_vectors, write_index
from twotower.index.parts import save_array
from twotower.model.checkpoint import Checkpoint
from twotower.progress import say
from twotower.retrieval.encoding import encode_table
from twotower.retrieval.generation import (
    DELTA,
    KIND,
    TOMBSTONES,
    Generation,
    file_facts,
    write_items,
    write_shard_facts,
)
from twotower.retrieval.store import CURRENT, Store

IntArray = npt.NDArray[np.int64]
_BATCH = 8_192
_EXAMPLES = 5
_FACTORY = "Flat"
_ITEM_IDS = "item_ids.arrow"


@dataclass(frozen=True)
class Update:
    """What an update did."""

    generation: str
    """Id of the generation that holds the result; that of ``base`` when nothing changed."""
    base: str
    """Id of the generation that was updated."""
    added: int
    """Items that were not in the catalogue before."""
    changed: int
    """Items of the catalogue whose row differed."""
    deleted: int
    """Items taken out of the catalogue."""
    unchanged: int
    """Rows given that were there already, and deletions of items that were not in the catalogue."""
    share: float
    """Items that differ from the last full build, over its items."""
    published: bool
    """Whether the pointer names the result."""


def update_items(
    store: Store,
    changes: pa.Table | None = None,
    deletes: Sequence[str] = (),
    *,
    pointer: str = CURRENT,
    publish: bool = True,
    force: bool = False,
    ignore_missing: bool = False,
) -> Update:
    """Add, change and delete items of the generation that a pointer names, and publish the result.

    An item whose id is in the catalogue is replaced, whole; another is added. What is as given already is
    left alone, so that an update that is repeated does nothing. New items have no embedding of their own in
    the item tower: their vectors come from their features and the unknown id.

    Args:
        store: holds the generation.
        changes: of ``read_items``: item_id, title, and at least the columns that item features are read from.
        deletes: ids of items.
        pointer: names the generation to update, and the result.
        publish: let the pointer name the result.
        force: publish although the index recall of the build is below its target.
        ignore_missing: pass over deletions of ids that were never known.

    Raises:
        DataError: the items can not be read as the features of the towers, an id is given twice, both changed
            and deleted, or deleted and not known.
        ArtefactError: the pointer names no generation, or it is damaged.
        RefusedError: another publisher was faster; the result is removed, and nothing has changed.
    """
    base_id = store.current(pointer)
    if base_id is None:
        raise ArtefactError(
            f"{pointer} of {store.where} names no generation to update; build and publish one first, with "
            "python -m jobs.build_index"
        )
    base = Generation.open(store.fetch(base_id), verify=False)
    state = _State.of(base)
    edit = state.edit(changes, list(deletes), ignore_missing)
    if edit.nothing:
        say(f"generation {base_id} holds these items already")
        return Update(base_id, base_id, 0, 0, 0, edit.unchanged, state.share, publish)
    checkpoint = base.checkpoint()
    _check_model(base, checkpoint)
    after = state.after(edit, checkpoint)
    name = fingerprint({"base": state.built_from, "content": after.content()})
    directory = store.path(name)
    with locked(store.root / ".work" / f"{name}.lock"):
        # The same catalogue may have been reached, and be in use, before.
        made = not has_manifest(directory)
        if made:
            with building(directory) as partial:
                after.write(partial, name, checkpoint.fingerprint)
        if publish:
            try:
                store.publish(name, pointer, expected=base_id, force=force)
            except RefusedError:
                if made:
                    _remove(directory)
                raise
    counts = (edit.num_added, edit.num_changed, edit.num_deleted)
    say(f"generation {name}: {counts[0]:,} items added, {counts[1]:,} changed, {counts[2]:,} deleted")
    return Update(name, base_id, *counts, edit.unchanged, after.share, publish)


@dataclass(frozen=True)
class _Edit:
    """What an update has to do."""

    items: pa.Table
    """Items to write, in stored form and the columns of the generation, in the order given."""
    rows: IntArray
    """[n] their item rows; those of new ids come behind the generation's."""
    new_ids: list[str]
    """Ids that the generation does not know, in row order."""
    deleted: IntArray
    """Item rows of the catalogue to take out."""
    num_added: int
    num_changed: int
    unchanged: int

    @property
    def num_deleted(self) -> int:
        return len(self.deleted)

    @property
    def nothing(self) -> bool:
        return not (len(self.rows) or len(self.deleted))


@dataclass(frozen=True)
class _State:
    """A catalogue as base shards, dead rows of them, and the delta."""

    base: Generation
    """Whose files are shared."""
    item_ids: Vocabulary
    in_base: npt.NDArray[np.bool_]
    """[rows] whether a base shard holds a row, dead or not."""
    dead: npt.NDArray[np.bool_]
    """[rows] whether it is dead there."""
    delta_rows: IntArray
    """[n] ascending."""
    delta_items: pa.Table
    """n rows."""
    delta_vectors: npt.NDArray[np.float32]
    """[n, D]."""

    @classmethod
    def of(cls, base: Generation) -> _State:
        """Read the state of a generation."""
        rows = base.delta_rows
        num_rows = len(base.item_ids)
        in_base, dead = np.zeros(num_rows, np.bool_), np.zeros(num_rows, np.bool_)
        in_base[base.base_rows()] = True
        dead[base.dead_rows] = True
        return cls(base, base.item_ids, in_base, dead, rows, base.items.table(rows), base.delta_vectors())

    @property
    def built_from(self) -> str:
        """Id of the full build."""
        delta = self.base.manifest["delta"]
        return str(self.base.id if delta is None else delta["base"])

    @property
    def facts(self) -> dict[str, Any]:
        """What differs from the full build, for the manifest."""
        changed = int(self.in_base[self.delta_rows].sum())
        added = len(self.delta_rows) - changed
        deleted = int(self.dead.sum()) - changed
        share = (added + changed + deleted) / max(int(self.in_base.sum()), 1)
        return {
            "base": self.built_from,
            "added": added,
            "changed": changed,
            "deleted": deleted,
            "share": share,
        }

    @property
    def share(self) -> float:
        """Items that differ from the full build, over its items."""
        return float(self.facts["share"])

    @property
    def num_items(self) -> int:
        """Items of the catalogue."""
        return int(self.in_base.sum() - self.dead.sum()) + len(self.delta_rows)

    def edit(self, changes: pa.Table | None, deletes: list[str], ignore_missing: bool) -> _Edit:
        """Return what has to be done, after checking it."""
        items = self._stored(changes)
        ids = items.column("item_id").to_pylist()
        _check_ids(ids, deletes)
        rows = self.item_ids.rows(ids, missing="negative")
        deleted = self._deleted(deletes, ignore_missing)
        known = rows >= 0
        there = np.zeros(len(rows), np.bool_)
        there[known] = self._alive(rows[known])
        # Only what differs is encoded, so that a whole catalogue may be given.
        same = np.zeros(len(rows), np.bool_)
        if there.any():
            now = self.base.items.table(rows[there]).to_pylist()
            given = items.filter(pa.array(there)).to_pylist()
            same[there] = [a == b for a, b in zip(now, given, strict=True)]
        new_ids = [i for i, k in zip(ids, known.tolist(), strict=True) if not k]
        rows[~known] = len(self.item_ids) + np.arange(len(new_ids))
        alive = self._alive(deleted)
        return _Edit(
            items.filter(pa.array(~same)),
            rows[~same],
            new_ids,
            deleted[alive],
            int((~there).sum()),
            int((there & ~same).sum()),
            int(same.sum()) + len(deletes) - int(alive.sum()),
        )

    def after(self, edit: _Edit, checkpoint: Checkpoint) -> _State:
        """Return the state after an edit."""
        vectors = _encoded(checkpoint, edit.items, edit.rows)
        item_ids = self.item_ids.extended(edit.new_ids) if edit.new_ids else self.item_ids
        in_base, dead = np.zeros(len(item_ids), np.bool_), np.zeros(len(item_ids), np.bool_)
        in_base[: len(self.in_base)], dead[: len(self.dead)] = self.in_base, self.dead
        gone = np.concatenate([edit.rows, edit.deleted])
        dead[gone] = in_base[gone]
        kept = ~np.isin(self.delta_rows, gone)
        rows = np.concatenate([self.delta_rows[kept], edit.rows])
        order = np.argsort(rows)
        items = pa.concat_tables([self.delta_items.filter(pa.array(kept)), edit.items])
        vectors = np.concatenate([self.delta_vectors[kept], vectors])
        after = _State(
            self.base, item_ids, in_base, dead, rows[order], items.take(pa.array(order)), vectors[order]
        )
        if after.num_items == 0:
            raise DataError("the update deletes every item; an index needs at least one")
        return after

    def content(self) -> dict[str, str]:
        """Return hashes of what differs from the full build."""
        return {
            "rows": array_hash(self.delta_rows),
            "dead": array_hash(np.flatnonzero(self.dead)),
            "items": table_hash(self.delta_items),
            # The ids behind the build's own, also of items that were deleted again.
            "ids": fingerprint(self.item_ids.array.slice(self.base.schema.num_items).to_pylist()),
        }

    def write(self, directory: Path, name: str, checkpoint_fingerprint: str) -> None:
        """Write a generation, the manifest last: new files, and links to the others."""
        manifest = self.base.manifest
        files = {n: f for n, f in manifest["files"].items() if not _is_replaced(n)}
        new = []
        if len(self.item_ids) > len(self.base.item_ids):
            self.item_ids.write(directory / _ITEM_IDS)
            del files[_ITEM_IDS]
            new.append(_ITEM_IDS)
        for file in files:
            link_or_copy(self.base.path / file, directory / file)
        if self.dead.any():
            save_array(directory / TOMBSTONES, np.flatnonzero(self.dead))
            new.append(TOMBSTONES)
        shards = [s for s in manifest["shards"] if s["name"] != DELTA]
        if len(self.delta_rows):
            folder = directory / "shards" / DELTA
            folder.mkdir(parents=True)
            write_index(build_shard(self.delta_vectors, _FACTORY), folder / "index.faiss")
            save_array(folder / "item_rows.npy", self.delta_rows)
            write_items(folder, self.delta_items, self.base.declared_attributes)
            write_shard_facts(folder, len(self.delta_rows), checkpoint_fingerprint, _FACTORY)
            new += [f"shards/{DELTA}/{p.name}" for p in folder.iterdir()]
            shards.append(
                {
                    "name": DELTA,
                    "rows": len(self.delta_rows),
                    "factory": _FACTORY,
                    "role": DELTA,
                    "checkpoint_fingerprint": checkpoint_fingerprint,
                }
            )
        content = {
            **{k: v for k, v in manifest.items() if k not in ("kind", "schema_version")},
            "id": name,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
            "num_items": self.num_items,
            "shards": shards,
            "delta": self.facts,
            "files": dict(sorted({**files, **{n: file_facts(directory / n) for n in new}}.items())),
        }
        write_manifest(directory, KIND, content)

    def _alive(self, rows: IntArray) -> npt.NDArray[np.bool_]:
        return (self.in_base[rows] & ~self.dead[rows]) | np.isin(rows, self.delta_rows)

    def _stored(self, changes: pa.Table | None) -> pa.Table:
        """Return items in the columns and types of the generation's item tables."""
        wanted = self.base.items.schema
        if changes is None:
            return wanted.empty_table()
        table = stored_columns("item", [f.spec for f in self.base.schema.item], changes)
        columns = []
        for field in wanted:
            if field.name not in table.column_names:
                raise DataError(
                    f"the items given have no column {field.name!r}, which the catalogue's have; they have "
                    f"{', '.join(table.column_names)}. Add it, empty where there is no value"
                )
            column = table.column(field.name)
            try:
                columns.append(column.cast(field.type))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise DataError(
                    f"column {field.name!r} has type {column.type}, the catalogue holds {field.type} "
                    f"({error}); give it as it was when the dataset was prepared"
                ) from None
        return pa.table(columns, schema=wanted).combine_chunks()

    def _deleted(self, deletes: list[str], ignore_missing: bool) -> IntArray:
        """Return the rows of ids to delete, without those that were never known."""
        rows = self.item_ids.rows(deletes, missing="negative")
        if not ignore_missing and (rows < 0).any():
            unknown = [deletes[i] for i in np.flatnonzero(rows < 0).tolist()]
            raise DataError(
                f"{len(unknown):,} of {len(deletes):,} items to delete are not known: {_shown(unknown)}; "
                "correct the ids, or pass over them with --ignore-missing"
            )
        return rows[rows >= 0]


def _check_ids(changed: list[str], deleted: list[str]) -> None:
    for what, ids in (("given", changed), ("deleted", deleted)):
        if len(set(ids)) < len(ids):
            counts = pa.array(ids).value_counts()
            twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist()
            raise DataError(f"items {_shown(twice)} are {what} more than once; name each once")
    if both := sorted(set(changed) & set(deleted)):
        raise DataError(f"items {_shown(both)} are both given and deleted; do one of the two")


def _encoded(checkpoint: Checkpoint, items: pa.Table, rows: IntArray) -> npt.NDArray[np.float32]:
    """Return the vectors of items, [n, D]."""
    table = items.append_column(ITEM_ROW, pa.array(rows))
    batches = [encode_table(checkpoint, table.slice(at, _BATCH)) for at in range(0, len(rows), _BATCH)]
    vectors = np.concatenate([np.zeros((0, checkpoint.embedding_dim), np.float32), *batches])
    check_vectors(vectors)
    return vectors


def _check_model(base: Generation, checkpoint: Checkpoint) -> None:
    """The weights themselves, not only their manifest, must be those that encoded the base shards."""
    expected = base.manifest["checkpoint_fingerprint"]
    if checkpoint.fingerprint != expected:
        raise ArtefactMismatchError(
            f"the towers in {base.path} are of {checkpoint.fingerprint}, its shards of {expected}; "
            "vectors of different trainings do not fit. Build the generation again."
        )


def _is_replaced(name: str) -> bool:
    """Whether a file of a generation is written anew by every update."""
    return name == TOMBSTONES or name.startswith(f"shards/{DELTA}/")


def _remove(directory: Path) -> None:
    """Remove a generation of this process that nothing names, so that no reader sees a part of it."""
    hidden = directory.with_name(f".{directory.name}.refused")
    with contextlib.suppress(FileNotFoundError):
        os.replace(directory, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _shown(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - _EXAMPLES:,} more" if len(ids) > _EXAMPLES else ""
    return ", ".join(map(repr, ids[:_EXAMPLES])) + more
