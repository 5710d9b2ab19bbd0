"""Exact top-k of queries against all items, in blocks, without each query's masked items.

The order is score descending, then item row ascending, so that a ranking does not depend on how the work
was cut into blocks. Masked items are given as arrays: those of query q are
``masked_rows[masked_offsets[q]:masked_offsets[q + 1]]``; repeats and rows beyond the catalogue are fine.

Legend: Q queries, N items, D embedding_dim, k items of a list.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

BLOCK_SCORES = 1 << 24
"""Scores held at once: 64 MiB of float32, and a few times that while the best are picked."""

CPU_BLOCK_SCORES = 1 << 22
"""Scores that ``rank_block`` holds on a CPU: 16 MiB, of which a good part stays in its caches."""

BLOCK_ITEMS = 1 << 17
"""Most items of a block; a larger catalogue is ranked block by block and merged."""

_GROUP = 64
"""Neighbouring scores of which the best are picked by their maximum first."""


def rank_block(
    queries: torch.Tensor | Floats,
    item_vectors: torch.Tensor | Floats,
    masked_offsets: Ints,
    masked_rows: Ints,
    k: int,
    block_scores: int | None = None,
    block_items: int = BLOCK_ITEMS,
) -> Ints:
    """Return the top k items of each query by dot product.

    Runs on the device of ``queries`` with the threads that the process has given torch; item vectors that
    are elsewhere (or memory-mapped) are moved block by block.

    Args:
        queries: [Q, D] float32.
        item_vectors: [N, D] float32, row n is the item with item_row n.
        masked_offsets: [Q + 1] int64.
        masked_rows: int64 item rows that are left out of each query's list.
        k: length of a list, at least 1.
        block_scores: scores held at once; as many as suit the device when not given.
        block_items: most items of a block.

    Returns:
        [Q, k] int64 item rows, best first; -1 behind the last one where fewer than k items are not masked.

    Raises:
        ValueError: the shapes do not fit, or a vector or score is not finite.
    """
    query_tensor = _tensor(queries)
    if query_tensor.ndim != 2 or item_vectors.ndim != 2 or query_tensor.shape[1] != item_vectors.shape[1]:
        raise ValueError(
            f"queries have shape {tuple(query_tensor.shape)} and item vectors {tuple(item_vectors.shape)}; "
            "both must be [rows, D] with the same D"
        )
    num_queries, num_items = len(query_tensor), len(item_vectors)
    offsets, rows = _masks(masked_offsets, masked_rows, num_queries, num_items)
    _check_k(k)
    if not bool(torch.isfinite(query_tensor).all()):
        raise ValueError("a query vector is not finite; the model that made it has diverged")
    if block_scores is None:
        block_scores = CPU_BLOCK_SCORES if query_tensor.device.type == "cpu" else BLOCK_SCORES
    item_step = max(1, min(num_items, block_items))
    query_step = max(1, block_scores // item_step)
    parts = [
        slice(start, min(start + query_step, num_queries)) for start in range(0, num_queries, query_step)
    ]
    best = [_Best(part.stop - part.start, k) for part in parts]
    with torch.inference_mode():
        query_tensor = query_tensor.to(torch.float32)
        for first in range(0, num_items, item_step):
            last = min(first + item_step, num_items)
            vectors = _tensor(item_vectors[first:last]).to(query_tensor.device, torch.float32)
            safe = _products_are_finite(query_tensor, vectors)
            for part, its in zip(parts, best, strict=True):
                scores = query_tensor[part] @ vectors.T
                if not safe:
                    _refuse_not_finite(scores)
                _mask(scores, offsets[part.start : part.stop + 1], rows, first, last)
                its.add(scores, first)
    return np.concatenate([np.empty((0, k), np.int64), *(its.rows for its in best)])


def rank_scores(scores: Floats, masked_offsets: Ints, masked_rows: Ints, k: int) -> Ints:
    """Return the top k of given scores [Q, N] float32, as ``rank_block`` does."""
    tensor = torch.from_numpy(np.array(scores, dtype=np.float32))
    if tensor.ndim != 2:
        raise ValueError(f"scores have shape {tuple(tensor.shape)}; they must be [Q, N]")
    num_queries, num_items = tensor.shape
    offsets, rows = _masks(masked_offsets, masked_rows, num_queries, num_items)
    _check_k(k)
    _refuse_not_finite(tensor)
    _mask(tensor, offsets, rows, 0, num_items)
    best = _Best(num_queries, k)
    if num_items:
        best.add(tensor, 0)
    return best.rows


def rank_order(order: Ints, masked_offsets: Ints, masked_rows: Ints, k: int) -> Ints:
    """Return for each query the first k items of one order that are not masked.

    Args:
        order: [N] int64, every item row once, best first; the same for all queries.
        masked_offsets: [Q + 1] int64.
        masked_rows: int64 item rows.
        k: length of a list.

    Returns:
        [Q, k] int64, -1 padded.
    """
    order = np.asarray(order, dtype=np.int64)
    num_queries, num_items = len(masked_offsets) - 1, len(order)
    offsets, rows = _masks(masked_offsets, masked_rows, num_queries, num_items)
    _check_k(k)
    position = np.empty(num_items, dtype=np.int64)
    position[order] = np.arange(num_items)
    ranked = np.full((num_queries, k), -1, dtype=np.int64)
    for query in range(num_queries):
        masked = rows[offsets[query] : offsets[query + 1]]
        # Each masked item takes at most one place, so no list reaches further than this.
        width = min(num_items, k + len(masked))
        keep = np.ones(width, dtype=bool)
        places = position[masked]
        keep[places[places < width]] = False
        top = order[:width][keep][:k]
        ranked[query, : len(top)] = top
    return ranked


class _Best:
    """The best k of each query over the blocks added so far."""

    def __init__(self, num_queries: int, k: int) -> None:
        self.k = k
        self.rows: Ints = np.full((num_queries, k), -1, dtype=np.int64)
        self._scores: Floats = np.full((num_queries, k), -np.inf, dtype=np.float32)

    def add(self, scores: torch.Tensor, first_row: int) -> None:
        """Add a block of scores [Q, n]; -inf is masked. Its columns are the items from ``first_row`` on."""
        values, columns = _top(scores, self.k)
        rows = np.where(np.isneginf(values), -1, columns + first_row)
        all_scores = np.concatenate([self._scores, values], axis=1)
        all_rows = np.concatenate([self.rows, rows], axis=1)
        # Padding has the score -inf and so comes last whatever its row is.
        order = np.lexsort((all_rows, -all_scores), axis=1)[:, : self.k]
        self._scores = np.take_along_axis(all_scores, order, axis=1)
        self.rows = np.take_along_axis(all_rows, order, axis=1)


def _top(scores: torch.Tensor, k: int) -> tuple[Floats, Ints]:
    """The k best columns of each row, ties at the cut resolved in favour of the smaller column."""
    num_columns = scores.shape[1]
    # Which of several equal scores are picked is chance. One more than k shows where that would matter.
    values, columns = _largest(scores, min(k + 1, num_columns))
    if num_columns > k:
        tied = (values[:, k - 1] == values[:, k]) & ~torch.isneginf(values[:, k])
        values, columns = values[:, :k], columns[:, :k].clone()
        for row in torch.nonzero(tied).flatten().tolist():
            cut = values[row, k - 1]
            above = torch.nonzero(scores[row] > cut).flatten()
            equal = torch.nonzero(scores[row] == cut).flatten()[: k - len(above)]
            columns[row] = torch.cat([above, equal])
        values = torch.gather(scores, 1, columns)
    return values.cpu().numpy(), columns.cpu().numpy()


def _largest(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The values and columns that torch.topk gives, any of those that tie at the cut.

    A row's ``count`` largest scores are in the ``count`` groups of neighbours with the largest maxima: each
    other group has no score above any of these maxima. A maximum reads a group faster than a sort does.
    """
    num_columns = scores.shape[1]
    groups = num_columns // _GROUP
    if groups < 4 * count:
        return torch.topk(scores, count, dim=1)
    even = groups * _GROUP
    maxima = scores[:, :even].unflatten(1, (groups, _GROUP)).amax(2)
    chosen = torch.topk(maxima, count, dim=1, sorted=False).indices
    places = torch.arange(_GROUP, device=scores.device)
    columns = (chosen[:, :, None] * _GROUP + places).flatten(1)
    if even < num_columns:
        rest = torch.arange(even, num_columns, device=scores.device)
        columns = torch.cat([columns, rest.expand(len(scores), -1)], dim=1)
    values, found = torch.topk(scores.gather(1, columns), count, dim=1)
    return values, columns.gather(1, found)


