"""After an epoch: what is read of items that no example has, and of those that come after the training.

Shapes: as in ``model/unknown_items``; N catalogue items.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from twotower.model.batch import Bag, FeatureBatch, to_device
from twotower.model.towers import ITEM_IDS, TwoTower
from twotower.model.unknown_items import RidgeSums
from twotower.schema import UNKNOWN_ROW, FeatureSchema
from twotower.training.collectives import World, gather, sum_over_ranks
from twotower.training.examples import TowerInputs

_FITTED = 100_000
"""The most items that maps are fitted to: far more than a linear function of some hundred features needs."""
_AT_ONCE = 8_192
IntArray = npt.NDArray[np.int64]


class UnknownItemsFit:
    """Fits ``TwoTower.unknown_items`` to the rows that have been trained."""

    def __init__(self, schema: FeatureSchema, item_counts: IntArray, unchosen_row: int) -> None:
        """See which items have examples.

        Args:
            schema: of the model.
            item_counts: [N] int64, examples of each item in an epoch.
            unchosen_row: of the table of item ids, that the item tower reads for items without an example.
        """
        self._unchosen_row = unchosen_row
        trained = np.flatnonzero(item_counts)
        # Spread over the catalogue, and the same on every rank.
        self._fitted = trained[:: max(-(-len(trained) // _FITTED), 1)]
        self._weights = np.sqrt(item_counts[self._fitted])
        self._untrained = np.flatnonzero(item_counts == 0)
        self._ids = schema.item_id
        self._marks = schema.new_items_by_features

    def __call__(self, model: TwoTower, inputs: TowerInputs, world: World) -> None:
        """Fit the maps, and put what they say in the rows of items that no example has.

        Collective: all ranks, which all get the same.
        """
        unknown = model.unknown_items
        rows = torch.from_numpy(self._untrained + UNKNOWN_ROW + 1).to(world.device)
        # Weights that a training starts from may be of one that did not know other items.
        unknown.untrained.zero_()
        unknown.unchosen_row.fill_(self._unchosen_row)
        if self._marks and len(unknown.untrained):
            unknown.untrained[rows] = True
        if not unknown.tables:
            return
        with torch.no_grad():
            for name, weights in self._fit(model, inputs, world).items():
                unknown.tables[name].copy_(weights)
            filled = [name for name in unknown.tables if name != ITEM_IDS or self._marks]
            if filled and len(rows):
                self._fill(model, inputs, world, filled, rows)

    def _fit(self, model: TwoTower, inputs: TowerInputs, world: World) -> dict[str, torch.Tensor]:
        maps = model.unknown_items.tables
        width = next(iter(maps.values())).shape[0] - 1
        sums = RidgeSums(width, {name: weights.shape[1] for name, weights in maps.items()})
        begin, end = world.share(len(self._fitted))
        for first in range(begin, end, _AT_ONCE):
            part = slice(first, min(first + _AT_ONCE, end))
            items = self._fitted[part]
            rows = {name: self._rows(model, name, inputs.items(items), items, world) for name in maps}
            features = model.item_features(to_device(inputs.items(items), world.device))
            sums.add(features, rows, torch.from_numpy(self._weights[part]))
        sums.total = sum_over_ranks(sums.total.to(world.device), world).cpu()
        return sums.maps()

    def _rows(
        self, model: TwoTower, name: str, batch: FeatureBatch, items: IntArray, world: World
    ) -> torch.Tensor:
        """Return the rows of a table that items read, [n, E] float32."""
        if name == ITEM_IDS and self._ids is not None and self._ids.buckets is not None:
            # A sum of shared rows.
            bag = to_device({name: batch[self._ids.name]}, world.device)[name]
            assert isinstance(bag, Bag)
            return model.lookup(name, bag).detach()
        rows = torch.from_numpy(items + UNKNOWN_ROW + 1).to(world.device)
        return model.tables[name].detach().index_select(0, rows).float()

    def _fill(
        self, model: TwoTower, inputs: TowerInputs, world: World, names: list[str], rows: torch.Tensor
    ) -> None:
        """Give rows of tables, those of items without examples, the vectors of the maps; ranks share them."""
        begin, end = world.share(len(rows))
        each = -(-len(rows) // world.size)
        maps = model.unknown_items.tables
        mine = {name: torch.zeros(each, maps[name].shape[1], device=world.device) for name in names}
        for first in range(begin, end, _AT_ONCE):
            items = self._untrained[first : min(first + _AT_ONCE, end)]
            features = model.item_features(to_device(inputs.items(items), world.device))
            vectors = model.unknown_items.vectors(features)
            for name in names:
                mine[name][first - begin : first - begin + len(items)] = vectors[name]
        for name, share in mine.items():
            table = model.tables[name].data
            found = gather(share, world)[: len(rows)].to(table.dtype)
            if name == ITEM_IDS and self._unchosen_row != UNKNOWN_ROW:
                # It stands for all of them in the item tower, and is trained.
                found[rows == self._unchosen_row] = table[self._unchosen_row]
            table[rows] = found
