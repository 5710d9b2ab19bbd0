"""Parts of the users and of the items whose metrics are told one by one.

A slice of users has their metrics as they are. A slice of items counts only relevant items of its own: the
lists stay the same, and a user without a relevant item of the slice is left out.

Legend: Q test users, N catalogue items, V values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import sparse

from twotower.cells import flattened
from twotower.config import AttributeConfig
from twotower.data.attributes import attribute_columns, attribute_table
from twotower.data.dataset import Dataset
from twotower.errors import ConfigError
from twotower.features import ColumnFeature
from twotower.model.features import encode_columns
from twotower.schema import FittedFeature
from twotower.values import is_list, plain

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Attributes = Mapping[str, AttributeConfig]

MOST_VALUES = 20
"""Values of an attribute that are slices of their own, the most common ones; the others are one."""
OTHER, MISSING = "other", "missing"

_ACTIVITY = ((0, 0, "none"), (1, 5, "1 to 5"), (6, 20, "6 to 20"), (21, 100, "21 to 100"))
_MOST_ACTIVE = "over 100"
_HEAD, _TAIL = 0.5, 0.8


@dataclass(frozen=True)
class Slice:
    """Some of the test users, or of the catalogue items."""

    by: str
    """What parts them, such as ``activity``."""
    value: str
    """Which part this is, such as ``1 to 5``."""
    members: Bools
    """[Q] or [N] bool."""


def check_slices(names: Sequence[str], dataset: Dataset, attributes: Attributes) -> None:
    """Check ``evaluation.slices``.

    Args:
        names: attributes.
        dataset: with the declared features.
        attributes: ``index.attributes``.

    Raises:
        ConfigError: one is not declared.
    """
    known = [*_declared(dataset.schema.query), *_declared(dataset.schema.item), *attributes]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"evaluation.slices: {name!r} is no categorical, multi_hot or numeric feature and none of "
                f"index.attributes; allowed: {', '.join(dict.fromkeys(known)) or 'none is declared'}"
            )


def user_slices(dataset: Dataset, users: Ints, activity: Ints, names: Sequence[str]) -> list[Slice]:
    """Return the slices of test users: by activity, and by features of the query side.

    Args:
        dataset: with the user table.
        users: [Q] rows of the test users.
        activity: [Q] how many catalogue items the query of each knows.
        names: ``evaluation.slices``; those of items are passed over.
    """
    slices = [
        Slice("activity", label, (activity >= least) & (activity <= most)) for least, most, label in _ACTIVITY
    ]
    slices.append(Slice("activity", _MOST_ACTIVE, activity > _ACTIVITY[-1][1]))
    ours, theirs = _declared(dataset.schema.query), _declared(dataset.schema.item)
    for name in names:
        if name in ours:
            by = f"{name} of users" if name in theirs else name
            column = plain(dataset.user_table([ours[name].source_column]).column(0))
            slices += _by_values(by, ours[name].labels(column.take(pa.array(users))))
    return [piece for piece in slices if piece.members.any()]


def item_slices(dataset: Dataset, counts: Ints, names: Sequence[str], attributes: Attributes) -> list[Slice]:
    """Return the slices of catalogue items: by popularity, and by features and attributes of items.

    Args:
        dataset: with the item table.
        counts: [N] positives of each item in train and validation.
        names: ``evaluation.slices``; those of users are passed over.
        attributes: ``index.attributes``.
    """
    slices = [Slice("popularity", label, members) for label, members in _by_popularity(counts)]
    ours, others = _declared(dataset.schema.item), _declared(dataset.schema.query)
    for name in names:
        by = f"{name} of items" if name in others else name
        if name in ours:
            column = plain(dataset.item_table([ours[name].source_column]).column(0))
            slices += _by_values(by, ours[name].labels(column))
        elif name in attributes:
            one = {name: attributes[name]}
            table = attribute_table(dataset.item_table([*attribute_columns(one).values()]), one)
            slices += _by_values(by, table.column(0).combine_chunks())
    return [piece for piece in slices if piece.members.any()]


def attribute_vectors(dataset: Dataset) -> sparse.csr_matrix | None:
    """Return the values of all categorical and multi_hot item features as vectors [N, V] of length 1.

    An item without a value has a vector of zeros. None where no such feature is declared.
    """
    there = dataset.item_schema.names
    columns = {
        f.spec.name: f.spec.source_column
        for f in dataset.schema.item
        if f.spec.rows_are("item") == "values" and f.spec.source_column in there
    }
    features = [f for f in dataset.schema.item if f.spec.name in columns]
    if not features:
        return None
    table = dataset.item_table(list(dict.fromkeys(name for name in columns.values() if name is not None)))
    pieces = []
    for ids in encode_columns(features, table).values():
        # Row 0 is every value that is not in the vocabulary, which need not be the same one.
        rows, places = np.nonzero(ids > 0)
        width = int(ids.max(initial=0)) + 1
        cells = (np.ones(len(rows)), (rows, ids[rows, places]))
        pieces.append(sparse.csr_matrix(cells, shape=(len(ids), width)))
    joined = sparse.csr_matrix(sparse.hstack(pieces))
    lengths = np.sqrt(np.asarray(joined.multiply(joined).sum(axis=1)).ravel())
    return sparse.csr_matrix(sparse.diags(1.0 / np.maximum(lengths, 1.0)) @ joined)


def _declared(features: Sequence[FittedFeature]) -> dict[str, ColumnFeature]:
    specs = [f.spec for f in features if isinstance(f.spec, ColumnFeature)]
    return {spec.name: spec for spec in specs if spec.labels_are is not None}


def _by_popularity(counts: Ints) -> Iterator[tuple[str, Bools]]:
    """Items with the first half of all positives, the next three tenths, the rest, and those without any."""
    order = np.lexsort((np.arange(len(counts)), -counts))
    before = np.empty(len(counts), dtype=np.int64)
    before[order] = np.cumsum(counts[order]) - counts[order]
    share = before / max(int(counts.sum()), 1)
    taken = counts > 0
    yield "head", taken & (share < _HEAD)
    yield "middle", taken & (share >= _HEAD) & (share < _TAIL)
    yield "tail", taken & (share >= _TAIL)
    yield "new", ~taken


def _by_values(by: str, column: pa.Array) -> Iterator[Slice]:
    if is_list(column.type):
        flat, parents = flattened(column)
        names = flat.cast(pa.string()).to_pylist()
    elif pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
        names, parents = _ranges(column)
    elif pa.types.is_timestamp(column.type):
        names = [None if value is None else str(value.year) for value in column.to_pylist()]
        parents = np.arange(len(column))
    else:
        names, parents = column.cast(pa.string()).to_pylist(), np.arange(len(column))
    groups: dict[str, list[int]] = {}
    for name, row in zip(names, parents.tolist(), strict=True):
        if name is not None:
            groups.setdefault(name, []).append(row)
    common = [name for name, _ in Counter({n: len(set(r)) for n, r in groups.items()}).most_common()]
    missing = np.ones(len(column), dtype=bool)
    for name in common[:MOST_VALUES]:
        yield Slice(by, name, _members(groups[name], len(column)))
    rest = [row for name in common[MOST_VALUES:] for row in groups[name]]
    if rest:
        yield Slice(by, OTHER, _members(rest, len(column)))
    for rows in groups.values():
        missing[rows] = False
    if missing.any():
        yield Slice(by, MISSING, missing)


def _members(rows: list[int], count: int) -> Bools:
    members = np.zeros(count, dtype=bool)
    members[rows] = True
    return members


def _ranges(column: pa.Array) -> tuple[list[str | None], Ints]:
    """The values of a column of numbers, or their quarters where there are many."""
    values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    there = np.isfinite(values)
    rows = np.arange(len(values))
    distinct = np.unique(values[there])
    if len(distinct) <= MOST_VALUES:
        return [f"{value:g}" if ok else None for value, ok in zip(values, there, strict=True)], rows
    edges = np.quantile(values[there], [0.0, 0.25, 0.5, 0.75, 1.0])
    quarter = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, 3)
    labels = [f"{edges[q]:g} to {'below ' if q < 3 else ''}{edges[q + 1]:g}" for q in range(4)]
    return [labels[q] if ok else None for q, ok in zip(quarter.tolist(), there, strict=True)], rows
