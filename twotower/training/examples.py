"""The training interactions in memory, and the batches made of them.

An example is a positive interaction of the fitted split with a catalogue item. Its query knows what the
user did strictly before the interaction's time inside the fitted split; where there are no times, the
user's other interactions of that split.

Shapes: B rows of a batch, n examples, H history length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from twotower.data.dataset import Dataset
from twotower.data.histories import Histories
from twotower.data.interactions import Interactions
from twotower.errors import TrainingError
from twotower.model.features import (
    Columns,
    FeatureBatch,
    QueryFeatures,
    encode_columns,
    item_batch,
    profile_values,
)
from twotower.schema import KINDS, SPLITS

Fit = Literal["train", "all"]


@dataclass(frozen=True)
class HeldOut:
    """Queries of users with held-out items."""

    user_rows: npt.NDArray[np.int64]
    """[Q] int64."""
    masked_offsets: npt.NDArray[np.int64]
    """[Q + 1] int64."""
    masked_rows: npt.NDArray[np.int64]
    """Items of the fitted split of each user."""
    relevant_offsets: npt.NDArray[np.int64]
    """[Q + 1] int64."""
    relevant_rows: npt.NDArray[np.int64]
    """Held-out items of each user."""


class Examples:
    """What a worker trains on."""

    def __init__(self, dataset: Dataset, fit: Fit) -> None:
        """Load the fitted split.

        Args:
            dataset: prepared.
            fit: the train split, or every interaction.

        Raises:
            TrainingError: there is no positive interaction with a catalogue item in it.
        """
        self.schema = dataset.schema
        everything = dataset.interactions
        in_fit = everything.split == SPLITS["train"] if fit == "train" else np.ones(len(everything), bool)
        fitted = everything.select(in_fit)
        self.histories = Histories.of(fitted)
        self._has_times = dataset.has_times
        self._user_of = np.repeat(
            np.arange(self.histories.num_users, dtype=np.int32), np.diff(self.histories.offsets)
        )
        self._examples = np.flatnonzero(self.histories.item_rows < dataset.num_catalogue_items)
        if len(self._examples) == 0:
            raise TrainingError(
                f"dataset {dataset.path} has no positive interaction with a catalogue item in split {fit!r}; "
                "look at data.positives and at the ids of the item table"
            )
        self.counts = np.bincount(
            self.histories.item_rows[self._examples], minlength=dataset.num_catalogue_items
        )
        self.item_columns = encode_columns(dataset.schema.item, dataset.item_table())
        self.user_columns = encode_columns(dataset.schema.query, dataset.user_table())
        self.query_features = QueryFeatures(dataset.schema, profile_values(dataset.schema, self.item_columns))
        self.num_catalogue_items = dataset.num_catalogue_items
        # By item row, its place among the candidates of the batch at work: a look-up beats a binary search.
        self._place = np.full(dataset.num_items, -1, np.int32)

    def __len__(self) -> int:
        """Return n, the number of examples."""
        return len(self._examples)

    def item_rows(self, examples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the positive item of examples, [B] int64."""
        return self.histories.item_rows[self._examples[examples]].astype(np.int64)

    def queries(self, examples: npt.NDArray[np.int64]) -> FeatureBatch:
        """Return the query tower's input for examples [B]."""
        positions = self._examples[examples]
        users = self._user_of[positions].astype(np.int64)
        length = self.schema.max_history
        if self._has_times:
            rows, weights = self.histories.before(users, self.histories.times[positions], length)
        else:
            rows, weights = self.histories.others(users, positions - self.histories.offsets[users], length)
        return self.query_features(users, self._user_columns(users), rows, weights)

    def known_positives(
        self, examples: npt.NDArray[np.int64], candidates: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Return which candidates the examples' users have in the fitted split, [B, C] bool.

        Args:
            examples: [B] int64.
            candidates: [C] int64 item rows, repeats allowed.
        """
        users = self._user_of[self._examples[examples]]
        begin, end = self.histories.offsets[users], self.histories.offsets[users + 1]
        lengths = end - begin
        # All positions of all users of the batch, one after the other.
        query = np.repeat(np.arange(len(users)), lengths)
        positions = np.arange(lengths.sum()) + np.repeat(begin - (np.cumsum(lengths) - lengths), lengths)
        distinct, column = np.unique(candidates, return_inverse=True)
        self._place[distinct] = np.arange(len(distinct))
        place = self._place[self.histories.item_rows[positions]]
        self._place[distinct] = -1
        found = place >= 0
        known = np.zeros((len(users), len(distinct)), bool)
        known[query[found], place[found]] = True
        return known[:, column]

    def items(self, item_rows: npt.NDArray[np.int64]) -> FeatureBatch:
        """Return the item tower's input for catalogue items [B]."""
        return item_batch(self.schema, item_rows, {n: c[item_rows] for n, c in self.item_columns.items()})

    def latest_queries(self, users: npt.NDArray[np.int64]) -> FeatureBatch:
        """Return the query tower's input for users [B] after all of their fitted interactions."""
        rows, weights = self.histories.before(users, None, self.schema.max_history)
        return self.query_features(users, self._user_columns(users), rows, weights)

    def _user_columns(self, users: npt.NDArray[np.int64]) -> Columns:
        return {n: c[users] for n, c in self.user_columns.items()}


def held_out(dataset: Dataset, split: Literal["validation"], max_users: int, seed: int) -> HeldOut:
    """Return the users with positive catalogue items in a split, drawn once where there are more.

    Args:
        dataset: prepared.
        split: whose items are relevant; items of the train split are masked.
        max_users: the most users returned.
        seed: of the draw.
    """
    interactions = dataset.interactions
    wanted = (
        (interactions.split == SPLITS[split])
        & (interactions.kind == KINDS["positive"])
        & (interactions.item_row < dataset.num_catalogue_items)
    )
    users = np.unique(interactions.user_row[wanted]).astype(np.int64)
    if len(users) > max_users:
        users = np.sort(np.random.default_rng([seed, 1]).choice(users, max_users, replace=False))
    relevant = _rows_of(interactions.select(wanted), users)
    masked = _rows_of(interactions.select(interactions.split == SPLITS["train"]), users)
    return HeldOut(users, *masked, *relevant)


def _rows_of(
    interactions: Interactions, users: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the distinct items of each user as (offsets [Q + 1], item rows)."""
    parts = [
        np.unique(interactions.item_row[interactions.user_offsets[u] : interactions.user_offsets[u + 1]])
        for u in users
    ]
    offsets = np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)
    rows = np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)
    return offsets, rows
