"""A few test users with what they had, what the model recommends, and what they took next."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from twotower.data.dataset import Dataset
from twotower.data.knowledge import Holdout, Rules, known
from twotower.evaluation.plots import OTHER
from twotower.schema import KINDS

Ints = NDArray[np.int64]

SHOWN = 10
"""Items of each list of an example."""


class Examples:
    """Test users that are shown, of little to much history.

    The test users are cut into as many parts of equal size, by the length of their history, and one is drawn
    from each.

    Args:
        dataset: that is evaluated.
        held: its queries of the test split.
        count: users to show; all where there are fewer.
        seed: of the draw.
    """

    def __init__(self, dataset: Dataset, held: Holdout, count: int, seed: int) -> None:
        log = dataset.interactions
        # The rules for repeats decide what is asked for, not what is known.
        had = known(log, "test", Rules.of(dataset, "include")) & (log.kind == KINDS["positive"])
        lengths = np.bincount(log.user_row[had], minlength=dataset.num_users)[held.user_rows]
        # By chance who stands where among equal lengths.
        rng = np.random.default_rng([seed, 4])
        shuffled = rng.permutation(len(held))
        order = shuffled[np.argsort(lengths[shuffled], kind="stable")]
        parts = np.array_split(order, min(count, len(held))) if count else []
        self.places: Ints = np.array([rng.choice(part) for part in parts], dtype=np.int64)
        """[E] int64, positions in the holdout."""
        self._dataset, self._held = dataset, held
        self._history = [self._rows_of(int(held.user_rows[place]), had) for place in self.places]

    def _rows_of(self, user: int, had: NDArray[np.bool_]) -> Ints:
        """Rows of the log that the user's query knows, oldest first."""
        start, stop = self._dataset.interactions.user_offsets[user : user + 2]
        return start + np.flatnonzero(had[start:stop])

    def relevant(self, place: int) -> Ints:
        """Return the relevant items of a query, [r] int64."""
        start, stop = self._held.relevant_offsets[place : place + 2]
        return np.asarray(self._held.relevant_rows[start:stop], dtype=np.int64)

    def item_rows(self, lists: Ints) -> Ints:
        """Return the catalogue items [m] int64, ascending, that are shown with lists [E, K] int64."""
        log = self._dataset.interactions
        rows = [np.asarray(lists, np.int64).ravel()]
        rows += [log.item_row[history[-SHOWN:]].astype(np.int64) for history in self._history]
        rows += [self.relevant(place)[:SHOWN] for place in self.places]
        every = np.unique(np.concatenate(rows))
        return every[(every >= 0) & (every < self._dataset.num_catalogue_items)]

    def shown(self, lists: Ints, rows: Ints, groups: list[str]) -> list[dict[str, Any]]:
        """Return what a report shows of each user.

        Args:
            lists: [E, K] int64 item rows that the model recommends, best first, -1 padded.
            rows: [m] int64, of ``item_rows``.
            groups: [m], of these items, such as the main genre.

        Returns:
            One mapping a user: ``user_id``, ``key`` (see ``user_key``), ``num_history``, ``num_held_out`` and
            the lists ``history`` (the latest first, with ``time`` in microseconds UTC), ``recommended`` (with
            ``hit``) and ``held_out``, each item with ``item_id``, and ``title`` and ``group`` where it has
            one.
        """
        titles = self._dataset.item_table(["title"]).column(0).take(pa.array(rows)).to_pylist()
        about = {
            int(row): {"title": title, "group": None if group == OTHER else group}
            for row, title, group in zip(rows, titles, groups, strict=True)
        }

        def item(row: int, **more: Any) -> dict[str, Any]:
            found = {"item_id": self._dataset.item_ids.id(row), **about.get(row, {}), **more}
            return {key: value for key, value in found.items() if value is not None}

        log, has_times = self._dataset.interactions, self._dataset.has_times
        examples = []
        for place, history, ranked in zip(self.places, self._history, lists, strict=True):
            user_id, relevant = (
                self._dataset.user_ids.id(int(self._held.user_rows[place])),
                self.relevant(place),
            )
            wanted = set(relevant.tolist())
            examples.append(
                {
                    "user_id": user_id,
                    "key": user_key(user_id),
                    "num_history": len(history),
                    "num_held_out": len(relevant),
                    "history": [
                        item(int(log.item_row[i]), time=int(log.time[i]) if has_times else None)
                        for i in history[: -SHOWN - 1 : -1]
                    ],
                    "recommended": [
                        item(row, hit=row in wanted) for row in ranked[:SHOWN].tolist() if row >= 0
                    ],
                    "held_out": [item(row) for row in relevant[:SHOWN].tolist()],
                }
            )
        return examples


def user_key(user_id: str) -> str:
    """Return what a page marks a user with: 32 hex digits of the SHA-256 of the id."""
    return hashlib.sha256(user_id.encode()).hexdigest()[:32]
