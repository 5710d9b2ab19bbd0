"""Answers "which k items for this user, now?" from one generation.

A retriever holds one generation and never changes, so that threads can share it. Every answer comes from
the same path: a query becomes rows (``Inputs``), rows become features and an embedding (the query tower),
and the searcher ranks the allowed items. Scores are inner products: cosines, unless the model has
``normalize: false``.

Shapes: B queries, D embedding_dim, K results, N catalogue items.
"""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from twotower.errors import NotAllowedError
from twotower.index.allowed import Allowed
from twotower.index.search import Hits
from twotower.model.features import QueryFeatures
from twotower.retrieval.generation import Generation
from twotower.retrieval.inputs import Input, Inputs, UserTable
from twotower.retrieval.query import Answer, HistoryItem, Query, Strategy, UnknownItemError

_BLOCK_ROWS = 1 << 22

__all__ = ["Answer", "Found", "HistoryItem", "Query", "Retriever", "allowed_items", "make_inputs"]


@dataclass(frozen=True)
class Found:
    """What was found for one query, in rows."""

    hits: Hits
    strategy: Strategy
    """What they were made from."""


class Retriever:
    """The query tower, the user table, the item table and the shards of one generation."""

    def __init__(self, generation: Generation, threads: int = 1) -> None:
        """Load what answers need.

        Args:
            generation: an opened generation.
            threads: CPU threads of the query tower and of a search.
        """
        self._generation = generation
        self._threads = threads
        checkpoint = generation.checkpoint()
        self._model = checkpoint.model
        self._item_ids = generation.item_ids
        self._items = generation.items
        self._searcher = generation.searcher(threads)
        self._popularity = self._ranking()
        self._popularity_scores = popularity_scores(
            self._popularity, generation.seen_item_rows, len(generation.user_ids), len(generation.item_ids)
        )
        self._inputs = make_inputs(generation)
        self._features = QueryFeatures(checkpoint.schema, generation.profiles)
        self.prepare_thread()

    @classmethod
    def open(cls, generation_dir: Path | str, threads: int = 1, verify: bool = True) -> Self:
        """Open a generation.

        Args:
            generation_dir: the directory of one generation.
            threads: CPU threads of the query tower and of a search.
            verify: check size and SHA-256 of every file.

        Raises:
            ArtefactError: the generation is not finished, or a file of it is damaged.
        """
        return cls(Generation.open(Path(generation_dir), verify=verify), threads)

    @property
    def generation_id(self) -> str:
        """Id of the generation."""
        return self._generation.id

    def prepare_thread(self) -> None:
        """Set the number of torch threads; call it once in each thread that retrieves."""
        torch.set_num_threads(self._threads)

    def warm_up(self) -> None:
        """Answer queries from a history, so that the first real one finds everything loaded."""
        first = self._item_ids.id(0)
        self.retrieve(Query(k=10, history=[HistoryItem(first)], fields=self.item_fields))
        if self.attributes:
            self.retrieve(Query(k=10, history=[HistoryItem(first)], allow_items=[first]))

    @property
    def item_fields(self) -> list[str]:
        """Item columns that a query may ask for; item_id and score are in every answer."""
        return [name for name in self._items.fields if name not in ("item_id", "score")]

    @property
    def attributes(self) -> dict[str, dict[str, Any]]:
        """Type and operators of each attribute that a query may filter by."""
        return self._generation.attributes.describe()

    @property
    def user_columns(self) -> list[str]:
        """User columns that a query may give values for."""
        return self._inputs.user_columns

    def describe(self) -> dict[str, Any]:
        """Return the facts of the generation that a client may want, as plain JSON values without paths."""
        manifest = self._generation.manifest
        names = (
            "id",
            "created",
            "checkpoint_fingerprint",
            "dataset_fingerprint",
            "vocabulary_hash",
            "embedding_dim",
            "metric",
            "num_items",
            "as_of",
            "index",
        )
        facts = {name: manifest[name] for name in names}
        return {
            **facts,
            "num_users": len(self._generation.user_ids),
            "item_fields": self.item_fields,
            "user_columns": self.user_columns,
            "attributes": self.attributes,
        }

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
        items = [self._described(one.hits, query.fields) for one, query in zip(found, queries, strict=True)]
        timing = _timing(start, encoded, searched)
        return [
            Answer(self.generation_id, its, one.strategy, timing)
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

    def item_table(self, item_rows: npt.ArrayLike, fields: Sequence[str]) -> pa.Table:
        """Return ``item_id`` and columns of items, in the order given.

        Raises:
            RequestError: a column is not there, or an item row is in no shard.
        """
        ids = self._item_ids.array.take(pa.array(np.asarray(item_rows, dtype=np.int64)))
        table = pa.table({"item_id": ids})
        if fields:
            found = self._items.table(item_rows, fields)
            for name in fields:
                table = table.append_column(found.schema.field(name), found.column(name))
        return table

    def _found(self, queries: Sequence[Query], among: Allowed | None) -> tuple[list[Found], float]:
        """Return what was found for each query, and the time when they were encoded."""
        now = time.time_ns() // 1000
        for query in queries:
            self._check(query.k, query.fields)
        inputs = self._inputs.resolve_all(queries, now)
        ranked = [i for i, each in enumerate(inputs) if each.strategy != "popular"]
        vectors = self._encode([inputs[i] for i in ranked])
        encoded = time.perf_counter()
        allowed = self._allowed_sets(queries, among)
        hits = [
            self._popular(each.excluded, query.k, only) if each.strategy == "popular" else None
            for each, query, only in zip(inputs, queries, allowed, strict=True)
        ]
        groups: dict[tuple[int, int], list[int]] = {}
        for place, i in enumerate(ranked):
            groups.setdefault((queries[i].k, id(allowed[i])), []).append(place)
        for (k, _), places in groups.items():
            excluded = [inputs[ranked[place]].excluded for place in places]
            only = allowed[ranked[places[0]]]
            answers = self._searcher.search(vectors[places], k, excluded, allowed=only)
            for place, found in zip(places, answers, strict=True):
                hits[ranked[place]] = found
        return [
            Found(found, each.strategy) for found, each in zip(hits, inputs, strict=True) if found is not None
        ], encoded

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
        self._check(k, fields)
        row = self._item_ids.row(item_id)
        if row is None or not self._searcher.contains([row])[0]:
            reason = "is not known"
            if row is not None:
                reason = "is not in the catalogue: it only occurs in interactions, or was deleted"
            shown = item_id if len(item_id) <= 60 else item_id[:60] + "..."
            raise UnknownItemError(f"item {shown!r} {reason}", "the id of an item of the catalogue")
        vector = self._searcher.vectors([row])
        encoded = time.perf_counter()
        only = allowed_items(self._generation, filter)
        hits = self._searcher.search(vector, k, [np.array([row])], allowed=only)[0]
        searched = time.perf_counter()
        items = self._described(hits, fields)
        return Answer(self.generation_id, items, "similar", _timing(start, encoded, searched))

    def _check(self, k: int, fields: Sequence[str]) -> None:
        if k < 1:
            raise NotAllowedError(f"k is {k}", "an integer of 1 or more")
        for name in fields:
            if name not in self.item_fields:
                raise NotAllowedError(
                    f"fields: items have no column {name!r}",
                    ", ".join(self.item_fields) or "none: items have ids only",
                )

    def _encode(self, inputs: Sequence[Input]) -> npt.NDArray[np.float32]:
        """Return the query embeddings [B, D]."""
        if not inputs:
            return np.zeros((0, self._searcher.dim), np.float32)
        batch = self._features(*self._inputs.batch(inputs))
        return np.asarray(self._model.encode_queries(batch).numpy(), dtype=np.float32)

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

    def _ranking(self) -> npt.NDArray[np.int64]:
        """Return the item rows that can be answered, the most popular first, those of updates last."""
        built = np.array(self._generation.popularity, dtype=np.int64)
        later = np.setdiff1d(np.arange(len(self._item_ids)), built, assume_unique=True)
        ranking = np.concatenate([built, later])
        return ranking[self._searcher.contains(ranking)]

    def _popular(self, excluded: npt.NDArray[np.int64], k: int, allowed: Allowed | None) -> Hits:
        """Return the most popular items that are allowed and not excluded."""
        # Of the first k + e at most e are excluded; a filter may look further down the ranking.
        start, size = 0, k + len(excluded)
        kept = np.zeros(0, np.int64)
        while start < len(self._popularity) and len(kept) < k:
            block = self._popularity[start : start + size]
            inside = ~np.isin(block, excluded)
            if allowed is not None:
                inside &= allowed.contains(block)
            kept = np.concatenate([kept, start + np.flatnonzero(inside)])
            start, size = start + size, size * 4
        kept = kept[:k]
        return Hits(self._popularity[kept], self._popularity_scores[kept])

    def _described(self, hits: Hits, fields: Sequence[str]) -> list[dict[str, Any]]:
        ids = self._item_ids.ids(hits.item_rows)
        scores = hits.scores.tolist()
        if not fields:
            return [{"item_id": i, "score": s} for i, s in zip(ids, scores, strict=True)]
        values = self._items.take(hits.item_rows, fields)
        return [
            {"item_id": ids[m], "score": scores[m], **{name: values[name][m] for name in fields}}
            for m in range(len(ids))
        ]


def make_inputs(generation: Generation) -> Inputs:
    """Return what resolves queries against the tables of a generation."""
    users = UserTable(
        generation.user_ids,
        generation.histories,
        generation.seen_offsets,
        generation.seen_item_rows,
        generation.user_columns,
    )
    return Inputs(generation.schema, users, generation.item_ids)


def allowed_items(
    generation: Generation,
    filter: Mapping[str, Any] | None = None,
    allow_items: Sequence[str] | None = None,
    exclude_items: Sequence[str] = (),
) -> Allowed | None:
    """Return the items that may be answered, None where nothing restricts them.

    Args:
        generation: of the items.
        filter: predicates, all of which an item must satisfy.
        allow_items: ids that alone are allowed; unknown ones are passed over.
        exclude_items: ids that are not; unknown ones are passed over.

    Raises:
        NotAllowedError: the filter is not allowed.
    """
    sets = []
    ids = generation.item_ids
    if filter is not None and filter != {}:
        sets.append(generation.attributes.allowed(filter))
    if allow_items is not None:
        sets.append(Allowed.of_rows(ids.rows(allow_items, missing="negative"), len(ids)))
    if exclude_items:
        sets.append(~Allowed.of_rows(ids.rows(exclude_items, missing="negative"), len(ids)))
    return functools.reduce(operator.and_, sets) if sets else None


def popularity_scores(
    ranking: npt.NDArray[np.int64], seen_item_rows: npt.NDArray[np.int32], num_users: int, num_items: int
) -> npt.NDArray[np.float32]:
    """Return the score of each place of the popularity ranking: the share of users who have had the item.

    The ranking counts positive interactions, having had an item counts of every kind. Where the two
    disagree, a score is lowered to that of the place before, so that scores fall along the ranking.

    Args:
        ranking: [n] int64 item rows, the most popular first.
        seen_item_rows: [m] int32, each user's seen items one after the other; may be memory-mapped.
        num_users: number of users.
        num_items: items of the vocabulary.
    """
    counts = np.zeros(num_items, np.int64)
    for start in range(0, len(seen_item_rows), _BLOCK_ROWS):
        counts += np.bincount(seen_item_rows[start : start + _BLOCK_ROWS], minlength=num_items)
    shares = counts[ranking] / max(num_users, 1)
    return np.minimum.accumulate(shares).astype(np.float32)


def _timing(start: float, encoded: float, searched: float) -> dict[str, float]:
    end = time.perf_counter()
    return {
        "encode": (encoded - start) * 1e3,
        "search": (searched - encoded) * 1e3,
        "total": (end - start) * 1e3,
    }
