"""The queries of the final evaluation: test users, what they had before, and what they took next.

The test split is read here and nowhere else. A test user is a user with a positive test interaction on a
catalogue item that is new to them; the query knows their train and validation interactions.

Legend: Q test users, H history length.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twotower.artefacts import write_json
from twotower.data.dataset import Dataset
from twotower.data.histories import Histories
from twotower.data.interactions import Interactions
from twotower.errors import DataError
from twotower.model.features import Columns, encode_columns, profile_values
from twotower.schema import KINDS, SPLITS

Ints = NDArray[np.int64]

_ARRAYS = ("user_rows", "masked_offsets", "masked_rows", "relevant_offsets", "relevant_rows")
_HISTORY_ARRAYS = ("offsets", "item_rows", "times", "weights")


@dataclass(frozen=True)
class Holdout:
    """Test users in ascending order of user_row."""

    user_rows: Ints
    """[Q] int64."""
    masked_offsets: Ints
    """[Q + 1] int64."""
    masked_rows: Ints
    """Catalogue items of each user's train and validation interactions, of every kind."""
    relevant_offsets: Ints
    """[Q + 1] int64."""
    relevant_rows: Ints
    """Catalogue items of each user's positive test interactions, without masked ones."""
    counts: dict[str, int]
    """Users and items that were left out, by reason; see ``holdout``."""

    def __len__(self) -> int:
        """Return Q."""
        return len(self.user_rows)

    def part(self, start: int, stop: int) -> Holdout:
        """Return users ``start`` to ``stop``, with the counts of the whole."""
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


def holdout(dataset: Dataset, max_users: int, seed: int) -> Holdout:
    """Return the test users of a dataset, ``max_users`` drawn with ``seed`` where there are more.

    ``counts`` holds ``users`` (with any interaction), ``without_relevant`` (of these, left out because no
    item of their test interactions counts), ``not_drawn``, ``evaluated``, and of all positive test
    interactions ``outside_catalogue`` and ``had_before`` (left out) and ``relevant`` (of drawn users).

    Raises:
        DataError: no user has a relevant item.
    """
    interactions = dataset.interactions
    num_items, num_users = dataset.num_catalogue_items, dataset.num_users
    in_test = interactions.split == SPLITS["test"]
    catalogue = interactions.item_row < num_items
    positive = in_test & (interactions.kind == KINDS["positive"])
    had = _pairs(interactions, ~in_test & catalogue & ~interactions.is_impression, num_items)
    wanted = _pairs(interactions, positive & catalogue, num_items)
    new = np.setdiff1d(wanted, had, assume_unique=True)
    users = np.unique(new // num_items)
    if len(users) == 0:
        raise DataError(
            f"dataset {dataset.path} has no user with a positive test interaction on a catalogue item "
            "that is new to them, so there is nothing to evaluate; look at split.kind and data.positives"
        )
    drawn = users
    if len(users) > max_users:
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
    assert len(drawn) == 0 or drawn[-1] < num_users
    return Holdout(drawn, *_compressed(had, drawn, num_items), *relevant, counts)


def _pairs(interactions: Interactions, chosen: NDArray[np.bool_], num_items: int) -> Ints:
    """Distinct (user, item) pairs as one ascending number each."""
    users = interactions.user_row[chosen].astype(np.int64)
    return np.unique(users * num_items + interactions.item_row[chosen])


def _compressed(pairs: Ints, users: Ints, num_items: int) -> tuple[Ints, Ints]:
    """The pairs of ascending ``users`` as (offsets [Q + 1], item rows)."""
    begin = np.searchsorted(pairs, users * num_items)
    end = np.searchsorted(pairs, (users + 1) * num_items)
    offsets = np.concatenate([[0], np.cumsum(end - begin)]).astype(np.int64)
    # Position i of the result is position i - offsets[q] of user q's segment, which starts at begin[q].
    source = np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], end - begin)
    return offsets, pairs[source] % num_items


@dataclass(frozen=True)
class QueryInputs:
    """What the query tower needs of the test users, in the order of the holdout."""

    histories: Histories
    """Of train and validation, capped to what the features look at; row q is test user q."""
    columns: Columns
    """Static columns of the test users, [Q, ...] each."""
    profiles: Columns
    """Item values of profile features, [num_items, V] each."""


def query_inputs(dataset: Dataset, users: Ints) -> QueryInputs:
    """Return the inputs of the query tower for users [Q] at test time."""
    interactions = dataset.interactions
    before = interactions.select(interactions.split != SPLITS["test"])
    everyone = Histories.of(before, capped=dataset.schema.max_history)
    lengths = np.diff(everyone.offsets)[users]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    source = np.arange(offsets[-1]) + np.repeat(everyone.offsets[users] - offsets[:-1], lengths)
    histories = Histories(
        offsets, everyone.item_rows[source], everyone.times[source], everyone.weights[source]
    )
    columns = encode_columns(dataset.schema.query, dataset.user_table())
    item_columns = encode_columns(dataset.schema.item, dataset.item_table())
    return QueryInputs(
        histories,
        {name: column[users] for name, column in columns.items()},
        profile_values(dataset.schema, item_columns),
    )


def write_arrays(directory: Path, held: Holdout, inputs: QueryInputs) -> None:
    """Write everything that ranking needs into a directory, as arrays that workers can memory-map."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in _ARRAYS:
        np.save(directory / f"{name}.npy", getattr(held, name))
    for name in _HISTORY_ARRAYS:
        np.save(directory / f"history-{name}.npy", getattr(inputs.histories, name))
    for kind, columns in (("column", inputs.columns), ("profile", inputs.profiles)):
        for number, column in enumerate(columns.values()):
            np.save(directory / f"{kind}-{number}.npy", column)
    write_json(
        directory / "holdout.json",
        {"counts": held.counts, "column": list(inputs.columns), "profile": list(inputs.profiles)},
    )


def open_arrays(directory: Path) -> tuple[Holdout, QueryInputs]:
    """Return what ``write_arrays`` wrote, memory-mapped."""
    facts = json.loads((directory / "holdout.json").read_bytes())

    def load(name: str) -> NDArray[Any]:
        array: NDArray[Any] = np.load(directory / f"{name}.npy", mmap_mode="r")
        return array

    held = Holdout(**{name: load(name) for name in _ARRAYS}, counts=facts["counts"])
    parts = {name: load(f"history-{name}") for name in _HISTORY_ARRAYS}
    columns, profiles = (
        {name: load(f"{kind}-{number}") for number, name in enumerate(facts[kind])}
        for kind in ("column", "profile")
    )
    return held, QueryInputs(Histories(**parts), columns, profiles)
