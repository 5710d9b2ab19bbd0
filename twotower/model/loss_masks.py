"""Which candidates are no negatives of a query, as (query, column) pairs instead of a matrix.

Two rules leave a column out: it holds the query's positive item once more (an accidental hit), or its key is
among the query's known keys. Both are runs of equal values in a sorted list of the candidates, so a few
binary searches find them, at a cost that grows with the number of pairs and not with queries x candidates.

Shapes: Q queries, C candidates, n known keys, S spans (runs in a sorted list), P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_PAIRS_AT_ONCE = 1 << 17
"""Pairs that are held at a time, 3 MiB of indices, however many there are."""


@dataclass(frozen=True)
class Known:
    """Candidates that are no negatives of a query: its other known positives, as compressed rows of keys."""

    offsets: Tensor
    """[Q + 1] int64, where each query's keys begin."""
    keys: Tensor
    """[n] int64; need not be in the batch, may repeat."""
    candidate_keys: Tensor
    """[C] int64, looked up among the keys: item ids, or user ids in the item-to-query direction."""


class LeftOut:
    """The columns that each query leaves out. The query's own positive may be among them."""

    def __init__(
        self, positive_Q: Tensor, candidate_ids_C: Tensor, mask_accidental_hits: bool, known: Known | None
    ) -> None:
        """Sort the candidates by id and by key.

        Args:
            positive_Q: [Q] int64, column of each query's positive.
            candidate_ids_C: [C] int64.
            mask_accidental_hits: leave out columns with the positive's id.
            known: further columns to leave out.
        """
        self._positive_ids_Q = candidate_ids_C[positive_Q] if mask_accidental_hits else None
        self._by_id = candidate_ids_C.sort() if mask_accidental_hits else None
        self._known = known
        self._by_key = known.candidate_keys.sort() if known is not None else None

    def pairs(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the pairs of queries [first, last): rows counted from ``first``, and columns, each [P] int64.

        A yield holds at most as many pairs as there are candidates, or 131,072 where that is more. A pair
        can come more than once.
        """
        if self._positive_ids_Q is not None and self._by_id is not None:
            keys_S = self._positive_ids_Q[first:last]
            rows_S = torch.arange(last - first, device=keys_S.device)
            yield from _matches(rows_S, keys_S, *self._by_id, fewest=2)  # one is the positive itself
        if self._known is not None and self._by_key is not None:
            offsets = self._known.offsets[first : last + 1]
            keys_S = self._known.keys[offsets[0] : offsets[-1]]
            rows_S = torch.arange(last - first, device=keys_S.device).repeat_interleave(offsets.diff())
            yield from _matches(rows_S, keys_S, *self._by_key, fewest=1)


@dataclass(frozen=True)
class Batch:
    """The inputs of a loss that take no gradient, in the type that it is computed in."""

    positive_Q: Tensor
    """[Q] int64, column of each query's positive."""
    bias_C: Tensor
    """[C], -log_q; -inf at padding."""
    weight_Q: Tensor
    """[Q], 0 for padding queries."""
    left_out: LeftOut
    """What each query leaves out beside padding."""
    own_bias_QH: Tensor | None
    """[Q, H], -log_q of own negatives."""


def _matches(
    rows_S: Tensor, keys_S: Tensor, sorted_C: Tensor, order_C: Tensor, fewest: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all (row, column) with the row's key, for keys with ``fewest`` columns at least."""
    begin_S = torch.searchsorted(sorted_C, keys_S)
    count_S = torch.searchsorted(sorted_C, keys_S, right=True) - begin_S
    some = (count_S >= fewest).nonzero()[:, 0]
    rows_S, begin_S, count_S = rows_S[some], begin_S[some], count_S[some]
    end_S = count_S.cumsum(0)
    first = 0
    while first < len(end_S):
        before = int(end_S[first] - count_S[first])
        last = max(first + 1, int(torch.searchsorted(end_S, before + _PAIRS_AT_ONCE, right=True)))
        count = count_S[first:last]
        # The p-th pair of this piece lies in a span that begins at begin_S after end_S - count_S pairs.
        shift = (begin_S[first:last] - end_S[first:last] + count).repeat_interleave(count)
        position = torch.arange(before, before + len(shift), device=shift.device).add_(shift)
        yield rows_S[first:last].repeat_interleave(count), order_C[position]
        first = last
