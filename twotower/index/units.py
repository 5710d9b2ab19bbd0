"""What a search asks: one FAISS index and the item row of each of its labels.

Inverted-file shards that were trained together are joined into one index in memory when they are opened: a
search then chooses its lists once, and costs what it would cost without shards. All other shards are
searched one by one.

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


class Unit:
    """An index that is searched in one call."""

    def __init__(self, index: Any, item_rows: IntArray) -> None:
        """Make it ready to give back vectors.

        Args:
            index: filled; its labels are item rows where its kind keeps them, else places in ``item_rows``.
            item_rows: [n] int64, ascending.
        """
        self.index = faiss.downcast_index(index)
        # Downcasting gives a view; what owns the memory must live on.
        self._owner = index
        self.item_rows = item_rows
        self._labels_are_rows = keeps_rows(index)
        map_labels(self.index, int(item_rows[-1]) + 1)
        ivf = ivf_of(self.index)
        if ivf is not None:
            # Set once, since it is a field of the index: a single query is spread over its lists.
            ivf.parallel_mode = 1

    def search(self, queries: FloatArray, k: int, effort: Effort) -> tuple[FloatArray, IntArray]:
        """Return (scores [Q, K] float32, item rows [Q, K] int64, -1 where nothing was found)."""
        scores, labels = self.index.search(queries, k, params=effort.parameters(self.index))
        if self._labels_are_rows:
            return scores, labels
        rows = self.item_rows[labels]
        rows[labels < 0] = -1
        return scores, rows

    def locate(self, item_rows: IntArray) -> tuple[IntArray, npt.NDArray[np.bool_]]:
        """Return the place of each item row among the unit's, and whether it is there."""
        at = np.minimum(np.searchsorted(self.item_rows, item_rows), len(self.item_rows) - 1)
        return at, self.item_rows[at] == item_rows

    def vectors(self, at: IntArray) -> FloatArray:
        """Return the vectors at places of ``item_rows`` as the index holds them, [m, D] float32."""
        labels = self.item_rows[at] if self._labels_are_rows else at
        found: FloatArray = self.index.reconstruct_batch(np.ascontiguousarray(labels))
        return found


def units_of(shards: Sequence[tuple[Any, IntArray]]) -> list[Unit]:
    """Return the units of (index, item rows) of shards that are not empty; trained alike, they are joined."""
    units: list[Unit] = []
    groups: dict[bytes, list[tuple[Any, IntArray]]] = {}
    for index, item_rows in shards:
        key = _trained_part(index)
        if key is None:
            units.append(Unit(index, item_rows))
        else:
            groups.setdefault(key, []).append((index, item_rows))
    return units + [_joined(group) for group in groups.values()]


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


def _joined(group: list[tuple[Any, IntArray]]) -> Unit:
    first, item_rows = group[0]
    if len(group) == 1:
        return Unit(first, item_rows)
    whole: Any = faiss.clone_index(first)
    lists: Any = faiss.ArrayInvertedLists(first.nlist, first.code_size)
    # The lists of a file are mapped read-only, so FAISS's own merging, which empties its source, is no help.
    for index, _ in group:
        source = innermost(index).invlists
        for number in range(first.nlist):
            if size := source.list_size(number):
                lists.add_entries(number, size, source.get_ids(number), source.get_codes(number))
    lists.this.disown()
    whole.replace_invlists(lists, True)
    return Unit(whole, np.sort(np.concatenate([rows for _, rows in group])))
