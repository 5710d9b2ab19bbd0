"""What a query knows and what counts as relevant: one rule for validation, the final evaluation and gates.

A user with positive interactions in a held-out part is one query, asked at the moment of the first of them.
It knows the positives of the earlier parts strictly before that moment, never anything of its own time or
later. ``docs/knowledge.md`` has the rule in full, training and serving included.

Shapes: n interactions, Q queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from twotower.schema import KINDS, SPLITS

if TYPE_CHECKING:
    from twotower.data.dataset import Dataset
    from twotower.data.interactions import Interactions

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

Part = Literal["validation", "test"]
Ties = Literal["together", "order"]
Repeats = Literal["exclude", "include"]

_EARLIER: dict[Part, tuple[Literal["train", "validation"], ...]] = {
    "validation": ("train",),
    "test": ("train", "validation"),
}


@dataclass(frozen=True)
class Rules:
    """What decides what a query knows and what is relevant to it."""

    num_catalogue_items: int
    """Items of larger rows are never masked or relevant: they can not be answered."""
    has_times: bool
    """Without times a query knows everything of the earlier parts."""
    ties: Ties
    """``split.ties``."""
    repeats: Repeats = "exclude"
    """``evaluation.repeats``: whether what a user has had can be relevant, and is then not masked."""

    @classmethod
    def of(cls, dataset: Dataset, repeats: Repeats) -> Rules:
        """Return the rules of a dataset."""
        return cls(dataset.num_catalogue_items, dataset.has_times, dataset.ties, repeats)


@dataclass(frozen=True)
class Holdout:
    """Queries of users with relevant items, in ascending order of user_row."""

    user_rows: IntArray
    """[Q] int64."""
    masked_offsets: IntArray
    """[Q + 1] int64."""
    masked_rows: IntArray
    """Catalogue items that are left out of each user's list, ascending."""
    relevant_offsets: IntArray
    """[Q + 1] int64."""
    relevant_rows: IntArray
    """Catalogue items of each user's held-out positives, without masked ones, ascending."""
    counts: dict[str, int]
    """Users and items that were left out, by reason; see ``holdout``."""

    def __len__(self) -> int:
        """Return Q."""
        return len(self.user_rows)

    def part(self, start: int, stop: int) -> Holdout:
        """Return queries ``start`` to ``stop``, with the counts of the whole."""
        masked = slice(self.masked_offsets[start], self.masked_offsets[stop])
        relevant = slice(self.relevant_offsets[start], self.relevant_offsets[stop])
        return Holdout(
            np.asarray(self.user_rows[start:stop]),
            self.masked_offsets[start : stop + 1] - self.masked_offsets[start],
            np.asarray(self.masked_rows[masked]),
            self.relevant_offsets[start : stop + 1] - self.relevant_offsets[start],
            np.asarray(self.relevant_rows[relevant]),
            self.counts,
        )


