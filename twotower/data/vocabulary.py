"""External ids and internal rows: the one place where they are exchanged.

A row is the position of an id in its vocabulary. Rows are never negative in a vocabulary; -1 is only ever
the answer "not there", and only where the caller asked for it. The empty text is no id: it is what stands in
the rows of users who were forgotten, and of items that only they had, in as many as there are; it is never
found.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.artefacts import fingerprint
from twotower.data.hashing import hash64, table_hash
from twotower.errors import ArtefactError, DataError

IntArray = npt.NDArray[np.int64]
_FEW = 32
"""Ids that are read one by one in less time than a call of Arrow takes to begin."""
FORGOTTEN = ""
"""What stands in the place of an id that was forgotten. No source can hold it: an id there is not blank."""


def vocabulary_hash(users: Vocabulary, items: Vocabulary) -> str:
    """Return the hash of the user and item ids of a dataset, in row order."""
    return fingerprint([users.hash, items.hash])


class Vocabulary:
    """Unique ids in row order.

    Ids are looked up by binary search over 64-bit hashes that are stored, sorted, beside the ids: an opened
    vocabulary is memory-mapped and needs no hash table of its own, however many processes open it.
    """

    def __init__(self, ids: pa.StringArray, _lookup: tuple[Any, Any] | None = None) -> None:
        """Take the ids in row order: no nulls, and no repeats but of ``FORGOTTEN``.

        Raises:
            DataError: an id is null or there twice.
        """
        if isinstance(ids, pa.ChunkedArray):
            ids = ids.combine_chunks() if ids.num_chunks != 1 else ids.chunk(0)
        if ids.type != pa.string():
            raise DataError(f"a vocabulary holds strings, not {ids.type}; cast the ids first")
        if ids.null_count:
            raise DataError(f"a vocabulary has no null ids, but {ids.null_count} of {len(ids)} are null")
        self._ids = ids
        self._lookup = _lookup
        if _lookup is None:
            self._check_unique()

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, item: object) -> bool:
        return isinstance(item, str) and self.row(item) is not None

    @property
    def array(self) -> pa.StringArray:
        """The ids in row order."""
        return self._ids

    @property
    def hash(self) -> str:
        """16 hex digits over the ids and their order."""
        return table_hash(pa.table({"id": self._ids}))

    def id(self, row: int) -> str:
        """Return the id of a row.

        Raises:
            IndexError: the row is negative or past the end.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is not in 0..{len(self) - 1}")
        return str(self._ids[int(row)].as_py())

    def ids(self, rows: npt.ArrayLike) -> list[str]:
        """Return the ids of rows, in their order.

        Raises:
            IndexError: a row is negative or past the end.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            outside = wanted[(wanted < 0) | (wanted >= len(self))][0]
            raise IndexError(f"row {outside} is not in 0..{len(self) - 1}")
        return list(self._ids.take(pa.array(wanted)).to_pylist())

    def row(self, id: str) -> int | None:
        """Return the row of an id, or None when it is not there."""
        if id == FORGOTTEN:
            return None
        hashes, order = self._index()
        value = np.uint64(hash64(id))
        position = int(np.searchsorted(hashes, value))
        while position < len(hashes) and hashes[position] == value:
            row = int(order[position])
            if self._ids[row].as_py() == id:
                return row
            position += 1
        return None

    def rows(self, ids: Iterable[str], missing: Literal["error", "negative"] = "error") -> IntArray:
        """Return the rows of ids, int64; an id that is not there is an error, or -1.

        Raises:
            DataError: an id is not there and ``missing`` is "error".
        """
        wanted: Sequence[str] = list(ids)
        hashes, order = self._index()
        values = np.fromiter((hash64(i) for i in wanted), dtype=np.uint64, count=len(wanted))
        rows = np.full(len(wanted), -1, dtype=np.int64)
        positions = np.searchsorted(hashes, values)
        found = np.flatnonzero(positions < len(hashes))
        found = found[hashes[positions[found]] == values[found]] if len(found) else found
        candidates = np.asarray(order)[positions[found]]
        if len(found) <= _FEW:
            texts = [self._ids[row].as_py() for row in candidates.tolist()]
        else:
            texts = self._ids.take(pa.array(candidates)).to_pylist()
        for at, row, text in zip(found.tolist(), candidates.tolist(), texts, strict=True):
            # Two ids may share a hash, so the text decides; the slow path walks the run of equal hashes.
            exact = row if text == wanted[at] != FORGOTTEN else self.row(wanted[at])
            rows[at] = -1 if exact is None else exact
        if missing == "error" and (rows < 0).any():
            absent = [wanted[i] for i in np.flatnonzero(rows < 0)[:5]]
            raise DataError(
                f"{int((rows < 0).sum())} of {len(wanted)} ids are not in the vocabulary of {len(self)}: "
                f"{', '.join(map(repr, absent))}; leave them out or prepare the data with them"
            )
        return rows

    def without(self, rows: npt.ArrayLike) -> Vocabulary:
        """Return a vocabulary in which the ids of some rows are forgotten; all rows stay where they are."""
        mask = np.zeros(len(self), np.bool_)
        mask[np.asarray(rows, np.int64)] = True
        return Vocabulary(pc.if_else(pa.array(mask), FORGOTTEN, self._ids))

    @property
    def forgotten(self) -> IntArray:
        """Rows whose ids were forgotten, ascending: [m] int64."""
        return np.flatnonzero(np.asarray(pc.equal(self._ids, FORGOTTEN))).astype(np.int64)

    def extended(self, ids: Sequence[str]) -> Vocabulary:
        """Return a vocabulary with more ids behind these, whose rows stay as they are.

        Raises:
            DataError: an id is there already, or twice among the new ones.
        """
        added = Vocabulary(pa.array(ids, pa.string()))
        known = [i for i, row in zip(ids, self.rows(ids, missing="negative"), strict=True) if row >= 0]
        if known:
            raise DataError(f"{len(known)} ids are there already: {', '.join(map(repr, known[:5]))}")
        hashes, order = self._index()
        new_hashes, new_order = added._index()
        # Both are sorted: the new ones are put in their places, without sorting or hashing the old ones.
        places = np.searchsorted(hashes, new_hashes, side="right")
        lookup = (
            np.insert(hashes, places, new_hashes),
            np.insert(order, places, new_order + len(self)),
        )
        return Vocabulary(pa.concat_arrays([self._ids, added.array]), _lookup=lookup)

    def write(self, path: Path | str) -> None:
        """Write the ids and their lookup as an Arrow IPC file."""
        hashes, order = self._index()
        table = pa.table({"id": self._ids, "hash": pa.array(hashes), "row": pa.array(order)})
        with pa.OSFile(os.fspath(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            # One batch, so that an opened column is one contiguous memory-mapped array.
            writer.write_batch(table.combine_chunks().to_batches()[0] if len(self) else _empty(table.schema))

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open a written vocabulary, memory-mapped.

        Raises:
            ArtefactError: the file is missing or no vocabulary.
        """
        try:
            with pa.memory_map(os.fspath(path), "r") as source:
                batch = pa.ipc.open_file(source).get_batch(0)
            lookup = (batch.column("hash").to_numpy(), batch.column("row").to_numpy())
            return cls(batch.column("id"), _lookup=lookup)
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise ArtefactError(
                f"{path} is not a readable vocabulary ({error}); make its artefact again"
            ) from None

    def _index(self) -> tuple[Any, Any]:
        if self._lookup is None:
            hashes = np.fromiter((hash64(i) for i in self._ids.to_pylist()), dtype=np.uint64, count=len(self))
            order = np.argsort(hashes, kind="stable")
            self._lookup = (hashes[order], order.astype(np.int64))
        return self._lookup

    def _check_unique(self) -> None:
        counts = self._ids.value_counts()
        repeated = counts.filter(pa.array(counts.field("counts").to_numpy() > 1)).field("values")
        repeated = repeated.filter(pc.not_equal(repeated, FORGOTTEN))
        if len(repeated):
            raise DataError(
                f"{len(repeated)} ids are there more than once: "
                f"{', '.join(map(repr, repeated.to_pylist()[:5]))}; ids must be unique"
            )


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], f.type) for f in schema], schema=schema)
