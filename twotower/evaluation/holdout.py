"""The queries of the final evaluation: test users, what they had before, and what they took next.

The test split is read here and nowhere else; ``data.knowledge`` says what a query knows and what is relevant.

Legend: Q test users, H history length.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twotower.artefacts import write_json
from twotower.data.dataset import Dataset
from twotower.data.histories import Histories
from twotower.data.knowledge import Holdout, Repeats, Rules, holdout, known, nothing_relevant
from twotower.errors import DataError
from twotower.model.features import Columns, encode_columns, profile_values

Ints = NDArray[np.int64]

_ARRAYS = ("user_rows", "masked_offsets", "masked_rows", "relevant_offsets", "relevant_rows")
_HISTORY_ARRAYS = ("offsets", "item_rows", "times", "weights")


def evaluation_queries(dataset: Dataset, repeats: Repeats, max_users: int, seed: int) -> Holdout:
    """Return the queries of the test split, ``max_users`` drawn with ``seed`` where there are more.

    Raises:
        DataError: no user has a relevant item.
    """
    rules = Rules.of(dataset, repeats)
    held = holdout(dataset.interactions, "test", rules, max_users, seed)
    if len(held) == 0:
        raise DataError(f"dataset {dataset.path}: {nothing_relevant('test', rules)}")
    return held


def holdout_fingerprint(held: Holdout, vocabulary_hash: str) -> str:
    """Return a hash of who is asked about what: users, masked and relevant items, by the ids' hash.

    Models whose evaluations have it in common were measured on the same test.
    """
    digest = hashlib.sha256(vocabulary_hash.encode())
    for name in _ARRAYS:
        digest.update(np.ascontiguousarray(getattr(held, name), dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class QueryInputs:
    """What the query tower needs of the test users, in the order of the holdout."""

    histories: Histories
    """What each query knows, capped to what the features look at; row q is query q."""
    columns: Columns
    """Static columns of the test users, [Q, ...] each."""
    profiles: Columns
    """Item values of profile features, [num_items, V] each."""


def query_inputs(dataset: Dataset, users: Ints) -> QueryInputs:
    """Return the inputs of the query tower for the test queries of users [Q]."""
    log = dataset.interactions
    # The rules for repeats decide what is asked for, not what is known.
    before = log.select(known(log, "test", Rules.of(dataset, "include")))
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
