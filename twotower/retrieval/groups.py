"""A group of shards that searches for a front somewhere else, and the bytes that travel between the two.

The front encodes queries and describes what was found; each group answers with the best of its own items,
and merging those of all groups gives what one searcher over all shards gives.

A message is the length of its head (uint32, little endian), the head (JSON), then arrays in the byte order
of the machine: both ends are of one cluster.

Symbols: B queries, D embedding_dim, m items.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from twotower.errors import RequestError
from twotower.generations.generation import Generation
from twotower.index.allowed import Allowed
from twotower.index.hits import Hits, best_keys, hits_of, ranking_keys

_LENGTH = struct.Struct("<I")
_ROW = np.dtype(np.int64)
_SCORE = np.dtype(np.float32)
_NO_ROWS = np.zeros(0, _ROW)


@dataclass(frozen=True)
class GroupQuery:
    """One query as a group gets it."""

    k: int
    """Number of items wanted."""
    excluded: npt.NDArray[np.int64]
    """Item rows left out, of all groups."""
    filter: dict[str, Any] | None = None
    """Predicates that the items must satisfy."""
    allowed_rows: npt.NDArray[np.int64] | None = None
    """Item rows that alone may be answered, of all groups; all when None."""


class ShardGroup:
    """Some of the shards of one generation; may be shared by threads."""

    def __init__(self, generation: Generation, names: Collection[str], threads: int = 1) -> None:
        """Read the shards.

        Args:
            generation: an opened generation.
            names: of the shards.
            threads: FAISS threads of a search.
        """
        self._searcher = generation.searcher(threads, names)
        self._attributes = generation.attributes_of(names)
        self.num_items = self._searcher.num_items
        """Items that it can answer."""

    def search(
        self, vectors: npt.NDArray[np.float32], queries: Sequence[GroupQuery], exact: bool = False
    ) -> list[Hits]:
        """Return the best items of the group for each query.

        Args:
            vectors: [B, D] query embeddings.
            queries: B queries.
            exact: score every item, which takes long.

        Raises:
            RequestError: a filter or a query is not allowed.
        """
        search = self._searcher.search_exactly if exact else self._searcher.search
        return [self._search(search, vectors[i : i + 1], query) for i, query in enumerate(queries)]

    def vector(self, item_row: int) -> npt.NDArray[np.float32] | None:
        """Return the vector of an item, [D] float32; None where another group has it."""
        if not self._searcher.contains([item_row])[0]:
            return None
        return np.asarray(self._searcher.vectors([item_row])[0])

    def _search(
        self, search: Callable[..., list[Hits]], vector: npt.NDArray[np.float32], query: GroupQuery
    ) -> Hits:
        allowed = None
        if query.filter:
            allowed = self._attributes.allowed(query.filter)
        if query.allowed_rows is not None:
            listed = Allowed.of_rows(self._own(query.allowed_rows), self._attributes.num_rows)
            allowed = listed if allowed is None else allowed & listed
        # What other groups hold must not make this one look for more.
        return search(vector, query.k, [self._own(query.excluded)], allowed=allowed)[0]

    def _own(self, item_rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return item_rows[self._searcher.contains(item_rows)] if len(item_rows) else item_rows


def merge_groups(found: Sequence[Hits], k: int) -> Hits:
    """Return the k best of what groups found, by score, then by item row."""
    scores = np.concatenate([np.zeros(0, _SCORE), *(h.scores for h in found)])
    rows = np.concatenate([_NO_ROWS, *(h.item_rows for h in found)])
    return hits_of(best_keys(ranking_keys(scores, rows)[None, :], k))[0]


def pack_search(
    generation_id: str,
    vectors: npt.NDArray[np.float32],
    queries: Sequence[GroupQuery],
    exact: bool = False,
) -> bytes:
    """Return the message that asks a group for its best items.

    Args:
        generation_id: of the generation that encoded the queries.
        vectors: [B, D] float32.
        queries: B queries.
        exact: ask for exact search.
    """
    head = {
        "generation": generation_id,
        "exact": exact,
        "shape": vectors.shape,
        "queries": [
            (q.k, len(q.excluded), q.filter, None if q.allowed_rows is None else len(q.allowed_rows))
            for q in queries
        ],
    }
    arrays: list[npt.NDArray[Any]] = [np.ascontiguousarray(vectors, _SCORE)]
    for query in queries:
        arrays.append(np.ascontiguousarray(query.excluded, _ROW))
        if query.allowed_rows is not None:
            arrays.append(np.ascontiguousarray(query.allowed_rows, _ROW))
    return _packed(head, arrays)


def is_exact(message: bytes) -> bool:
    """Return whether a message asks for exact search."""
    return bool(_head(message)[0].get("exact"))


def unpack_search(message: bytes) -> tuple[str, npt.NDArray[np.float32], list[GroupQuery]]:
    """Return the generation's id, the vectors [B, D] and the queries of ``pack_search``."""
    head, at = _head(message)
    vectors = np.frombuffer(message, _SCORE, head["shape"][0] * head["shape"][1], at)
    at += vectors.nbytes
    queries = []
    for k, num_excluded, predicates, num_allowed in head["queries"]:
        excluded = np.frombuffer(message, _ROW, num_excluded, at) if num_excluded else _NO_ROWS
        at += excluded.nbytes
        rows = None
        if num_allowed is not None:
            rows = np.frombuffer(message, _ROW, num_allowed, at) if num_allowed else _NO_ROWS
            at += rows.nbytes
        queries.append(GroupQuery(k, excluded, predicates, rows))
    return str(head["generation"]), vectors.reshape(head["shape"]), queries


