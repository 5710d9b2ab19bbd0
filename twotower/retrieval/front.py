"""Everything of an answer but the search of the shards: queries to vectors, and item rows to items.

A front holds one generation and never changes, so that threads can share it. A query becomes rows
(``Inputs``), rows become features and an embedding (the query tower); what a search finds becomes ids,
scores and columns. Who has neither a history nor features is answered here, from the popularity ranking.

Shapes: B queries, R of them that are searched, D embedding_dim, K results, N catalogue items.
"""

from __future__ import annotations

import functools
import math
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from twotower.data.dataset import ITEM_ROW
from twotower.errors import NotAllowedError, shown
from twotower.index.allowed import Allowed
from twotower.index.hits import Hits
from twotower.index.recall import index_recalls
from twotower.model.batch import to_device
from twotower.model.checkpoint import Checkpoint
from twotower.model.described import describe_items
from twotower.model.features import QueryFeatures, encode_columns
from twotower.model.unknown_items import DescribedItems
from twotower.retrieval.encoding import encode_table
from twotower.retrieval.generation import Generation
from twotower.retrieval.inputs import Input, Inputs, UserTable
from twotower.retrieval.pause import pause
from twotower.retrieval.popularity import Popularity
from twotower.retrieval.query import HistoryItem, Query, UnknownItemError

TIES = 16
"""Items behind the last of an exact search that are looked at for their scores."""

_WARM_UP_QUERIES = 12
# Up to so many of each, a query takes about as long as most do.
_FEW_IDS = 200
_FEW_SEEN = 1_000
_FEW_FIELDS = 8


@dataclass(frozen=True)
class Encoded:
    """Queries, and what a search of the shards needs to know of them."""

    queries: Sequence[Query]
    """B queries."""
    inputs: list[Input]
    """Each query in rows."""
    searched: list[int]
    """Places of the R queries that are searched; the others are answered from popularity."""
    vectors: npt.NDArray[np.float32]
    """[R, D] query embeddings, in the order of ``searched``."""


