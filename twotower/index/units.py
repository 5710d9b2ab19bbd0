"""What a search asks: one FAISS index and the item row of each of its labels.

Inverted-file shards that were trained together are joined into one index in memory when they are opened: a
search then chooses its lists once, and costs what it would cost without shards. All other shards are
searched one by one.

An update leaves the index files of a build as they are and names the items that are dead in them: deleted, or
replaced in another shard. A search takes a few more and drops those.

Symbols: Q queries, D embedding_dim, K results, n items of a unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from twotower.index.spec import Effort, innermost, ivf_of, keeps_rows, map_labels

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


_SLACK = 8
"""Results beyond those wanted that a search takes where some items are dead."""


class Unit:
    """An index that is searched in one call."""

    def __init__(self, index: Any, item_rows: IntArray, dead: IntArray) -> None:
        """Make it ready to give back vectors.

        Args:
            index: filled; its labels are item rows where its kind keeps them, else places in ``item_rows``.
            item_rows: [n] int64, ascending.
            dead: ascending item rows that are not answered; others than the unit's may be among them.
        """
        self.index = faiss.downcast_index(index)
        # Downcasting gives a view; what owns the memory must live on.
        self._owner = index
        self._held = item_rows
        alive = ~np.isin(item_rows, dead, assume_unique=True)
        self.item_rows = item_rows if alive.all() else item_rows[alive]
        """Item rows that are answered, ascending int64."""
        # By item row, so that dropping what a search found is one gather.
        self._alive = np.zeros(int(item_rows[-1]) + 1, np.bool_)
        self._alive[self.item_rows] = True
        self._labels_are_rows = keeps_rows(index)
        map_labels(self.index, int(item_rows[-1]) + 1)
        ivf = ivf_of(self.index)
        if ivf is not None:
            # Set once, since it is a field of the index: a single query is spread over its lists.
            ivf.parallel_mode = 1

    def search(self, queries: FloatArray, k: int, effort: Effort) -> tuple[FloatArray, IntArray]:
        """Return (scores [Q, K] float32, item rows [Q, K] int64, -1 where nothing was found).

        Args:
            queries: [Q, D] float32.
            k: K, at most the number of ``item_rows``.
            effort: how hard to look.
        """
        held = len(self._held)
        num_dead = held - len(self.item_rows)
        if not num_dead:
            return self._search(queries, k, effort)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int64)
        # Twice as many dead items as there are on average; queries that meet more of them look again.
        fetch = k + _SLACK + 2 * k * num_dead // held
        todo = np.arange(len(queries))
        while len(todo):
            fetch = min(fetch, held)
            found, labels = self._search(queries[todo], fetch, effort)
            alive = (labels >= 0) & self._alive[labels]
            # FAISS's order is kept among those that are alive.
            first = np.argsort(~alive, axis=1, kind="stable")[:, :k]
            scores[todo] = np.take_along_axis(found, first, 1)
            rows[todo] = np.where(
                np.take_along_axis(alive, first, 1), np.take_along_axis(labels, first, 1), -1
            )
            if fetch == held:
                break
            # A search that came back with fewer than it was asked for would find no more.
            todo = todo[(alive.sum(axis=1) < k) & (labels[:, -1] >= 0)]
            fetch *= 4
        return scores, rows

    def contains(self, item_rows: IntArray) -> npt.NDArray[np.bool_]:
        """Return of each item row whether it is answered from here."""
        inside = (item_rows >= 0) & (item_rows < len(self._alive))
        return inside & self._alive[np.where(inside, item_rows, 0)]

    def vectors(self, item_rows: IntArray) -> FloatArray:
        """Return the vectors of items of the unit as the index holds them, [m, D] float32."""
        labels = item_rows if self._labels_are_rows else np.searchsorted(self._held, item_rows)
        found: FloatArray = self.index.reconstruct_batch(np.ascontiguousarray(labels))
        return found

    def _search(self, queries: FloatArray, k: int, effort: Effort) -> tuple[FloatArray, IntArray]:
        """Return what the index finds, dead items among it."""
        scores, labels = self.index.search(queries, k, params=effort.parameters(self.index))
        if self._labels_are_rows:
            return scores, labels
        rows = self._held[labels]
        rows[labels < 0] = -1
        return scores, rows


def units_of(shards: Sequence[tuple[Any, IntArray, IntArray]]) -> list[Unit]:
    """Return the units of (index, item rows, dead rows) of shards; those trained alike are joined."""
    units: list[Unit] = []
    groups: dict[bytes, list[tuple[Any, IntArray, IntArray]]] = {}
    for index, item_rows, dead in shards:
        if len(item_rows) == 0:
            continue
        key = _trained_part(index)
        if key is None:
            units.append(Unit(index, item_rows, dead))
        else:
            groups.setdefault(key + dead.tobytes(), []).append((index, item_rows, dead))
    units += [_joined(group) for group in groups.values()]
    return [unit for unit in units if len(unit.item_rows)]


def _trained_part(index: Any) -> bytes | None:
    """Return what indexes must have in common to be joined; None for kinds that are not."""
    index = faiss.downcast_index(index)
    codec: bytes
    if type(index) is faiss.IndexIVFFlat:
        codec = b""
    elif type(index) is faiss.IndexIVFScalarQuantizer:
        codec = faiss.vector_to_array(index.sq.trained).tobytes()
    elif type(index) is faiss.IndexIVFPQ:
        codec = faiss.vector_to_array(index.pq.centroids).tobytes()
    else:
        return None
    kind = f"{type(index).__name__} {index.code_size} {index.by_residual} ".encode()
    return kind + codec + bytes(faiss.serialize_index(index.quantizer))


def _joined(group: list[tuple[Any, IntArray, IntArray]]) -> Unit:
    first, item_rows, dead = group[0]
    if len(group) == 1:
        return Unit(first, item_rows, dead)
    whole: Any = faiss.clone_index(first)
    lists: Any = faiss.ArrayInvertedLists(first.nlist, first.code_size)
    # The lists of a file are mapped read-only, so FAISS's own merging, which empties its source, is no help.
    for index, _, _ in group:
        source = innermost(index).invlists
        for number in range(first.nlist):
            if size := source.list_size(number):
                lists.add_entries(number, size, source.get_ids(number), source.get_codes(number))
    lists.this.disown()
    whole.replace_invlists(lists, True)
    return Unit(whole, np.sort(np.concatenate([rows for _, rows, _ in group])), dead)