def holdout(
    interactions: Interactions, part: Part, rules: Rules, max_users: int | None = None, seed: int = 0
) -> Holdout:
    """Return the queries of a held-out part; none where no user has a relevant item.

    Masked are the items of the earlier parts, of every kind but impressions; relevant are the items of the
    part's positives that are not masked. With ``repeats: include`` nothing is masked.

    ``counts`` holds ``users`` (with any interaction), ``without_relevant`` (of these, left out because no
    item of their held-out interactions counts), ``not_drawn``, ``evaluated``, and of all positive held-out
    interactions ``outside_catalogue`` and ``had_before`` (pairs left out) and ``relevant`` (of drawn users).

    Args:
        interactions: sorted, all of each of their users.
        part: the held-out split that is asked about.
        rules: of the dataset.
        max_users: the most queries; drawn with ``seed`` where there are more.
        seed: of the draw.
    """
    num_items = rules.num_catalogue_items
    catalogue = interactions.item_row < num_items
    positive = (interactions.split == SPLITS[part]) & (interactions.kind == KINDS["positive"])
    wanted = _pairs(interactions, positive & catalogue, num_items)
    had = np.empty(0, np.int64)
    if rules.repeats == "exclude":
        had = _pairs(interactions, _earlier(interactions, part) & catalogue & _had(interactions), num_items)
    new = np.setdiff1d(wanted, had, assume_unique=True)
    users = np.unique(new // max(num_items, 1))
    drawn = users
    if max_users is not None and len(users) > max_users:
        drawn = np.sort(np.random.default_rng([seed, 2]).choice(users, max_users, replace=False))
    relevant = _compressed(new, drawn, num_items)
    num_active = len(np.unique(interactions.user_row))
    counts = {
        "users": num_active,
        "without_relevant": num_active - len(users),
        "not_drawn": len(users) - len(drawn),
        "evaluated": len(drawn),
        "outside_catalogue": int((positive & ~catalogue).sum()),
        "had_before": len(wanted) - len(new),
        "relevant": len(relevant[1]),
    }
    return Holdout(drawn, *_compressed(had, drawn, num_items), *relevant, counts)


def known(interactions: Interactions, part: Part, rules: Rules) -> BoolArray:
    """Return which interactions the query of their user knows, [n] bool; of every kind.

    These are interactions of the earlier parts, strictly before the user's first positive of ``part``: by
    time, or with ``ties: order`` by time and then the order of the rows. Users without a query know nothing.

    Args:
        interactions: sorted, all of each of their users.
        part: the held-out split that is asked about.
        rules: of the dataset.
    """
    asked = (interactions.split == SPLITS[part]) & (interactions.kind == KINDS["positive"])
    users, first = np.unique(interactions.user_row[asked], return_index=True)
    if len(users) == 0:
        return np.zeros(len(interactions), np.bool_)
    first = np.flatnonzero(asked)[first]
    place = np.minimum(np.searchsorted(users, interactions.user_row), len(users) - 1)
    result: BoolArray = (users[place] == interactions.user_row) & _earlier(interactions, part)
    if rules.has_times and rules.ties == "order":
        result &= np.arange(len(interactions)) < first[place]
    elif rules.has_times:
        result &= interactions.time < interactions.time[first[place]]
    return result


def nothing_relevant(part: Part, rules: Rules) -> str:
    """Return why a held-out part can not be measured, and what to do, for an error."""
    new = " that they did not have before" if rules.repeats == "exclude" else ""
    return (
        f"no user has a positive {part} interaction on a catalogue item{new}, so there is nothing to "
        "measure; look at split.kind, its shares, data.positives and the ids of the item table"
        + (", or set evaluation.repeats: include" if new else "")
    )


def _earlier(interactions: Interactions, part: Part) -> BoolArray:
    return np.isin(interactions.split, [SPLITS[name] for name in _EARLIER[part]])


def _had(interactions: Interactions) -> BoolArray:
    had: BoolArray = ~interactions.is_impression
    return had


def _pairs(interactions: Interactions, chosen: BoolArray, num_items: int) -> IntArray:
    """Distinct (user, item) pairs as one ascending number each."""
    users = interactions.user_row[chosen].astype(np.int64)
    return np.unique(users * num_items + interactions.item_row[chosen])


def _compressed(pairs: IntArray, users: IntArray, num_items: int) -> tuple[IntArray, IntArray]:
    """The pairs of ascending ``users`` as (offsets [Q + 1], item rows)."""
    begin = np.searchsorted(pairs, users * num_items)
    end = np.searchsorted(pairs, (users + 1) * num_items)
    offsets = np.concatenate([[0], np.cumsum(end - begin)]).astype(np.int64)
    # Position i of the result is position i - offsets[q] of user q's segment, which starts at begin[q].
    source = np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], end - begin)
    return offsets, pairs[source] % max(num_items, 1)
