"""The measurement after each epoch: held-out items against the whole catalogue, shared out over ranks."""

from __future__ import annotations

import numpy as np
import torch

from twotower.evaluation.metrics import MetricSums
from twotower.evaluation.ranking import rank_block
from twotower.model.features import to_device
from twotower.model.towers import TwoTower
from twotower.training.collectives import World, gather, sum_over_ranks
from twotower.training.examples import Examples, HeldOut

_ITEMS_AT_ONCE = 8_192
_QUERIES_AT_ONCE = 512


def validate(
    model: TwoTower, examples: Examples, held_out: HeldOut, world: World, k: int
) -> dict[str, float]:
    """Return the mean metrics of the held-out users, such as ``recall@100``.

    Each rank encodes a share of the catalogue, all ranks get all of it, each ranks a share of the users.
    Collective: all ranks.
    """
    vectors = _encode_catalogue(model, examples, world)
    sums = MetricSums([k])
    begin, end = world.share(len(held_out.user_rows))
    for first in range(begin, end, _QUERIES_AT_ONCE):
        last = min(first + _QUERIES_AT_ONCE, end)
        batch = to_device(examples.latest_queries(held_out.user_rows[first:last]), world.device)
        queries = model.encode_queries(batch).cpu().numpy()
        masked = _part(held_out.masked_offsets, held_out.masked_rows, first, last)
        ranked = rank_block(queries, vectors, *masked, k)
        sums.add(ranked, *_part(held_out.relevant_offsets, held_out.relevant_rows, first, last))
    total = sum_over_ranks(torch.from_numpy(sums.state()).to(world.device), world)
    merged = MetricSums([k])
    merged.merge(total.cpu().numpy())
    return merged.result()


def _encode_catalogue(model: TwoTower, examples: Examples, world: World) -> np.ndarray:
    """Return all catalogue vectors, [N, D] float32, on every rank."""
    count = examples.num_catalogue_items
    begin, end = world.share(count)
    each = -(-count // world.size)
    mine = torch.zeros(each, model.embedding_dim, device=world.device)
    for first in range(begin, end, _ITEMS_AT_ONCE):
        rows = np.arange(first, min(first + _ITEMS_AT_ONCE, end))
        vectors = model.encode_items(to_device(examples.items(rows), world.device))
        mine[first - begin : first - begin + len(rows)] = vectors
    return gather(mine, world)[:count].cpu().numpy()


def _part(offsets: np.ndarray, rows: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the compressed rows of queries [first, last)."""
    return offsets[first : last + 1] - offsets[first], rows[offsets[first] : offsets[last]]