class Front:
    """The query tower, the user table and the item tables of one generation."""

    def __init__(self, generation: Generation, threads: int = 1, device: str = "cpu") -> None:
        """Load what answers need beside the shards.

        Args:
            generation: an opened generation.
            threads: CPU threads of the query tower.
            device: of torch, for the query tower.
        """
        self._generation = generation
        self._threads = threads
        self._device = device
        self._checkpoint = generation.checkpoint(device)
        self._model = self._checkpoint.model
        pause()
        self._item_ids = generation.item_ids
        self._items = generation.items
        pause()
        self._answerable = generation.answerable_rows()
        pause()
        self._popularity = Popularity(generation, self._answerable)
        pause()
        self._described = described_items(generation, self._checkpoint)
        self._inputs = make_inputs(generation, self._described.any_read)
        self._features = QueryFeatures(self._checkpoint.schema, generation.profiles)
        self._usual_ms = math.inf
        self.prepare_thread()

    @property
    def generation(self) -> Generation:
        """What is answered from."""
        return self._generation

    @property
    def generation_id(self) -> str:
        """Id of the generation."""
        return self._generation.id

    @property
    def answerable(self) -> npt.NDArray[np.int64]:
        """Item rows that can be answered: ascending [num_items] int64."""
        return self._answerable

    @property
    def popularity(self) -> Popularity:
        """What those get of whom nothing is known."""
        return self._popularity

    def prepare_thread(self) -> None:
        """Set the number of torch threads; call it once in each thread that retrieves."""
        torch.set_num_threads(self._threads)

    def warm_up(self) -> None:
        """Do what answers do, so that the first one finds everything loaded, and see how long it takes."""
        # Filters and descriptions need them; they are made of every item when they are first asked for.
        _ = self._generation.attributes
        self._measure(lambda query: self.encode([query]))

    @property
    def usual_ms(self) -> float:
        """Least milliseconds of a usual query in ``warm_up``; infinite before it."""
        return self._usual_ms

    def usual(self, query: Query) -> bool:
        """Return whether a query takes about as long as most do.

        One does not that names much, whose user has had much, or whose answers are restricted to a part of
        the catalogue.
        """
        return (
            not query.filter
            and query.allow_items is None
            and query.k <= _FEW_IDS
            and len(query.fields) <= _FEW_FIELDS
            and len(query.exclude_items) <= _FEW_IDS
            and (query.history is None or _few_items(query.history))
            and (not query.features or _few(query.features))
            and self._inputs.num_seen(query.user_id) <= _FEW_SEEN
        )

    def _measure(self, work: Callable[[Query], object]) -> None:
        """Note how long work on a query takes when nothing else runs: the least of a few times."""
        query = Query(k=100, history=[HistoryItem(self._item_ids.id(0))])
        times = []
        for _ in range(_WARM_UP_QUERIES):
            start = time.perf_counter()
            work(query)
            times.append(time.perf_counter() - start)
            pause()
        self._usual_ms = min(times) * 1e3

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

    def encode(self, queries: Sequence[Query]) -> Encoded:
        """Return queries with their embeddings, after checking them.

        Raises:
            RequestError: a query asks for something that is not allowed.
        """
        now = time.time_ns() // 1000
        for query in queries:
            self.check(query.k, query.fields)
        inputs = self._inputs.resolve_all(queries, now)
        searched = [i for i, each in enumerate(inputs) if each.strategy != "popular"]
        return Encoded(queries, inputs, searched, self._vectors([inputs[i] for i in searched]))

    def index_recall_of(self, exact: Hits, item_ids: Sequence[str], k: int) -> float | None:
        """Return the index recall of an answer: the share of the k best items that it holds, in [0, 1].

        Args:
            exact: the best k + ``TIES`` items by exact search: those that tie with the last one are as good.
            item_ids: what was answered.
            k: of the query.

        Returns:
            None where nothing is allowed.
        """
        rows = self._item_ids.rows(item_ids)
        shares = index_recalls([Hits(rows, np.zeros(len(rows), np.float32))], [exact], k)
        return float(shares[0]) if len(shares) else None

    def row_of(self, item_id: str) -> int:
        """Return the row of an item that can be answered.

        Raises:
            UnknownItemError: there is none.
        """
        row = self._item_ids.row(item_id)
        if row is None or not self._answers(row):
            reason = "is not known"
            if row is not None:
                reason = "is not in the catalogue: it only occurs in interactions, or was deleted"
            raise UnknownItemError(f"item {shown(item_id)} {reason}", "the id of an item of the catalogue")
        return row

    def _answers(self, row: int) -> bool:
        at = int(np.searchsorted(self._answerable, row))
        return at < len(self._answerable) and int(self._answerable[at]) == row

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

    def encode_items(self, item_rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return the vectors that the item tower gives to items [m], from their stored columns, [m, D]."""
        table = self._items.table(item_rows).append_column(ITEM_ROW, pa.array(item_rows))
        return encode_table(self._checkpoint, table)

    def describe_hits(self, hits: Hits, fields: Sequence[str]) -> list[dict[str, Any]]:
        """Return item_id, score and fields of each hit, in order."""
        ids = self._item_ids.ids(hits.item_rows)
        scores = hits.scores.tolist()
        if not fields:
            return [{"item_id": i, "score": s} for i, s in zip(ids, scores, strict=True)]
        values = self._items.take(hits.item_rows, fields)
        return [
            {"item_id": ids[m], "score": scores[m], **{name: values[name][m] for name in fields}}
            for m in range(len(ids))
        ]

    def check(self, k: int, fields: Sequence[str]) -> None:
        """Check k and the fields of a query.

        Raises:
            NotAllowedError: k is not positive, or items have no such field.
        """
        if k < 1:
            raise NotAllowedError(f"k is {k}", "an integer of 1 or more")
        for name in fields:
            if name not in self.item_fields:
                raise NotAllowedError(
                    f"fields: items have no column {name!r}",
                    ", ".join(self.item_fields) or "none: items have ids only",
                )

    def as_queries(self, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return vectors of items, [m, D], as queries for what is near: without what ``item_bias`` adds."""
        if self._checkpoint.config.model.item_bias:
            vectors = vectors.copy()
            vectors[:, -1] = 0
        return vectors

    def _vectors(self, inputs: Sequence[Input]) -> npt.NDArray[np.float32]:
        """Return the query embeddings [B, D]."""
        if not inputs:
            return np.zeros((0, self._generation.manifest["embedding_dim"]), np.float32)
        described = None
        if any(each.use.by_features for each in inputs):
            described = self._described
            if (given := self._inputs.described_columns(inputs)) is not None:
                count = sum(len(each.described) for each in inputs)
                described = described.joined(describe_items(self._model, given, count))
        batch = self._features(*self._inputs.batch(inputs), described=described)
        if self._device != "cpu":
            batch = to_device(batch, self._device)
        vectors = np.asarray(self._model.encode_queries(batch).cpu().numpy(), dtype=np.float32)
        # Nothing is near a vector of NaN: a search refuses it, and could not say why.
        if not np.isfinite(vectors).all():
            raise NotAllowedError(
                "the query's vector holds NaN or infinity: the history's weights or the features hold "
                "a number too large to encode",
                "smaller numbers",
            )
        return vectors


def _few(features: Mapping[str, Any]) -> bool:
    """Return whether the values of features are few and short."""
    values = features.values()
    return len(features) <= _FEW_FIELDS and all(
        len(value) <= _FEW_IDS for value in values if isinstance(value, (str, list))
    )


def _few_items(history: Sequence[HistoryItem]) -> bool:
    """Return whether a history is short, and none of its items is described."""
    return len(history) <= _FEW_IDS and not any(item.features for item in history)


def later_rows(generation: Generation) -> npt.NDArray[np.int64]:
    """Return the rows of items that updates added, which no tower was trained with: ascending [d] int64."""
    rows = generation.delta_rows
    return rows[rows >= generation.schema.num_items]


def described_items(generation: Generation, checkpoint: Checkpoint) -> DescribedItems:
    """Return what histories read of the items that updates added, in the order of ``later_rows``."""
    schema, rows = checkpoint.schema, later_rows(generation)
    table = generation.items.table(rows, [c for c in schema.item_columns if c in generation.items.fields])
    if not len(rows):
        table = generation.items.schema.empty_table()
    return describe_items(checkpoint.model, encode_columns(schema.item, table), len(rows))


def make_inputs(generation: Generation, describes: bool = True) -> Inputs:
    """Return what resolves queries against the tables of a generation.

    Args:
        generation: the generation.
        describes: whether histories can read items by their features.
    """
    users = UserTable(
        generation.user_ids,
        generation.histories,
        generation.seen_offsets,
        generation.seen_item_rows,
        generation.user_columns,
    )
    return Inputs(generation.schema, users, generation.item_ids, later_rows(generation), describes)


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


def timing(start: float, encoded: float, searched: float) -> dict[str, float]:
    """Return the milliseconds of each stage, given when it began and what each ended at, until now."""
    end = time.perf_counter()
    return {
        "encode": (encoded - start) * 1e3,
        "search": (searched - encoded) * 1e3,
        "total": (end - start) * 1e3,
    }
