"""What a search asks: one FAISS index and the item row of each of its labels.

Inverted-file shards that were trained together are joined into one index in memory when they are opened: a
search then chooses its lists once, and costs what it would cost without shards. All other shards are
searched one by one.

An update leaves the index files of a build as they are and names the items that are dead in them: deleted, or
replaced in another shard. A search takes a few more and drops those, or hands FAISS a bit for each item that
may be answered.

Symbols: Q queries, D embedding_dim, K results, n items of a unit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from twotower.index.allowed import Allowed
from twotower.index.spec import PLAIN_IVF, Effort, innermost, ivf_of, keeps_rows, map_labels

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

# FAISS's type hints leave out the pointers of arrays and the calls that take them.
_faiss: Any = faiss

_SLACK = 8
"""Results beyond those wanted that a search takes where some items are dropped from what it finds."""


class Unit:
    """An index that is searched in one call."""

    def __init__(self, index: Any, item_rows: IntArray, dead: IntArray) -> None:
        """Make it ready to give back vectors.

        Args:
            index: filled; its labels are item rows where its kind keeps them, else places in ``item_rows``.
            item_rows: [n] int64, ascending.
            dead: ascending item rows that are not answered; others than the unit's may be among them.
        """
        self.index: Any = faiss.downcast_index(index)
        # Downcasting gives a view; what owns the memory must live on.
        self._owner = index
        self._held = item_rows
        alive = ~np.isin(item_rows, dead, assume_unique=True)
        self.item_rows = item_rows if alive.all() else item_rows[alive]
        """Item rows that are answered, ascending int64."""
        # By item row, so that dropping what a search found is one gather.
        self._alive = np.zeros(int(item_rows[-1]) + 1, np.bool_)
        self._alive[self.item_rows] = True
        self._alive_bits = np.packbits(self._alive, bitorder="little")
        self.num_dead = len(self._held) - len(self.item_rows)
        self._labels_are_rows = keeps_rows(index) or len(item_rows) == item_rows[-1] + 1
        self._plain_ivf = type(self.index) in PLAIN_IVF
        # FAISS splits a single exact search over its threads at several times the cost of one thread.
        self._one_thread = isinstance(self.index, faiss.IndexFlat)
        self._batches: Any = self.index
        ivf: Any = ivf_of(self.index)
        if ivf is not None:
            # Fields of the index, so set once: a single query is spread over its lists, and a batch over
            # its queries.
            ivf.parallel_mode = 1
            if self._plain_ivf:
                self._batches = _view(self.index)
                self._batches.parallel_mode = 0
        map_labels(self.index, int(item_rows[-1]) + 1)
        self._takes_selectors = True
        self._translation: Any = None
        self._lock = threading.Lock()
        self._mine = threading.local()

    @property
    def exhaustive(self) -> Effort | None:
        """The effort at which a search scores every vector as the index holds it; None where none does."""
        if self._plain_ivf:
            return Effort(nprobe=int(self.index.nlist))
        return Effort() if isinstance(self.index, faiss.IndexFlat) else None

    def search(
        self,
        queries: FloatArray,
        k: int,
        effort: Effort,
        allowed: Allowed | None = None,
        by_selector: bool = True,
    ) -> tuple[FloatArray, IntArray]:
        """Return (scores [Q, K] float32, item rows [Q, K] int64, -1 where nothing was found), best first.

        Args:
            queries: [Q, D] float32.
            k: K, at most the number of ``item_rows``.
            effort: how hard to look.
            allowed: item rows that may be answered; all when not given.
            by_selector: let FAISS pass over the others while it scans; False drops them from what it found.
        """
        if allowed is None:
            if not self.num_dead:
                return self._search(queries, k, effort)
            return self._dropping(queries, k, effort, None)
        if by_selector and self._takes_selectors:
            try:
                return self._selecting(queries, k, effort, allowed)
            except RuntimeError:
                # Some kinds have no selectors; FAISS says so at the first search.
                self._takes_selectors = False
        return self._dropping(queries, k, effort, allowed)

    def contains(self, item_rows: IntArray) -> npt.NDArray[np.bool_]:
        """Return of each item row whether it is answered from here."""
        inside = (item_rows >= 0) & (item_rows < len(self._alive))
        return inside & self._alive[np.where(inside, item_rows, 0)]

    def num_allowed(self, allowed: Allowed) -> int:
        """Return how many of a set are answered from here."""
        both = self._bits(allowed)
        return int(np.bitwise_count(both).sum())

    def vectors(self, item_rows: IntArray) -> FloatArray:
        """Return the vectors of items of the unit as the index holds them, [m, D] float32."""
        labels = item_rows if self._labels_are_rows else np.searchsorted(self._held, item_rows)
        found: FloatArray = self.index.reconstruct_batch(np.ascontiguousarray(labels))
        return found

    def _search(
        self, queries: FloatArray, k: int, effort: Effort, selector: Any = None
    ) -> tuple[FloatArray, IntArray]:
        """Return the scores and item rows that the index finds, dead items among them."""
        scores, labels = self._labels(queries, k, effort, selector)
        if self._labels_are_rows:
            return scores, labels
        rows = self._held[labels]
        rows[labels < 0] = -1
        return scores, rows

    def _labels(
        self, queries: FloatArray, k: int, effort: Effort, selector: Any = None
    ) -> tuple[FloatArray, IntArray]:
        """Return the scores and labels that FAISS finds."""
        if len(queries) > 1:
            index = self._batches
            scores, labels = index.search(queries, k, params=effort.parameters(index, selector))
        elif self._plain_ivf:
            scores, labels = self._search_lists(queries, k, effort, selector)
        else:
            threads = faiss.omp_get_max_threads()
            if self._one_thread:
                faiss.omp_set_num_threads(1)
            scores, labels = self.index.search(queries, k, params=effort.parameters(self.index, selector))
            if self._one_thread:
                faiss.omp_set_num_threads(threads)
        return scores, labels

    def _search_lists(
        self, query: FloatArray, k: int, effort: Effort, selector: Any
    ) -> tuple[FloatArray, IntArray]:
        """Search one query without what FAISS's wrapper checks again; a thread makes its parameters once."""
        kept: tuple[Effort, Any] | None = getattr(self._mine, "parameters", None)
        if kept is None or kept[0] != effort:
            kept = self._mine.parameters = effort, effort.parameters(self.index)
        parameters = kept[1] if selector is None else effort.parameters(self.index, selector)
        scores = np.empty((1, k), np.float32)
        labels = np.empty((1, k), np.int64)
        pointer = _faiss.swig_ptr
        self.index.search_c(1, pointer(query), k, pointer(scores), pointer(labels), parameters)
        return scores, labels

    def _dropping(
        self, queries: FloatArray, k: int, effort: Effort, allowed: Allowed | None
    ) -> tuple[FloatArray, IntArray]:
        """Search for more than k and drop what is dead or not allowed; short queries look for still more."""
        held = len(self._held)
        kept_share = (len(self.item_rows) if allowed is None else self.num_allowed(allowed)) / held
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int64)
        if not kept_share:
            return scores, rows
        # A few more than there are on average; queries that meet more of the dropped ones look again.
        fetch = int(k / kept_share * 1.2) + _SLACK
        todo = np.arange(len(queries))
        while len(todo):
            fetch = min(fetch, held)
            found, labels = self._search(queries[todo], fetch, effort)
            kept = (labels >= 0) & self._alive[labels]
            if allowed is not None:
                kept &= allowed.contains(labels)
            # FAISS's order stays among those that are kept.
            first = np.argsort(~kept, axis=1, kind="stable")[:, :k]
            width = first.shape[1]
            scores[todo, :width] = np.take_along_axis(found, first, 1)
            rows[todo, :width] = np.where(
                np.take_along_axis(kept, first, 1), np.take_along_axis(labels, first, 1), -1
            )
            if fetch == held:
                break
            # A search that came back with fewer than it was asked for would find no more.
            todo = todo[(kept.sum(axis=1) < k) & (labels[:, -1] >= 0)]
            fetch *= 4
        return scores, rows

    def _selecting(
        self, queries: FloatArray, k: int, effort: Effort, allowed: Allowed
    ) -> tuple[FloatArray, IntArray]:
        """Search among the allowed items that are alive."""
        bits = self._bits(allowed)
        # FAISS reads the bits where they lie: they must live on until the search is over.
        selector = _faiss.IDSelectorBitmap(bits)
        if not self._labels_are_rows:
            with self._lock:
                if self._translation is None:
                    self._translation = _faiss.Int64Vector()
                    _faiss.copy_array_to_vector(self._held, self._translation)
            rows_selector, selector = selector, _faiss.IDSelectorTranslated(self._translation, selector)
            found = self._search(queries, k, effort, selector)
            del rows_selector
            return found
        return self._search(queries, k, effort, selector)

    def _bits(self, allowed: Allowed) -> npt.NDArray[np.uint8]:
        """Return a bit for each item row that is allowed and answered from here."""
        bits = allowed.bits()
        width = min(len(bits), len(self._alive_bits))
        return bits[:width] & self._alive_bits[:width]


