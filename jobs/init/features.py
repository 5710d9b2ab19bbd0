"""What the columns of an item or user table can be: features of a tower, and what queries can filter by."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.init import clocks, names
from jobs.init.look import Column, Table
from twotower import cells
from twotower.errors import DataError
from twotower.features.columns import as_lists
from twotower.schema import MAX_PROFILE_WIDTH
from twotower.values import is_number, is_text

_SEPARATORS = ("|", ";", ",", "/")
_MOST_VALUES = 50_000
"""Different values of a category; more are seldom seen often enough."""
_FEW = 12
"""Different whole numbers that are rather names than amounts."""
_BRACKETS = "[({"


@dataclasses.dataclass
class Use:
    """What one column can be used for."""

    column: Column
    feature: dict[str, Any] | None
    """The declaration; None where it is no feature."""
    attribute: dict[str, Any] | None
    """What is declared to filter by it; None where that is of no use."""
    why: str
    values: int = 0
    """Different values of a categorical or multi_hot feature."""

    @property
    def profiled(self) -> bool:
        """Whether a user's profile of it is worth while."""
        kind = self.feature and self.feature["type"]
        return kind in ("categorical", "multi_hot") and 2 < self.values < MAX_PROFILE_WIDTH


def width(num_values: int) -> int:
    """Return the recommended width of an embedding of this number of different values."""
    return next((dim for most, dim in ((20, 8), (1_000, 16), (20_000, 32)) if num_values <= most), 64)


def id_width(num_items: int) -> int:
    """Return the recommended width of the ids of this number of items, and of the embeddings."""
    return next((dim for most, dim in ((1_000, 32), (50_000, 64)) if num_items <= most), 128)


def title_of(table: Table, key: Column) -> Column | None:
    """Return the column that people know a row by."""
    found = [
        (names.hint(column.name, names.TITLE) + column.distinct / max(column.present, 1), column)
        for column in table.columns.values()
        if column is not key
        and column.is_text
        and names.hint(column.name, names.TITLE) > 0
        and column.present > 0.5 * len(column.values)
        and column.distinct > 0.3 * column.present
    ]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def uses(table: Table, key: Column, title: Column | None, reserved: set[str]) -> list[Use]:
    """Return what each column of a table can be used for, but its ids.

    Args:
        table: of items or users.
        key: its ids.
        title: what people know its rows by.
        reserved: names that the dataset's table keeps for itself.
    """
    found, taken = [], {"item_id", "history"}
    for column in table.columns.values():
        if column is key:
            continue
        if column.name in reserved and column is not title:
            found.append(Use(column, None, None, "its name stands for another column; rename it to use it"))
            continue
        use = _use(column, column is title)
        if use.feature is not None:
            name = names.safe(column.name)
            while name in taken:
                name += "_"
            taken.add(name)
            own = {} if name == column.name else {"column": column.name}
            use.feature = {"name": name, "type": use.feature.pop("type"), **own, **use.feature}
        found.append(use)
    return found


def _use(column: Column, is_title: bool) -> Use:
    told = column.describe()
    if not column.present:
        return Use(column, None, None, "it is empty")
    if column.is_list:
        return _listed(column)
    if column.names is None:
        return Use(column, None, None, f"its type, {column.values.type}, is none that a feature has")
    if column.distinct < 2:
        return Use(column, None, None, "it has one value only")
    if is_title:
        feature = {"type": "text", "dim": 16, "buckets": 4_096 if column.distinct < 20_000 else 16_384}
        return Use(column, feature, None, f"words of the title, {told}")
    if column.boolean:
        attribute = {"type": "boolean"} if column.is_text else {}
        return Use(column, {"type": "categorical", "dim": 4}, attribute, f"true or false, {told}", 2)
    clock = clocks.written(column)
    if column.is_time or (clock is not None and column.is_text and clock.format is None and not clock.unit):
        attribute = {"type": "time"} if column.is_text else {}
        return Use(column, None, attribute, f"times are no feature, and can be filtered by, {told}")
    if column.numeric_share == 1 and not (clock is not None and clock.format):
        return _number(column, told)
    if not column.is_text:
        return Use(column, None, None, f"not all its values are finite numbers, {told}")
    several = _several(column)
    if several is not None:
        return several
    return _text(column, told)


