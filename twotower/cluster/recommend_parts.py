"""Parts of an offline top k: the workers that write them, and what a whole part is.

A part is a Parquet file for a range of users or of queries. It is written whole or not at all, its name says
its range, and its footer counts those that it was for and those that got nothing.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.cluster.pool import pin_threads
from twotower.data.vocabulary import FORGOTTEN
from twotower.errors import ArtefactError, DataError, NotAllowedError
from twotower.generations.generation import Generation
from twotower.index.allowed import Allowed
from twotower.retrieval.front import make_inputs
from twotower.retrieval.query import Query
from twotower.retrieval.query_rows import read_queries
from twotower.retrieval.retriever import Retriever

_ASKED, _EMPTY = "num_asked", "num_empty"
_BY_FEATURES, _IGNORED = "num_by_features", "num_ignored"
_AT_ONCE = 256
"""Users or queries of one batch of the retriever."""
_GROUP_ROWS = 1 << 18
"""Rows from which a row group is written."""
MAX_SHOWN = 5
"""Bad queries that are named."""

SCHEMA = pa.schema(
    [("user_id", pa.string()), ("rank", pa.int32()), ("item_id", pa.string()), ("score", pa.float32())]
)
"""Columns of the parts; ranks count from 1. Behind them come the columns of ``recommend.fields``."""

QUERIES_SCHEMA = pa.schema(
    [("query_id", pa.string()), SCHEMA.field(0), ("strategy", pa.string()), *list(SCHEMA)[1:]]
)
"""The same for files of queries; ``user_id`` is null where a query has none."""


class CheckQueries:
    """Checks ranges of files of queries; a worker of the pool."""

    def __init__(self, generation: str, k: int, exclude_seen: bool, device: str, threads: int) -> None:
        """Open what queries are checked against; no model and no index.

        Args:
            generation: directory.
            k: of queries that name none, and the most that one may name.
            exclude_seen: of queries that do not say.
            device: taken as given; nothing is computed.
            threads: likewise.
        """
        self._generation = Generation.open(Path(generation), verify=False)
        self._inputs = make_inputs(self._generation)
        self._k = k
        self._exclude_seen = exclude_seen

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return how many queries of the range in the first row are bad, and what is wrong with some."""
        part = _first(batch)
        bad = 0
        shown: list[str] = []
        for row in read_queries(part, self._k, self._exclude_seen):
            try:
                self._check(row.query)
            except (NotAllowedError, DataError) as error:
                bad += 1
                if len(shown) < MAX_SHOWN:
                    shown.append(f"{row.where}: {error}")
        texts = pa.array([shown], pa.list_(pa.string()))
        return pa.table({"start": [part["start"]], "asked": [num_asked(part)], "bad": [bad], "shown": texts})

    def _check(self, query: Query | NotAllowedError | DataError) -> None:
        if not isinstance(query, Query):
            raise query
        self._inputs.check(query)
        if query.filter is not None:
            self._generation.attributes.check(query.filter)