def pack_hits(generation_id: str, found: Sequence[Hits]) -> bytes:
    """Return the message with the items that a group found for each query."""
    arrays: list[npt.NDArray[Any]] = []
    for hits in found:
        arrays += [np.ascontiguousarray(hits.item_rows, _ROW), np.ascontiguousarray(hits.scores, _SCORE)]
    return _packed({"generation": generation_id, "counts": [len(h.item_rows) for h in found]}, arrays)


def unpack_hits(message: bytes, generation_id: str) -> list[Hits]:
    """Return the hits of each query of ``pack_hits``.

    Raises:
        RequestError: they are of another generation than the one that was asked.
    """
    head, at = _head(message)
    if head["generation"] != generation_id:
        raise RequestError(f"a group answered from {head['generation']}, {generation_id} was asked")
    found = []
    for count in head["counts"]:
        rows = np.frombuffer(message, _ROW, count, at) if count else _NO_ROWS
        at += rows.nbytes
        scores = np.frombuffer(message, _SCORE, count, at) if count else np.zeros(0, _SCORE)
        at += scores.nbytes
        found.append(Hits(rows, scores))
    return found


def pack_vector_request(generation_id: str, item_row: int) -> bytes:
    """Return the message that asks a group for the vector of an item."""
    return _packed({"generation": generation_id, "item_row": item_row}, [])


def pack_vector(vector: npt.NDArray[np.float32] | None) -> bytes:
    """Return the message with the vector of an item [D] float32; None where another group has it."""
    return _packed({"there": vector is not None}, [] if vector is None else [vector])


def unpack_vector(message: bytes) -> npt.NDArray[np.float32] | None:
    """Return the vector of ``pack_vector``, [D] float32."""
    head, at = _head(message)
    return np.frombuffer(message, _SCORE, offset=at) if head["there"] else None


def answer(message: bytes, held: Mapping[str, ShardGroup]) -> bytes:
    """Return the answer to a message of ``pack_search`` or ``pack_vector_request``.

    Args:
        message: what is asked.
        held: the group in each generation that is in memory, by the generation's id.

    Returns:
        a message of ``pack_hits`` or ``pack_vector``; empty where the generation is not held.
    """
    head, _ = _head(message)
    group = held.get(head["generation"])
    if group is None:
        return b""
    if "item_row" in head:
        return pack_vector(group.vector(head["item_row"]))
    generation_id, vectors, queries = unpack_search(message)
    return pack_hits(generation_id, group.search(vectors, queries, head["exact"]))


def _packed(head: dict[str, Any], arrays: Sequence[npt.NDArray[Any]]) -> bytes:
    text = orjson.dumps(head)
    # Rows of eight bytes are read where they lie: on most machines that is quicker where they are aligned.
    text += b" " * (-(len(text) + _LENGTH.size) % 8)
    return b"".join([_LENGTH.pack(len(text)), text, *(a.tobytes() for a in arrays)])


def _head(message: bytes) -> tuple[dict[str, Any], int]:
    (length,) = _LENGTH.unpack_from(message)
    end = _LENGTH.size + length
    return orjson.loads(message[_LENGTH.size : end]), end
