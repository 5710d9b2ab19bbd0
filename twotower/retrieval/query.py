"""What is asked of a retriever, and what it answers. Loads neither torch nor faiss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from twotower.errors import NotAllowedError
from twotower.retrieval.wire import (
    ALLOWED_FEATURES,
    ALLOWED_ID,
    ALLOWED_TIME,
    History,
    Http,
    Id,
    Ids,
    Time,
)

Strategy = Literal["personal", "history", "features", "popular", "similar"]


ALLOWED_FILTER = 'an object such as {"genres": {"any_of": ["Comedy"]}, "year": {"gte": 1990}}'
"""What a filter may hold, for people."""


class UnknownItemError(NotAllowedError):
    """An item that is asked about is not in the catalogue (HTTP 404)."""


@dataclass(frozen=True)
class HistoryItem:
    """One item of a history that comes with a query.

    Example:
        >>> tt.HistoryItem("i1", time=1_700_000_000_000_000, weight=0.5).weight
        0.5
    """

    item_id: str
    """External id."""
    time: int | None = None
    """Microseconds UTC; an item without a time counts at every moment."""
    weight: float = 1.0
    """Weight of the interaction, at most ``schema.MAX_WEIGHT`` either way."""
    features: Mapping[str, Any] = field(default_factory=dict)
    """Values by column of the item table: what an item is read by that the generation does not know."""


@dataclass(frozen=True)
class HistoryUse:
    """What the items of a query's history were read by, of those that a model looks at."""

    by_id: int = 0
    """Items that the model was trained with."""
    by_features: int = 0
    """Others, whose features are known or came with the query."""
    ignored: int = 0
    """Others of which nothing is known; they take no place."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """The question "which k items for this user, now?".

    Example:
        >>> known = tt.Query(user_id="u1", k=2, exclude_items=["i3"])
        >>> unknown = tt.Query(k=2, history=[tt.HistoryItem("i1"), tt.HistoryItem("i2")])
        >>> [len(tt.Retriever.open(generation).retrieve(query).items) for query in (known, unknown)]
        [2, 2]
    """

    k: Annotated[int, Http(int, "Number of items wanted.")]
    """Number of items wanted, 1 or more."""
    user_id: Annotated[
        str | None,
        Http(
            Id | None,
            "The user; an unknown one is served from history or features, and with neither from popularity.",
            f"{ALLOWED_ID}; or null",
        ),
    ] = None
    """External id; None or an unknown one is served from history or features, else from popularity."""
    history: Annotated[
        Sequence[HistoryItem] | None,
        Http(
            History | None,
            "The user's items, oldest first; replaces the stored history.",
            "a list, oldest first, of item ids or "
            '{"item_id": ..., "time": ..., "weight": ..., "features": ...}; or null',
            most="max_history",
        ),
    ] = None
    """The user's items, oldest first; None takes the stored history."""
    features: Annotated[
        dict[str, Any],
        Http(
            dict[str, Any],
            "Values of user feature columns; each replaces the stored value.",
            ALLOWED_FEATURES,
        ),
    ] = field(default_factory=dict)
    """Values by column of the user table; each replaces the stored value, None stands for missing."""
    at: Annotated[
        int | None,
        Http(
            Time | None,
            "What of the user's history counts: what happened strictly before this moment; now when not "
            "given. A\nmoment so far back that the generation does not keep all that counts is refused: send "
            "``history`` then.\nThe user's columns, what has been seen, and what is popular, are as of the "
            "generation all the same.",
            f"{ALLOWED_TIME}; or null, which is now",
        ),
    ] = None
    """Microseconds UTC; of the history only what happened strictly before it counts. None is now. It is an
    error where the generation does not keep enough of the user's history to know what that was."""
    exclude_seen: Annotated[
        bool,
        Http(
            bool,
            "Leave out what the user has already had, and the items of ``history``.",
            "true or false",
        ),
    ] = True
    """Leave out what the user has already had, and the items of ``history``."""
    exclude_items: Annotated[
        Sequence[str], Http(Ids, "Further items to leave out.", "a list of item ids", most="max_ids")
    ] = ()
    """Further external ids to leave out; unknown ones are passed over."""
    allow_items: Annotated[
        Sequence[str] | None,
        Http(
            Ids | None,
            "Items that alone may be answered; all when not given.",
            "a list of item ids; or null, which allows every item",
            most="max_ids",
        ),
    ] = None
    """External ids that alone may be answered; unknown ones are passed over. None allows every item."""
    filter: Annotated[
        Mapping[str, Any] | None,
        Http(
            dict[str, Any] | None,
            "Predicates by attribute, all of which an item must satisfy: any_of, all_of and none_of take "
            "lists of\nvalues, gte, gt, lte and lt a bound. GET /v1/generation lists the attributes and "
            "their operators.",
            f"{ALLOWED_FILTER}; or null",
        ),
    ] = None
    """Predicates over attributes, as ``Attributes.allowed`` takes them; an item must satisfy all of them."""
    fields: Annotated[
        Sequence[str],
        Http(
            Annotated[list[str], Field(fail_fast=True)],
            "Columns of the item table to return with each item.",
            "a list of names of item columns",
            most="max_fields",
        ),
    ] = ()
    """Item columns to return with each item."""


@dataclass(frozen=True)
class Answer:
    """The items of one query."""

    generation: str
    """Id of the generation that answered."""
    items: list[dict[str, Any]]
    """Best first: item_id, score, and the fields that were asked for."""
    strategy: Strategy
    """What the answer was made from."""
    timing_ms: dict[str, float]
    """Milliseconds by stage: encode, search, total."""
    history: HistoryUse | None = None
    """What the user's items were read by; None of similar items."""
    missing_groups: tuple[str, ...] = ()
    """Shard groups that did not answer, in the sharded topology; the items are the best of the others."""