class Recommend:
    """Recommends to ranges of users or of queries; a worker of the pool."""

    def __init__(
        self,
        generation: str,
        out: str,
        k: int,
        exclude_seen: bool,
        fields: list[str],
        among: Allowed | None,
        device: str,
        threads: int,
    ) -> None:
        """Open the generation, which the driver has verified.

        Args:
            generation: directory.
            out: folder of the parts.
            k: items for each user or query.
            exclude_seen: leave out what the user has already had.
            fields: columns of items that are written.
            among: item rows that alone may be recommended.
            device: taken as given; retrievers run on the CPU.
            threads: CPU threads.
        """
        pin_threads(threads)
        opened = Generation.open(Path(generation), verify=False)
        self._retriever = Retriever(opened, threads)
        self._user_ids = opened.user_ids
        self._out = Path(out)
        self._k = k
        self._exclude_seen = exclude_seen
        self._fields = fields
        self._among = among
        self._item_schema = self._retriever.item_table([], fields).schema

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Write the part of the range in the first row and return how many it was for."""
        part = _first(batch)
        base = QUERIES_SCHEMA if "path" in part else SCHEMA
        schema = pa.schema([*base, *list(self._item_schema)[1:]])
        asked = self._queries(part) if "path" in part else self._users(part)
        path = self._out / part_name(part["start"], part["stop"])
        write_part(
            path, (self._answered(ids, queries, schema) for ids, queries in asked), schema, num_asked(part)
        )
        return pa.table({"asked": [num_asked(part)]})

    def _users(self, part: dict[str, Any]) -> Iterator[tuple[list[str], list[Query]]]:
        for first in range(part["start"], part["stop"], _AT_ONCE):
            rows = np.arange(first, min(first + _AT_ONCE, part["stop"]))
            # Rows of users who were forgotten have no id.
            ids = [user_id for user_id in self._user_ids.ids(rows) if user_id != FORGOTTEN]
            yield ids, [Query(user_id=i, k=self._k, exclude_seen=self._exclude_seen) for i in ids]

    def _queries(self, part: dict[str, Any]) -> Iterator[tuple[list[str], list[Query]]]:
        ids: list[str] = []
        queries: list[Query] = []
        for row in read_queries(part, self._k, self._exclude_seen):
            if not isinstance(row.query, Query):
                raise DataError(f"{row.where}: {row.query}")
            ids.append(row.query_id)
            queries.append(row.query)
            if len(ids) == _AT_ONCE:
                yield ids, queries
                ids, queries = [], []
        if ids:
            yield ids, queries

    def _answered(
        self, ids: list[str], queries: list[Query], schema: pa.Schema
    ) -> tuple[pa.Table, Counter[str]]:
        """Return the rows of some users or queries, and the counts of ``check_part``."""
        found = self._retriever.find(queries, self._among)
        counts = np.array([len(one.hits.item_rows) for one in found])
        whose = pa.array(np.repeat(np.arange(len(found)), counts))
        begins = np.repeat(np.cumsum(counts) - counts, counts)
        columns = {
            "query_id": pa.array(ids, pa.string()).take(whose),
            "user_id": pa.array([query.user_id for query in queries], pa.string()).take(whose),
            "strategy": pa.array([one.strategy for one in found], pa.string()).take(whose),
            "rank": pa.array((np.arange(len(whose)) - begins + 1).astype(np.int32)),
            "score": pa.array(np.concatenate([one.hits.scores for one in found])),
        }
        rows = np.concatenate([one.hits.item_rows for one in found])
        items = self._retriever.item_table(rows, self._fields)
        columns |= {name: items.column(name) for name in items.column_names}
        facts = Counter({_EMPTY: int((counts == 0).sum())})
        for one in found:
            facts[_BY_FEATURES] += one.history.by_features
            facts[_IGNORED] += one.history.ignored
        return pa.table([columns[name] for name in schema.names], schema=schema), facts


def write_part(
    path: Path, tables: Iterator[tuple[pa.Table, Counter[str]]], schema: pa.Schema, count: int
) -> None:
    """Write a part so that a reader sees a whole file or none; its footer says how many it was for.

    Args:
        path: of the part.
        tables: rows, and what is counted of the users or queries they are for.
        schema: of the rows.
        count: users or queries.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            facts = Counter[str]({_EMPTY: 0, _BY_FEATURES: 0, _IGNORED: 0})
            held: list[pa.Table] = []
            for table, counted in tables:
                facts.update(counted)
                held.append(table)
                if sum(len(one) for one in held) >= _GROUP_ROWS:
                    writer.write_table(pa.concat_tables(held))
                    held = []
            if held:
                writer.write_table(pa.concat_tables(held))
            writer.add_key_value_metadata({_ASKED: str(count), **{n: str(v) for n, v in facts.items()}})
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _first(batch: pa.Table) -> dict[str, Any]:
    return {name: batch[name][0].as_py() for name in batch.column_names}


def num_asked(part: dict[str, Any]) -> int:
    """Return how many users or queries a part is for."""
    return int(part["stop"] - part["start"])


def part_name(start: int, stop: int) -> str:
    """Return the name of the file of a range."""
    return f"part-{start:010d}-{stop:010d}.parquet"


def check_part(path: Path, count: int, k: int) -> Counter[str]:
    """Return what is counted of a part.

    Its rows (``num_rows``), its users or queries without any (``num_empty``), and of the items of their
    histories those read by their features (``num_by_features``) and by nothing (``num_ignored``).

    Args:
        path: of the part.
        count: users or queries that it must be for.
        k: most rows of each.

    Raises:
        ArtefactError: it can not be read, or is not that part.
    """
    try:
        footer = pq.read_metadata(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ArtefactError(
            f"{path} can not be read ({error}); delete {path.parent} and recommend again"
        ) from None
    facts = footer.metadata or {}
    asked, empty = (int(facts.get(name.encode(), b"-1")) for name in (_ASKED, _EMPTY))
    if asked != count or not asked - empty <= footer.num_rows <= (asked - empty) * k:
        raise ArtefactError(
            f"{path} holds {footer.num_rows} rows for {asked} users or queries, {empty} of them without any; "
            f"it must hold 1 to {k} for each other of {count}. Delete {path.parent} and recommend again"
        )
    used = {name: int(facts.get(name.encode(), b"0")) for name in (_BY_FEATURES, _IGNORED)}
    return Counter({"num_rows": int(footer.num_rows), _EMPTY: empty, **used})
