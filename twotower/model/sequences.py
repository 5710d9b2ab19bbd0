"""Histories as sequences: stretches of items laid out in a grid of few rows, with little padding.

Short stretches share a row, so that short histories cost about what their items cost. Stretches of one row
do not see each other (``Sequences.stretch``), so the layout decides about cost and nothing else.

Shapes: as in ``batch`` and ``data/windows``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from twotower.data.histories import NEVER
from twotower.data.windows import Stretches
from twotower.model.batch import Bag, Sequences
from twotower.model.unknown_items import hashed_item_rows
from twotower.schema import UNKNOWN_ROW, IdFeature

IntArray = npt.NDArray[np.int64]
NUM_GAPS = 34
"""Classes of the time between two items: none, under a second, and each doubling up to 2**32 seconds."""
_OPEN_ROWS = 16
"""Rows that a stretch is tried in. Those of neighbouring queries stay near each other, for ``part``."""
_SHARED_WIDTH = 64
"""Rows that several stretches share are no wider than this where no stretch needs it: attention costs a
row's width for each item."""


def make_sequences(
    stretches: Stretches,
    max_length: int,
    table: IdFeature | None,
    time_gaps: bool = False,
    num_items: int | None = None,
    extra: torch.Tensor | None = None,
) -> Sequences:
    """Return stretches as the grid that encoders read.

    Args:
        stretches: of the queries of a batch, none longer than ``max_length``.
        max_length: the longest stretch that there may be.
        table: the id feature whose table is read; a table with a row for each item when not given.
        time_gaps: give the classes of the times between items.
        num_items: items of the vocabulary, where ``extra`` is given.
        extra: [m, E] float32, what the items with rows from there on read.
    """
    lengths = stretches.lengths
    longest = int(lengths.max(initial=0))
    width = max(longest, min(max_length, _SHARED_WIDTH)) if len(lengths) > 1 else longest
    rows, columns = lay_out(lengths, width)
    count = int(rows.max(initial=-1)) + 1
    begins = rows * width + columns
    position = np.arange(len(stretches.item_rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    at = np.repeat(begins, lengths) + position

    def grid(values: IntArray, empty: int) -> IntArray:
        out = np.full(count * width, empty, np.int64)
        out[at] = values
        return out

    gap = None
    if time_gaps:
        assert stretches.times is not None
        gap = torch.from_numpy(grid(gap_classes(stretches.times, position), 0).reshape(count, width))
    reads = stretches.known > 0
    safe = np.where(reads, stretches.of_query, 0)
    begin_of = begins[safe] if len(begins) else np.zeros(len(safe), np.int64)
    row_of = rows[safe] if len(rows) else np.zeros(len(safe), np.int64)
    return Sequences(
        _bag(grid(stretches.item_rows, -1), table, num_items, extra),
        torch.from_numpy(grid(np.repeat(np.arange(len(lengths)), lengths), -1).reshape(count, width)),
        torch.from_numpy(grid(position, 0).reshape(count, width)),
        torch.from_numpy(np.where(reads, begin_of + stretches.known - 1, -1)),
        np.where(reads, row_of, -1),
        count == len(lengths),
        gap,
        stretches.names,
    )


def gap_classes(times: IntArray, position: IntArray) -> IntArray:
    """Return the class of the time between each item and the one before it in its stretch, [m] int64.

    0 is that of the first item of a stretch, and of a time that is not known; 1 + floor(log2(1 + s)) is that
    of s whole seconds, at most ``NUM_GAPS - 1``.

    Args:
        times: [m] int64, microseconds UTC, stretch by stretch.
        position: [m] int64, place of an item in its stretch.
    """
    classes = np.zeros(len(times), np.int64)
    known = (position[1:] > 0) & (times[1:] != NEVER) & (times[:-1] != NEVER)
    seconds = np.maximum(times[1:][known] - times[:-1][known], 0) // 1_000_000
    # frexp(n) has the number of bits of n as its exponent: 1 + floor(log2(n)).
    classes[1:][known] = np.minimum(np.frexp(1.0 + seconds)[1], NUM_GAPS - 1)
    return classes


def lay_out(lengths: IntArray, width: int) -> tuple[IntArray, IntArray]:
    """Return row and first column of stretches of these lengths in a grid of a width.

    A stretch goes into the fullest of the last rows that has room for it, or begins a new row.

    Args:
        lengths: [w] int64, 1 to ``width`` each.
        width: T.
    """
    if len(lengths) == 0 or 2 * int(lengths.min()) > width:
        return np.arange(len(lengths)), np.zeros(len(lengths), np.int64)
    rows, columns = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    used: list[int] = []
    open_rows: list[int] = []
    for i, length in enumerate(lengths.tolist()):
        room = width - length
        best = max((r for r in open_rows if used[r] <= room), key=used.__getitem__, default=-1)
        if best < 0:
            best = len(used)
            used.append(0)
            open_rows.append(best)
            if len(open_rows) > _OPEN_ROWS:
                open_rows.remove(max(open_rows, key=used.__getitem__))
        rows[i], columns[i] = best, used[best]
        used[best] += length
        if used[best] == width and best in open_rows:
            open_rows.remove(best)
    return rows, columns


def _bag(items: IntArray, table: IdFeature | None, num_items: int | None, extra: torch.Tensor | None) -> Bag:
    """Return the embedding rows of items [N], of which -1 is none."""
    there = torch.from_numpy(items >= 0)[:, None]
    if table is None or table.buckets is None:
        # Described items come behind the others in the table as they do among items.
        ids = torch.from_numpy(items + (UNKNOWN_ROW + 1))[:, None].masked_fill(~there, -1)
        return Bag(ids, there.to(torch.float32), extra)
    ids = hashed_item_rows(torch.from_numpy(items), table, None if extra is None else num_items)
    return Bag(ids, (ids >= 0).to(torch.float32), extra)