def _number(column: Column, told: str) -> Use:
    assert column.numbers is not None
    in_text = column.is_text
    feature: dict[str, Any]
    if names.has(column.name, names.ID) and not names.has(column.name, names.CLASS):
        if column.distinct > 0.5 * column.present:
            return Use(column, None, None, f"it looks like an id of something else, {told}")
        feature = {"type": "categorical", "dim": width(column.distinct)}
        return Use(column, feature, {}, f"an id that comes again, {told}", column.distinct)
    few = column.whole and column.distinct <= _FEW
    if column.whole and (
        few or (names.has(column.name, names.CLASS) and column.distinct <= 0.5 * column.present)
    ):
        feature = {"type": "categorical", "dim": width(column.distinct)}
        attribute = {"type": "integer"} if in_text else {}
        return Use(column, feature, attribute, f"few whole numbers, {told}", column.distinct)
    values = column.numbers.values[~np.isnan(column.numbers.values)]
    low, middle, high = float(values.min()), float(np.median(values)), float(values.max())
    skewed = low >= 0 and high > 100 and high > 20 * max(middle, 1e-9)
    feature = {"type": "numeric"} | ({"transform": "log1p"} if skewed else {})
    attribute = {"type": "integer" if column.whole else "number"} if in_text else {}
    return Use(column, feature, attribute, f"numbers from {low:g} to {high:g}, {told}")


def _text(column: Column, told: str) -> Use:
    if column.distinct <= max(0.5 * column.present, 2) and column.distinct <= _MOST_VALUES:
        feature = {"type": "categorical", "dim": width(column.distinct)}
        return Use(column, feature, {}, told, column.distinct)
    first = list(column.counts)[:1_000]
    if sum(len(text.split()) for text in first) / len(first) >= 1.5:
        return Use(column, {"type": "text", "dim": 16, "buckets": 4_096}, None, f"free text, {told}")
    return Use(column, None, None, f"hardly a value comes twice, {told}")


def _several(column: Column) -> Use | None:
    """Return a column of text whose cells hold several values each."""
    texts = pa.array(column.counts, pa.string())
    rows = np.array(list(column.counts.values()))
    bracketed = sum(text.strip()[:1] in _BRACKETS and len(text.strip()) > 1 for text in column.counts)
    candidates = ["|"] if bracketed > 0.5 * column.distinct else list(_SEPARATORS)
    best: tuple[int, str, int] | None = None
    for separator in candidates:
        having = rows[[separator in text or text.strip()[:1] in _BRACKETS for text in column.counts]].sum()
        if having < 0.1 * rows.sum():
            continue
        try:
            lists = as_lists(texts, separator)
        except DataError:
            continue
        flat, parents = cells.flattened(lists)
        pieces = int(rows[parents].sum())
        different = len(flat.unique())
        long = sum(len(piece.split()) for piece in flat.unique().to_pylist()) / max(different, 1) > 4
        # Values that come again, in fewer forms than the cells they are put together to.
        fits = 2 <= different < 0.7 * column.distinct and pieces >= 3 * different and not long
        if fits and (best is None or different < best[0]):
            best = different, separator, pieces
    if best is None:
        return None
    different, separator, pieces = best
    feature = {"type": "multi_hot", "dim": width(different), "separator": separator}
    told = f"{different:,} different values, {pieces / max(column.present, 1):.1f} in a row"
    return Use(column, feature, {"separator": separator}, told, different)


def _listed(column: Column) -> Use:
    flat, parents = cells.flattened(column.values)
    lengths = np.unique(np.bincount(parents)) if len(parents) else np.zeros(0, np.int64)
    if is_number(flat.type) and not pa.types.is_integer(flat.type):
        if len(lengths) != 1:
            return Use(column, None, None, "lists of numbers of different lengths are no vector")
        dim = int(lengths[0])
        return Use(column, {"type": "vector", "dim": dim}, None, f"lists of {dim} numbers")
    if not (is_text(flat.type) or pa.types.is_integer(flat.type)):
        return Use(column, None, None, f"lists of {flat.type} are no feature")
    different = len(flat.drop_null().unique())
    feature = {"type": "multi_hot", "dim": width(different)}
    told = f"lists of {different:,} different values"
    return Use(column, feature, {}, told, different)
