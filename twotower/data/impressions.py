"""Items that were shown with an interaction and not chosen: a column of lists to negative interactions.

An impression belongs to the interaction that lists it: it has the same user, time and split, and is left
out with it. The other rules (repeats, smallest users and items, shares of the splits) are over interactions
alone, so a dataset has the same positives in the same splits whether or not its impressions are read. In
particular an item that is shown first and chosen later is kept as both.

Shapes: n interactions, L listed items of all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower import cells
from twotower.data.chunks import BoolArray
from twotower.data.interning import IdColumn, IdForm, Interner
from twotower.errors import DataError
from twotower.schema import KINDS
from twotower.values import is_list, is_text

LISTED_BY = "listed_by"
"""Column of each interaction's number in reading order, from reading until ``attach``; int64."""
IMPRESSION_WEIGHT = 0.0
"""Tells an impression from a negative that a person gave, which weighs 1."""


class ShownItems:
    """A column of impressions: the item ids that each row lists, by the rules of item ids."""

    def __init__(self, array: pa.Array, separator: str, form: IdForm) -> None:
        """Take lists of ids, or text with a separator between ids, whose blank pieces are dropped.

        Raises:
            DataError: the column has another type.
        """
        if pa.types.is_null(array.type):
            array = array.cast(pa.string())
        array = cells.joined(array, "the impressions column")
        textual = is_text(array.type)
        if not (textual or is_list(array.type)):
            raise DataError(
                f"the impressions column has type {array.type}; it must hold lists of item ids, or text with "
                "data.source.columns.impressions_separator between them"
            )
        if textual:
            refuse_other_separator(array, separator)
        lists = cells.split_lists(array, separator) if textual else array
        ids, self.row = cells.flattened(lists)
        """[L] int64, the row of the column that lists each item."""
        ids, _ = cells.text_of(ids)  # what is no UTF-8 is null, and so bad
        self.ids = IdColumn(ids, form)
        self._num_rows = len(array)

    def problems(self) -> Iterator[tuple[BoolArray, str, pa.Array]]:
        """Yield [n] bool masks of bad rows, each with its reason and [n] the first id to blame in each."""
        for broken, reason in self.ids.problems():
            first = np.full(self._num_rows, -1, dtype=np.int64)
            at = np.flatnonzero(broken)[::-1]
            first[self.row[at]] = at  # the last assignment, the first id, stays
            bad = first >= 0
            yield bad, reason, self.ids.array.take(pa.array(first, mask=~bad))

    def intern(self, item: IdColumn, keep: BoolArray, shown: Interner) -> dict[str, npt.NDArray[np.int32]]:
        """Return the items shown and not chosen in the rows where ``keep`` [n] is true, each once a row.

        Args:
            item: The items chosen.
            keep: [n] bool, rows without bad ids.
            shown: Gives rows to ids that are shown.

        Returns:
            ``num_shown`` [rows kept] int32 and, in their order, ``shown`` [sum of num_shown] int32.
        """
        codes = self.ids.codes
        chosen = np.asarray(pc.index_in(self.ids.values, value_set=item.values).fill_null(-1))
        wanted = keep[self.row]
        wanted[wanted] = chosen[codes[wanted]] != item.codes[self.row[wanted]]
        at = np.flatnonzero(wanted)
        _, first = np.unique(self.row[at] * len(self.ids.values) + codes[at], return_index=True)
        wanted[:] = False
        wanted[at[first]] = True
        counts = np.bincount(self.row[wanted], minlength=self._num_rows)[keep]
        return {"num_shown": counts.astype(np.int32), "shown": shown.intern(self.ids, wanted)}


@dataclasses.dataclass(frozen=True)
class Impressions:
    """The items that interactions list, as compressed rows by interaction in reading order."""

    offsets: npt.NDArray[np.int64]
    """[n + 1] int64; interaction i lists ``item_rows[offsets[i]:offsets[i + 1]]``."""
    item_rows: npt.NDArray[np.int32]
    """[L] int32, in the order of each list."""

    @classmethod
    def of(
        cls, num_shown: npt.NDArray[np.int32], rows: npt.NDArray[np.int32], shown: Interner, items: Interner
    ) -> Impressions:
        """Return the impressions of ``num_shown`` [n], with ``rows`` [L] of ``shown`` as rows of ``items``.

        ``items`` gets the items that are only ever shown as its last: no other row depends on them.
        """
        ids = IdColumn(shown.ids(), "shown item")
        item_row = items.intern(ids, np.ones(len(shown), dtype=np.bool_))
        offsets = np.concatenate([[0], np.cumsum(num_shown, dtype=np.int64)])
        return cls(offsets, item_row[rows])

    def __len__(self) -> int:
        """Return L, the number of impressions."""
        return len(self.item_rows)


def attach(columns: dict[str, npt.NDArray[Any]], impressions: Impressions, allowed: BoolArray) -> int:
    """Put each interaction's impressions behind it, in place, and return how many there are.

    The last of a list comes first: looking back from a moment one meets the head of the list first, which
    is what the user has seen most likely.

    Args:
        columns: Sorted columns of the interactions that stay, split, with ``LISTED_BY``, which is removed.
        impressions: Of all interactions that were read.
        allowed: [items] bool, items that may be in the dataset; impressions of others are left out.
    """
    listed_by = columns.pop(LISTED_BY)
    n = len(listed_by)
    end, counts = impressions.offsets[listed_by + 1], np.diff(impressions.offsets)[listed_by]
    parent = np.repeat(np.arange(n), counts)
    behind = np.arange(len(parent)) - np.repeat(np.cumsum(counts) - counts, counts)
    item_row = impressions.item_rows[end[parent] - 1 - behind]
    stays = allowed[item_row]
    item_row = item_row[stays]
    size = np.bincount(parent[stays], minlength=n) + 1
    is_impression = np.ones(n + len(item_row), dtype=np.bool_)
    is_impression[np.cumsum(size) - size] = False
    for name in columns:
        columns[name] = np.repeat(columns[name], size)
    columns["item_row"][is_impression] = item_row
    columns["kind"][is_impression] = KINDS["negative"]
    columns["weight"][is_impression] = IMPRESSION_WEIGHT
    return len(item_row)


def refuse_other_separator(text: pa.Array, separator: str) -> None:
    """Refuse a column of impressions whose ids have another separator between them than the declared one.

    Raises:
        DataError: with an example and the setting.
    """
    other = cells.other_separator(text, separator)
    if other is not None and other.sure:
        raise DataError(
            f"impressions such as {other.example!r} hold {other.separator!r} and not "
            f"data.source.columns.impressions_separator, which is {separator!r}; set it to what stands "
            "between the ids"
        )