def units_of(
    shards: Sequence[tuple[Any, IntArray, IntArray]],
    make: Callable[[Any, IntArray, IntArray], Unit] = Unit,
) -> list[Unit]:
    """Return the units of (index, item rows, dead rows) of shards; those trained alike are joined.

    Args:
        shards: any number, also empty ones.
        make: makes a unit.
    """
    units: list[Unit] = []
    groups: dict[bytes, list[tuple[Any, IntArray, IntArray]]] = {}
    for index, item_rows, dead in shards:
        if len(item_rows) == 0:
            continue
        key = _trained_part(index)
        if key is None:
            units.append(make(index, item_rows, dead))
        else:
            groups.setdefault(key + dead.tobytes(), []).append((index, item_rows, dead))
    units += [make(*_joined(group)) for group in groups.values()]
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


def _joined(group: list[tuple[Any, IntArray, IntArray]]) -> tuple[Any, IntArray, IntArray]:
    first, _, dead = group[0]
    if len(group) == 1:
        return group[0]
    whole: Any = faiss.clone_index(first)
    lists: Any = faiss.ArrayInvertedLists(first.nlist, first.code_size)
    # The lists of a file are mapped read-only, so FAISS's own merging, which empties its source, is no help.
    sources = _faiss.InvertedListsPtrVector()
    for index, _, _ in group:
        sources.push_back(innermost(index).invlists)
    side_by_side = _faiss.HStackInvertedLists(sources.size(), sources.data())
    # List by list, each in one piece: lists that grow piece by piece lie so scattered that a search takes a
    # tenth longer. In one call: thousands would each give the interpreter's lock away and wait for it again.
    side_by_side.copy_subset_to(lists, _faiss.InvertedLists.SUBSET_TYPE_INVLIST, 0, first.nlist)
    lists.this.disown()
    whole.replace_invlists(lists, True)
    whole.ntotal = sum(len(rows) for _, rows, _ in group)
    return whole, np.sort(np.concatenate([rows for _, rows, _ in group])), dead


def _view(index: Any) -> Any:
    """Return another inverted-file index over the same lists, which must live as long."""
    lists, owned = index.invlists, index.own_invlists
    empty: Any = faiss.ArrayInvertedLists(index.nlist, index.code_size)
    index.own_invlists = False
    index.replace_invlists(empty, False)
    try:
        view: Any = faiss.clone_index(index)
    finally:
        index.replace_invlists(lists, owned)
    view.replace_invlists(lists, False)
    return view