def _mask(scores: torch.Tensor, offsets: Ints, rows: Ints, first: int, last: int) -> None:
    """Set the masked items of columns ``first`` to ``last`` to -inf, in place."""
    masked = rows[offsets[0] : offsets[-1]]
    query = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    inside = (masked >= first) & (masked < last)
    cells = torch.from_numpy(query[inside]), torch.from_numpy(masked[inside] - first)
    scores[cells[0].to(scores.device), cells[1].to(scores.device)] = -torch.inf


def _masks(masked_offsets: Ints, masked_rows: Ints, num_queries: int, num_items: int) -> tuple[Ints, Ints]:
    """The masks checked, without rows beyond the catalogue."""
    offsets = np.asarray(masked_offsets, dtype=np.int64)
    rows = np.asarray(masked_rows, dtype=np.int64)
    fits = offsets.shape == (num_queries + 1,) and offsets[0] == 0 and offsets[-1] == len(rows)
    if not fits or (np.diff(offsets) < 0).any():
        raise ValueError(
            f"masked_offsets has shape {offsets.shape} for {num_queries} queries and {len(rows)} rows; "
            f"it must be [{num_queries + 1}] and rise from 0 to {len(rows)}"
        )
    if len(rows) and rows.min() < 0:
        raise ValueError(f"masked_rows holds {rows.min()}; item rows are 0 or greater")
    inside = rows < num_items
    if not inside.all():
        offsets = np.concatenate([[0], np.cumsum(inside)])[offsets]
        rows = rows[inside]
    return offsets, rows


def _products_are_finite(queries: torch.Tensor, vectors: torch.Tensor) -> bool:
    """Whether no dot product can overflow, by the largest elements; false where an element is not finite."""
    if not queries.numel() or not vectors.numel():
        return True
    bound = float(queries.abs().max()) * float(vectors.abs().max()) * queries.shape[1]
    return bound < torch.finfo(torch.float32).max / 2


def _refuse_not_finite(scores: torch.Tensor) -> None:
    # A sum is finite only if every term is; where the sum itself overflows, the terms are looked at.
    if not bool(torch.isfinite(scores.sum())) and not bool(torch.isfinite(scores).all()):
        raise ValueError("a score is not finite (NaN or infinite); what it was computed from is damaged")


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")


def _tensor(values: torch.Tensor | Floats) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values.detach()
    values = np.asarray(values)
    # torch warns of read-only (memory-mapped) arrays, which a block of is copied here.
    return torch.from_numpy(values if values.flags.writeable else values.copy())
