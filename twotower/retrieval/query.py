"""What is asked of a retriever, and what it answers. Loads neither torch nor faiss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from twotower.errors import NotAllowedError

Strategy = Literal["personal", "history", "features", "popular", "similar"]


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

    k: int
    """Number of items wanted, 1 or more."""
    user_id: str | None = None
    """External id; None or an unknown one is served from history or features, else from popularity."""
    history: Sequence[HistoryItem] | None = None
    """The user's items, oldest first; None takes the stored history."""
    features: dict[str, Any] = field(default_factory=dict)
    """Values by column of the user table; each replaces the stored value, None stands for missing."""
    at: int | None = None
    """Microseconds UTC; of the history only what happened strictly before it counts. None is now. It is an
    error where the generation does not keep enough of the user's history to know what that was."""
    exclude_seen: bool = True
    """Leave out what the user has already had, and the items of ``history``."""
    exclude_items: Sequence[str] = ()
    """Further external ids to leave out; unknown ones are passed over."""
    allow_items: Sequence[str] | None = None
    """External ids that alone may be answered; unknown ones are passed over. None allows every item."""
    filter: Mapping[str, Any] | None = None
    """Predicates over attributes, as ``Attributes.allowed`` takes them; an item must satisfy all of them."""
    fields: Sequence[str] = ()
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
