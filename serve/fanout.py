"""Around the fan-out to shard groups: queries become a message, and what was found becomes answers."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from twotower.index.hits import Hits
from twotower.retrieval.front import Encoded, Front, allowed_items, timing
from twotower.retrieval.groups import GroupQuery, merge_groups, pack_search
from twotower.retrieval.query import Answer, Query


def encode_for_groups(
    front: Front, queries: Sequence[Query]
) -> tuple[float, Encoded, dict[int, Hits], bytes]:
    """Encode queries and pack what the groups are asked.

    Args:
        front: of the generation.
        queries: B queries.

    Returns:
        reading of ``time.perf_counter`` when this began, the encoded queries, the hits of those that
        popularity answers by their place among the B, and the message for the groups.

    Raises:
        RequestError: a query asks for something that is not allowed.
    """
    start = time.perf_counter()
    generation = front.generation
    for query in queries:
        if query.filter:
            generation.attributes.check(query.filter)
    encoded = front.encode(queries)
    hits = {}
    for place, (query, each) in enumerate(zip(queries, encoded.inputs, strict=True)):
        if each.strategy == "popular":
            only = allowed_items(generation, query.filter, query.allow_items)
            hits[place] = front.popularity.best(each.excluded, query.k, only)
    asked = [group_query(front, queries[i], encoded.inputs[i].excluded) for i in encoded.searched]
    return start, encoded, hits, pack_search(front.generation_id, encoded.vectors, asked)


def group_query(front: Front, query: Query, excluded: npt.NDArray[np.int64]) -> GroupQuery:
    """Return what groups are asked for a query, without what must not be answered: item rows [E] int64."""
    rows = None
    if query.allow_items is not None:
        rows = front.generation.item_ids.rows(query.allow_items, missing="negative")
    return GroupQuery(query.k, excluded, dict(query.filter) if query.filter else None, rows)


def describe_found(
    front: Front,
    encoded: Encoded,
    hits: dict[int, Hits],
    found: list[list[Hits]],
    missing: tuple[str, ...],
    times: tuple[float, float, float],
) -> list[Answer]:
    """Return the answers to queries, in their order.

    Args:
        front: of the generation.
        encoded: the queries.
        hits: of those that popularity answers, by place; the others are added to it.
        found: of each group that answered, the hits of each searched query.
        missing: names of the groups that did not.
        times: readings of ``time.perf_counter`` at the beginning, after encoding and after the search.
    """
    for at, place in enumerate(encoded.searched):
        hits[place] = merge_groups([group[at] for group in found], encoded.queries[place].k)
    items = [front.describe_hits(hits[i], query.fields) for i, query in enumerate(encoded.queries)]
    took = timing(*times)
    searched = set(encoded.searched)
    return [
        Answer(front.generation_id, its, each.strategy, took, each.use, missing if i in searched else ())
        for i, (its, each) in enumerate(zip(items, encoded.inputs, strict=True))
    ]
