"""What the towers read of a batch: bags of embedding rows, sequences of them, and dense values.

Shapes: B rows of a batch, L ids of a bag, R rows of a grid of sequences, T its width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from twotower.schema import UNKNOWN_ROW


@dataclass(frozen=True)
class Bag:
    """Weighted embedding rows: the embedding of a bag is the weighted sum of its rows."""

    ids: torch.Tensor
    """[B, L] int64; -1 is padding."""
    weights: torch.Tensor
    """[B, L] float32; 0 at padding."""
    extra: torch.Tensor | None = None
    """[m, E] float32: what ids behind the table's R rows read, R + j number j. Training has none."""

    def part(self, rows: slice) -> Bag:
        """Return some of the rows."""
        return replace(self, ids=self.ids[rows], weights=self.weights[rows])

    def to(self, device: torch.device | str) -> Bag:
        """Return the bag on a device; what is in pinned memory is copied while the host goes on."""
        return Bag(
            self.ids.to(device, non_blocking=True),
            self.weights.to(device, non_blocking=True),
            None if self.extra is None else self.extra.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Bag:
        """Return the bag in pinned memory."""
        return Bag(self.ids.pin_memory(), self.weights.pin_memory())


@dataclass(frozen=True)
class Sequences:
    """Stretches of histories in a grid, and at which item each query reads them.

    A row of the grid holds one stretch or several behind each other, oldest item first.
    """

    items: Bag
    """[R T, l], the embedding rows of each item: one, or one for each hash of a hashed table; padding is an
    empty bag."""
    stretch: torch.Tensor
    """[R, T] int64, number of the stretch that an item is of, -1 padding."""
    position: torch.Tensor
    """[R, T] int64, place of an item in its stretch: 0 is the oldest; 0 at padding."""
    read: torch.Tensor
    """[B] int64, place in the flat grid of the latest item that each query knows; -1 knows none."""
    grid_row: npt.NDArray[np.int64]
    """[B] int64 on the host, the row of ``read``, -1 where there is none."""
    alone: bool
    """Whether each row of the grid holds one stretch."""
    gap: torch.Tensor | None = None
    """[R, T] int64, class of the time between an item and the one before it, of ``sequences.gap_classes``;
    None where no feature reads it."""
    names: npt.NDArray[np.int64] | None = None
    """[w] int64 on the host, as in ``Stretches``."""
    keys: torch.Tensor | None = None
    """[R, T] int64, the seeds of each item's dropout masks; None leaves dropout out."""

    def keyed(self, keys: torch.Tensor) -> Sequences:
        """Return the sequences with the seeds of dropout masks, from those of the stretches, [w] int64."""
        return replace(self, keys=keys[self.stretch.clamp(min=0)] if len(keys) else self.stretch)

    def part(self, rows: slice) -> Sequences:
        """Return what some of the queries read."""
        grid_row = self.grid_row[rows]
        used = grid_row[grid_row >= 0]
        first, last = (int(used.min()), int(used.max()) + 1) if len(used) else (0, 0)
        width = self.stretch.shape[1]
        read, grid = self.read[rows], slice(first, last)
        return replace(
            self,
            items=self.items.part(slice(first * width, last * width)),
            stretch=self.stretch[grid],
            position=self.position[grid],
            read=torch.where(read < 0, read, read - first * width),
            grid_row=np.where(grid_row < 0, -1, grid_row - first),
            gap=None if self.gap is None else self.gap[grid],
            keys=None if self.keys is None else self.keys[grid],
        )

    def to(self, device: torch.device | str) -> Sequences:
        """Return the sequences on a device; what is in pinned memory is copied while the host goes on."""
        return replace(
            self,
            items=self.items.to(device),
            stretch=self.stretch.to(device, non_blocking=True),
            position=self.position.to(device, non_blocking=True),
            read=self.read.to(device, non_blocking=True),
            gap=None if self.gap is None else self.gap.to(device, non_blocking=True),
            keys=None if self.keys is None else self.keys.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Sequences:
        """Return the sequences in pinned memory."""
        return replace(
            self,
            items=self.items.pin_memory(),
            stretch=self.stretch.pin_memory(),
            position=self.position.pin_memory(),
            read=self.read.pin_memory(),
            gap=None if self.gap is None else self.gap.pin_memory(),
            keys=None if self.keys is None else self.keys.pin_memory(),
        )


FeatureBatch = dict[str, Bag | Sequences | torch.Tensor]
"""By feature name: a bag, sequences, or a dense float32 [B, D] tensor."""


def part_of(batch: FeatureBatch, rows: slice) -> FeatureBatch:
    """Return some rows of a batch."""
    return {n: v[rows] if isinstance(v, torch.Tensor) else v.part(rows) for n, v in batch.items()}


def to_device(batch: FeatureBatch, device: torch.device | str) -> FeatureBatch:
    """Return the batch on a device; what is in pinned memory is copied while the host goes on."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value.to(device)
        for name, value in batch.items()
    }


def pinned(batch: FeatureBatch) -> FeatureBatch:
    """Return the batch in pinned memory, from which copies to a GPU are asynchronous; needs a GPU."""
    return {name: value.pin_memory() for name, value in batch.items()}


def bag_of(value: Bag | Sequences | torch.Tensor) -> Bag | None:
    """Return the bag of embedding rows that a feature reads of its table, if it reads one."""
    if isinstance(value, Sequences):
        return value.items
    return value if isinstance(value, Bag) else None


def forget(bag: Bag, forgotten_B: torch.Tensor, row: int | torch.Tensor = UNKNOWN_ROW) -> Bag:
    """Return the bag of an id feature in which some of the ids are the unknown one, or one of another row.

    Args:
        bag: of an id feature, [B, L]; L is 1, or the number of hashes of a hashed table.
        forgotten_B: [B] bool, which rows.
        row: of the table, that is read instead; [] int64 where it is a tensor.
    """
    # The unknown id is one row of the table, also where another id is the sum of several.
    ids_L = torch.full(bag.ids.shape[1:], -1, dtype=bag.ids.dtype, device=bag.ids.device)
    ids_L[0] = row
    rows_B1 = forgotten_B[:, None]
    weights_L = (ids_L >= 0).to(bag.weights.dtype)
    return Bag(torch.where(rows_B1, ids_L, bag.ids), torch.where(rows_B1, weights_L, bag.weights))


def leave_out(bag: Bag, left_out: torch.Tensor, pooled: bool) -> Bag:
    """Return the bags of a history feature without some of their items.

    Args:
        bag: [B, L], the H items of a history or the one of each place of a grid, each of them L / H rows.
        left_out: [B, H] bool, which items.
        pooled: give their weights to those that stay, in proportion, so that each bag's sum stays; of a bag
            whose items are all left out nothing stays.
    """
    each = bag.weights.shape[1] // max(left_out.shape[1], 1)
    left_out = left_out.repeat_interleave(each, dim=1)
    weights = bag.weights.masked_fill(left_out, 0.0)
    if pooled:
        before, after = bag.weights.sum(1, keepdim=True), weights.sum(1, keepdim=True)
        weights = weights * torch.where(after > 0, before / after, 0.0)
    return Bag(bag.ids.masked_fill(left_out, -1), weights)
