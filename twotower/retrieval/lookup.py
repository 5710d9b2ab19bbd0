"""Looking things up in a generation by what a person types: users by id, items by title, a user's history.

For the demo page and for looking around; no recommendation goes through here. A user's history is personal
data: whoever may ask for it may read what any user has had.

Symbols: N items that can be answered, U users.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from twotower.errors import NotAllowedError, shown
from twotower.generations.generation import Generation

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BLOCK_USERS = 1 << 20
_MOST_SCANNED = 16 * _BLOCK_USERS


class UnknownUserError(NotAllowedError):
    """A user who is asked about is not known (HTTP 404)."""


@dataclass(frozen=True)
class NamedItem:
    """An item as people know it."""

    item_id: str
    """External id."""
    title: str | None
    """None where it has none, or is not in the catalogue."""


@dataclass(frozen=True)
class PastItem:
    """One interaction of a stored history."""

    item_id: str
    """External id."""
    title: str | None
    """None where it has none, or is not in the catalogue."""
    time: str | None
    """ISO 8601, UTC; None where the data have no times."""
    weight: float
    """Weight of the interaction."""


@dataclass(frozen=True)
class UserHistory:
    """What a generation holds of what a user did."""

    items: list[PastItem]
    """Positive interactions, the latest first: as many as the model looks at."""
    num_seen: int
    """Different items he ever had, of every kind of interaction."""


def find_users(generation: Generation, prefix: str, limit: int) -> list[str]:
    """Return ids of known users that begin with a text, the user of just that id first, then in row order.

    An empty text gives users from all over the table as examples. Of more than 16M users the first 16M are
    looked through.

    Args:
        generation: of the users.
        prefix: first characters of the id; case matters, as it does in ids.
        limit: most ids, 1 or more.
    """
    ids = generation.user_ids
    if not prefix:
        spread = np.linspace(0, max(len(ids) - 1, 0), min(limit, len(ids))).astype(np.int64)
        # In the row of a user who was forgotten stands no id.
        return [user_id for user_id in ids.ids(spread) if user_id]
    found = [prefix] if prefix in ids else []
    for start in range(0, min(len(ids), _MOST_SCANNED), _BLOCK_USERS):
        block = ids.array.slice(start, _BLOCK_USERS)
        matches = np.flatnonzero(np.asarray(pc.starts_with(block, prefix)))[: limit + 1]
        found += [user_id for user_id in ids.ids(start + matches) if user_id != prefix]
        if len(found) >= limit:
            break
    return found[:limit]


def user_history(generation: Generation, user_id: str) -> UserHistory:
    """Return the stored history of a user.

    Raises:
        UnknownUserError: there is no such user.
    """
    row = generation.user_ids.row(user_id)
    if row is None:
        raise UnknownUserError(f"user {shown(user_id)} is not known", "the id of a user with interactions")
    histories = generation.histories
    begin, end = int(histories.offsets[row]), int(histories.offsets[row + 1])
    own = slice(max(begin, end - generation.schema.max_history), end)
    item_rows = histories.item_rows[own][::-1]
    times = histories.times[own][::-1].tolist()
    weights = histories.weights[own][::-1].tolist()
    timed = generation.as_of is not None
    items = [
        PastItem(named.item_id, named.title, _iso(time) if timed else None, weight)
        for named, time, weight in zip(named_items(generation, item_rows), times, weights, strict=True)
    ]
    return UserHistory(items, len(generation.seen(row)))


def find_items(generation: Generation, text: str, limit: int) -> list[NamedItem]:
    """Return items by title or id: of just this id, of titles that begin with the text, that contain it.

    Upper and lower case are the same in titles. Of each kind popular items come first, those of updates last.

    Args:
        generation: of the items.
        text: what was typed, one character or more.
        limit: most items, 1 or more.
    """
    exact = generation.item_ids.row(text)
    found = np.array([] if exact is None else [exact], np.int64)
    found = found[generation.items.contains(found)]
    rows, begins = generation.items.matching("title", text)
    for kind in (rows[begins], rows[~begins]):
        wanted = np.zeros(len(generation.item_ids), np.bool_)
        wanted[kind] = True
        wanted[found] = False
        ranking = generation.popularity
        popular = ranking[wanted[ranking]][:limit]
        # What an update added has no place in the ranking of the build.
        wanted[ranking] = False
        found = np.concatenate([found, popular, np.flatnonzero(wanted)[:limit]])
    return named_items(generation, found[:limit])


def named_items(generation: Generation, item_rows: npt.ArrayLike) -> list[NamedItem]:
    """Return the ids and titles of item rows, in their order; some may be outside the catalogue."""
    rows = np.asarray(item_rows, dtype=np.int64)
    there = generation.items.contains(rows)
    titles = iter(generation.items.take(rows[there], ["title"])["title"])
    return [
        NamedItem(item_id, next(titles) if known else None)
        for item_id, known in zip(generation.item_ids.ids(rows), there.tolist(), strict=True)
    ]


def _iso(microseconds: int) -> str | None:
    """Return a time as text; None where it is no time that a calendar has."""
    try:
        return (_EPOCH + timedelta(microseconds=microseconds)).isoformat().replace("+00:00", "Z")
    except OverflowError:
        return None
