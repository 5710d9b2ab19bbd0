"""Items by their features alone, as histories read them."""

from __future__ import annotations

import numpy as np
import torch

from twotower.model.batch import to_device
from twotower.model.features import Columns, averaged, item_batch
from twotower.model.towers import TwoTower
from twotower.model.unknown_items import DescribedItems


def describe_items(model: TwoTower, columns: Columns, count: int) -> DescribedItems:
    """Return what histories read of items by their features.

    Args:
        model: on any device; where its maps are not fitted, only profiles read something.
        columns: static columns of the items, [count, ...] each.
        count: of items.
    """
    schema, vectors = model.schema, dict[str, torch.Tensor]()
    if model.unknown_items.fitted:
        batch = to_device(item_batch(schema, np.full(count, -1), columns), model.log_temperature.device)
        # Made under inference mode, and kept for queries that come later.
        with torch.inference_mode():
            found = model.unknown_items.vectors(model.item_features(batch))
        vectors = {name: v.cpu() for name, v in found.items()}
    return DescribedItems(vectors, averaged(schema, columns, count))
