"""Answers "which k items for this user, now?" from one generation.

A retriever is the front of a generation together with a searcher over all its shards. It never changes, so
that threads can share it. Scores are inner products: cosines, unless the model has ``normalize: false``
or ``item_bias``.

Shapes: B queries, R of them that are searched, D embedding_dim, K results.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from twotower.errors import ArtefactError, RequestError
from twotower.generations.generation import Generation
from twotower.generations.yielding import pause
from twotower.index.allowed import Allowed
from twotower.index.gpu import GpuUnit
from twotower.index.hits import Hits
from twotower.retrieval.canary import check_answers, check_vectors, sampled_rows
from twotower.retrieval.front import TIES, Front, allowed_items, timing
from twotower.retrieval.query import Answer, HistoryItem, HistoryUse, Query, Strategy

__all__ = ["Answer", "Found", "HistoryItem", "Query", "Retriever"]


@dataclass(frozen=True)
class Found:
    """What was found for one query, in rows."""

    hits: Hits
    strategy: Strategy
    """What they were made from."""
    history: HistoryUse
    """What the items of the query's history were read by."""


class Retriever(Front):
    """The query tower, the user table, the item table and the shards of one generation: answers in process.

    ``retrieve`` takes a ``Query`` and returns its items, best first, each a dictionary of ``item_id``,
    ``score`` (an inner product: a cosine in [-1, 1], unless the model has ``normalize: false`` or
    ``item_bias``) and the fields that were asked for. It raises ``RequestError`` for what can not be asked.

    Example:
        >>> retriever = tt.Retriever.open(generation)
        >>> answer = retriever.retrieve(tt.Query(user_id="u1", k=3, fields=["title"]))
        >>> len(answer.items), answer.strategy, sorted(answer.items[0])
        (3, 'personal', ['item_id', 'score', 'title'])
    """

    def __init__(self, generation: Generation, threads: int = 1, device: str = "cpu") -> None:
        """Load what answers need.

        Args:
            generation: an opened generation.
            threads: CPU threads of the query tower and of a search.
            device: of torch, for the query tower; shards go to the GPUs that FAISS finds.
        """
        super().__init__(generation, threads, device)
        pause()
        self._searcher = generation.searcher(threads)

    @classmethod
    def open(
        cls, generation_dir: Path | str, threads: int = 1, verify: bool = True, device: str = "cpu"
    ) -> Self:
        """Open a generation.

        Args:
            generation_dir: the directory of one generation.
            threads: CPU threads of the query tower and of a search.
            verify: check size and SHA-256 of every file.
            device: of torch, for the query tower; shards go to the GPUs that FAISS finds.

        Raises:
            ArtefactError: the generation is not finished, or a file of it is damaged.
        """
        return cls(Generation.open(Path(generation_dir), verify=verify), threads, device)

    @property
    def on_gpu(self) -> bool:
        """Whether the query tower or a shard is on a GPU."""
        return self._device != "cpu" or any(isinstance(unit, GpuUnit) for unit in self._searcher.units)

    @classmethod
    def ready(cls, generation: Generation, threads: int = 1, device: str = "cpu") -> Self:
        """Return the retriever of an opened generation, warmed up and asked its canary queries.

        Args:
            generation: an opened generation.
            threads: CPU threads of the query tower and of a search.
            device: of torch, for the query tower.

        Raises:
            ArtefactError: the generation answers nonsense.
        """
        retriever = cls(generation, threads, device)
        try:
            retriever.warm_up()
        except RequestError as error:
            raise ArtefactError(f"the generation does not answer: {error}") from None
        retriever.check_canaries()
        return retriever

    def warm_up(self) -> None:
        """Answer queries from a history, as ``Front.warm_up`` says."""
        first = self._item_ids.id(0)
        self.retrieve(Query(k=10, history=[HistoryItem(first)], fields=self.item_fields))
        if self.attributes:
            self.retrieve(Query(k=10, history=[HistoryItem(first)], allow_items=[first]))
        self._measure(self.retrieve)

    def check_canaries(self) -> None:
        """Ask questions whose answers can be checked.

        Raises:
            ArtefactError: the generation answers nonsense.
        """
        check_answers(self, self.retrieve)
        rows = sampled_rows(self)

        def best(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            hits = self._searcher.search(vectors, 1)
            return np.array([each.scores.max(initial=-np.inf) for each in hits], np.float32)

        encoded = self.encode_items(rows)
        pause()
        check_vectors(encoded, self._searcher.vectors(rows), best)

    def retrieve(self, query: Query) -> Answer:
        """Return the best allowed items for one query.

        Raises:
            RequestError: the query asks for something that is not allowed.
        """
        return self.retrieve_batch([query])[0]

    def retrieve_batch(self, queries: Sequence[Query]) -> list[Answer]:
        """Return the best allowed items for each query; timings are those of the whole batch.

        Raises:
            RequestError: a query asks for something that is not allowed.
        """
        start = time.perf_counter()
        found, encoded = self._found(queries, None)
        searched = time.perf_counter()
        items = [
            self.describe_hits(one.hits, query.fields) for one, query in zip(found, queries, strict=True)
        ]
        took = timing(start, encoded, searched)
        return [
            Answer(self.generation_id, its, one.strategy, took, one.history)
            for its, one in zip(items, found, strict=True)
        ]

    def find(self, queries: Sequence[Query], among: Allowed | None = None) -> list[Found]:
        """Return for each query what ``retrieve_batch`` answers, as item rows; fields are not looked up.

        Args:
            queries: any number.
            among: item rows that alone may be answered to any of them, as ``allowed_items`` gives them.

        Raises:
            RequestError: a query asks for something that is not allowed.
        """
        return self._found(queries, among)[0]

    def similar(
        self, item_id: str, k: int, fields: Sequence[str] = (), filter: Mapping[str, Any] | None = None
    ) -> Answer:
        """Return the items whose vectors are nearest to an item's own, without the item itself.

        Args:
            item_id: external id.
            k: number of items wanted, 1 or more.
            fields: item columns to return with each item.
            filter: predicates that the answers must satisfy; the item itself need not.

        Raises:
            UnknownItemError: the item is not in the catalogue.
            RequestError: k, a field or the filter is not allowed.
        """
        start = time.perf_counter()
        self.check(k, fields)
        row = self.row_of(item_id)
        vector = self.as_queries(self._searcher.vectors([row]))
        encoded = time.perf_counter()
        only = allowed_items(self._generation, filter)
        hits = self._searcher.search(vector, k, [np.array([row])], allowed=only)[0]
        searched = time.perf_counter()
        items = self.describe_hits(hits, fields)
        return Answer(self.generation_id, items, "similar", timing(start, encoded, searched))

    def index_recall(self, query: Query, item_ids: Sequence[str]) -> float | None:
        """Return the share of the best items by exact search that an answer holds, in [0, 1].

        Args:
            query: what was asked.
            item_ids: what was answered.

        Returns:
            None where the index was not asked, or nothing is allowed.
        """
        encoded = self.encode([query])
        if not encoded.searched:
            return None
        excluded = [encoded.inputs[0].excluded]
        exact = self._searcher.search_exactly(
            encoded.vectors, query.k + TIES, excluded, self._allowed_sets([query], None)[0]
        )
        return self.index_recall_of(exact[0], item_ids, query.k)

    def _found(self, queries: Sequence[Query], among: Allowed | None) -> tuple[list[Found], float]:
        """Return what was found for each query, and the time when they were encoded."""
        encoded = self.encode(queries)
        done = time.perf_counter()
        allowed = self._allowed_sets(queries, among)
        inputs = encoded.inputs
        hits = [
            self.popularity.best(each.excluded, query.k, only) if each.strategy == "popular" else None
            for each, query, only in zip(inputs, queries, allowed, strict=True)
        ]
        groups: dict[tuple[int, int], list[int]] = {}
        for place, i in enumerate(encoded.searched):
            groups.setdefault((queries[i].k, id(allowed[i])), []).append(place)
        for (k, _), places in groups.items():
            among_queries = [encoded.searched[place] for place in places]
            excluded = [inputs[i].excluded for i in among_queries]
            answers = self._searcher.search(
                encoded.vectors[places], k, excluded, allowed=allowed[among_queries[0]]
            )
            for i, found in zip(among_queries, answers, strict=True):
                hits[i] = found
        return [
            Found(found, each.strategy, each.use)
            for found, each in zip(hits, inputs, strict=True)
            if found is not None
        ], done

    def _allowed_sets(self, queries: Sequence[Query], among: Allowed | None) -> list[Allowed | None]:
        """Return for each query the items it may be answered with; equal restrictions give the same set."""
        # A list may be as long as the catalogue and be that of many queries: each is read once.
        lists = {id(q.allow_items): tuple(q.allow_items) for q in queries if q.allow_items is not None}
        sets: dict[tuple[str, tuple[str, ...] | None], Allowed | None] = {}
        own: list[Allowed | None] = []
        for query in queries:
            if query.filter is None and query.allow_items is None:
                own.append(among)
                continue
            key = (repr(query.filter), lists.get(id(query.allow_items)))
            if key not in sets:
                only = allowed_items(self._generation, query.filter, query.allow_items)
                sets[key] = among if only is None else only if among is None else only & among
            own.append(sets[key])
        return own
