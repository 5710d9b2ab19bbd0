"""Items that training did not know: the item tower reads the unknown id for them, and histories a vector.

In a history the row of the unknown id would say that something unknown was there, and pull a query towards
whatever else is unknown. So what a history reads of such an item is a linear function of the item's other
features, fitted to the rows of the items that were trained: ridge regression of rows on what the item tower
reads beside the id, in which an item weighs the square root of its examples.

Source: Gantner, Drumond, Freudenthaler, Rendle, Schmidt-Thieme: Learning attribute-to-feature mappings for
    cold-start recommendations (ICDM 2010), section IV, with a closed form in place of stochastic descent.

Shapes: n items, X width of the item tower's input beside the id, E width of a table, R its rows, V width of a
profile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from twotower.model.batch import Bag, forget
from twotower.model.hashing import hashed_rows
from twotower.schema import UNKNOWN_ROW, IdFeature

RIDGE = 0.01
"""Added to the diagonal of the features' correlations."""


class UnknownItems(nn.Module):
    """Which ids were not trained, and what histories read in their place. Nothing is learned by gradient.

    As made, and as loaded from a release before it, it is not fitted: every id counts as trained.
    """

    untrained: torch.Tensor
    unchosen_row: torch.Tensor

    def __init__(self, width: int, tables: Mapping[str, int], num_rows: int) -> None:
        """Make what is not fitted.

        Args:
            width: X.
            tables: E of each table of item ids that a history reads, by name.
            num_rows: R of the table that the item tower reads; 0 where ids share rows, or it has none.
        """
        super().__init__()
        self.maps = nn.Module()
        for name, dim in tables.items():
            self.maps.register_buffer(name, torch.zeros(width + 1, dim))
        self.register_buffer("untrained", torch.zeros(num_rows, dtype=torch.bool))
        # Where no training has drawn them as negatives, these items are as unknown as those that come later.
        self.register_buffer("unchosen_row", torch.tensor(UNKNOWN_ROW))

    @property
    def tables(self) -> dict[str, torch.Tensor]:
        """The map of each table, [X + 1, E] float32; its last row is what is added."""
        return dict(self.maps.named_buffers())

    @property
    def fitted(self) -> bool:
        """Whether there are maps, and they are fitted."""
        return any(bool(weights.any()) for weights in self.tables.values())

    def vectors(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what histories read of items, [n, E] float32 by table, from their features [n, X]."""
        return {name: torch.addmm(w[-1], features, w[:-1]) for name, w in self.tables.items()}

    def known(self, bag: Bag) -> Bag:
        """Return a bag of item ids, one each, in which one row stands for all that have no example."""
        if not len(self.untrained):
            return bag
        return forget(bag, self.untrained[bag.ids[:, 0].clamp(min=0)], self.unchosen_row)


@dataclass(frozen=True)
class DescribedItems:
    """Items without a row of their own, as histories read them: number j is item row ``num_items`` + j."""

    vectors: Mapping[str, torch.Tensor]
    """By table of item ids, [n, E] float32; a table that is not there reads nothing of them."""
    profiles: Mapping[str, npt.NDArray[np.float32]]
    """By profile feature, [n, V]: what it averages."""

    @property
    def any_read(self) -> bool:
        """Whether a history reads anything of them."""
        return bool(self.vectors or self.profiles)

    def joined(self, other: DescribedItems) -> DescribedItems:
        """Return these items with others behind them."""
        return DescribedItems(
            {name: torch.cat([v, other.vectors[name]]) for name, v in self.vectors.items()},
            {name: np.concatenate([v, other.profiles[name]]) for name, v in self.profiles.items()},
        )


class RidgeSums:
    """Sums over items, from which maps follow; those of parts of the items add up."""

    def __init__(self, width: int, dims: Mapping[str, int]) -> None:
        """Begin with no item: X, and E by table."""
        self._width = width
        self._dims = dict(dims)
        # Of (1, features) with itself and with the rows of every table.
        self.total = torch.zeros(width + 1, width + 1 + sum(dims.values()), dtype=torch.float64)

    def add(self, features: torch.Tensor, rows: Mapping[str, torch.Tensor], weights: torch.Tensor) -> None:
        """Add items.

        Args:
            features: [n, X].
            rows: their trained rows by table, [n, E].
            weights: [n] float64, what each counts.
        """
        left = torch.cat([torch.ones(len(features), 1), features.cpu()], dim=1).double()
        right = torch.cat([left, *(rows[name].cpu().double() for name in self._dims)], dim=1)
        self.total += (left * weights[:, None]).T @ right

    def maps(self) -> dict[str, torch.Tensor]:
        """Return the map of each table, [X + 1, E] float32; zeros where no item was added."""
        count, width = self.total[0, 0], self._width
        if count == 0:
            return {name: torch.zeros(width + 1, dim) for name, dim in self._dims.items()}
        means = self.total[0] / count
        mean_X, mean_E = means[1 : width + 1], means[width + 1 :]
        covariance = self.total[1:, 1:] / count - mean_X[:, None] * means[1:]
        inner, outer = covariance[:, :width], covariance[:, width:]
        deviation = inner.diagonal().clamp(min=0).sqrt()
        # A feature that is the same for all items says nothing.
        scale = torch.where(deviation > 1e-6 * (1 + mean_X.abs()), 1 / deviation, 0)
        ridge = torch.eye(width, dtype=torch.float64) * (1 + RIDGE)
        correlation = inner * scale[:, None] * scale
        correlation = correlation - torch.diag(correlation.diagonal()) + ridge
        slope = scale[:, None] * torch.linalg.solve(correlation, outer * scale[:, None])
        both = torch.cat([slope, (mean_E - mean_X @ slope)[None]]).float()
        return dict(zip(self._dims, both.split(list(self._dims.values()), dim=1), strict=True))


def hashed_item_rows(rows: torch.Tensor, table: IdFeature, num_items: int | None) -> torch.Tensor:
    """Return the rows of a hashed table that items of histories read, [..., hashes] int64, -1 where none.

    Described items read their vectors, whose rows are those behind the table's R: R + j is number j.

    Args:
        rows: [...] int64 item rows; -1 is none, and ``num_items`` + j the described item j.
        table: the id feature.
        num_items: items of the vocabulary; None where none is described.
    """
    assert table.buckets is not None
    ids = hashed_rows(rows, table.buckets, table.hashes).masked_fill((rows < 0)[..., None], -1)
    if num_items is not None and bool((described := rows >= num_items).any()):
        ids = ids.masked_fill(described[..., None], -1)
        ids[..., 0] = torch.where(described, rows - num_items + table.buckets + 1, ids[..., 0])
    return ids
