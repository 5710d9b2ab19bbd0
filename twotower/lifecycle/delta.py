"""The items of a generation and what an update does to them: which rows are dead, which are in the delta.

Symbols: D embedding_dim, n items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.artefacts import fingerprint
from twotower.data.dataset import ITEM_ROW
from twotower.data.fitting import stored_columns
from twotower.data.hashing import array_hash, table_hash
from twotower.data.vocabulary import Vocabulary
from twotower.errors import DataError
from twotower.generations.encoding import encode_table
from twotower.generations.generation import Generation
from twotower.ids import id_problem
from twotower.index.build import check_vectors
from twotower.model.checkpoint import Checkpoint
from twotower.progress import say
from twotower.values import as_text, is_text

IntArray = npt.NDArray[np.int64]
_BATCH = 8_192
_EXAMPLES = 5


@dataclass(frozen=True)
class Edit:
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
        """Items taken out of the catalogue."""
        return len(self.deleted)

    @property
    def nothing(self) -> bool:
        """Whether the catalogue is as it should be already."""
        return not (len(self.rows) or len(self.deleted))


@dataclass(frozen=True)
class CatalogueState:
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
    def of(cls, base: Generation) -> CatalogueState:
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

    def edit(self, changes: pa.Table | None, deletes: list[str], ignore_missing: bool) -> Edit:
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
            same[there] = equal_rows(self.base.items.table(rows[there]), items.filter(pa.array(there)))
        new_ids = [i for i, k in zip(ids, known.tolist(), strict=True) if not k]
        rows[~known] = len(self.item_ids) + np.arange(len(new_ids))
        alive = self._alive(deleted)
        return Edit(
            items.filter(pa.array(~same)),
            rows[~same],
            new_ids,
            deleted[alive],
            int((~there).sum()),
            int((there & ~same).sum()),
            int(same.sum()) + len(deletes) - int(alive.sum()),
        )

    def after(self, edit: Edit, checkpoint: Checkpoint) -> CatalogueState:
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
        after = CatalogueState(
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
                columns.append(as_text(column) if is_text(field.type) else column.cast(field.type))
            except (DataError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise DataError(
                    f"column {field.name!r} has type {column.type}, the catalogue holds {field.type} "
                    f"({error}); give it as it was when the dataset was prepared"
                ) from None
        if unused := [name for name in table.column_names if name not in wanted.names]:
            say(f"no feature, attribute or title is read from {_shown(unused)}; what is there is left out")
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


def equal_rows(first: pa.Table, second: pa.Table) -> npt.NDArray[np.bool_]:
    """Return of each row of two tables of the same columns whether it has the same values; NaN equals NaN."""
    pairs = zip(first.to_pylist(), second.to_pylist(), strict=True)
    # NaN is equal to itself as text only.
    return np.array([a == b or repr(a) == repr(b) for a, b in pairs], np.bool_)


def _check_ids(changed: list[str], deleted: list[str]) -> None:
    if missing := sum(i is None for i in changed):
        raise DataError(f"{missing:,} of {len(changed):,} items given have no item_id; give each one")
    if bad := [i for i in changed if id_problem(i)]:
        raise DataError(f"{len(bad):,} ids of items can not be used: {bad[0][:80]!r} {id_problem(bad[0])}")
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


def _shown(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - _EXAMPLES:,} more" if len(ids) > _EXAMPLES else ""
    return ", ".join(map(repr, ids[:_EXAMPLES])) + more
