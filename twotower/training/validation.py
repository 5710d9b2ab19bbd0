"""The measurement after each epoch: held-out items against the whole catalogue, shared out over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from twotower.data.interactions import Interactions
from twotower.evaluation.metrics import MetricSums
from twotower.evaluation.ranking import rank_block
from twotower.model.features import to_device
from twotower.model.towers import TwoTower
from twotower.schema import KINDS, SPLITS
from twotower.training.collectives import World, gather, sum_over_ranks
from twotower.training.examples import Examples, TowerInputs

_ITEMS_AT_ONCE = 8_192
_QUERIES_AT_ONCE = 512
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HeldOut:
    """Queries of Q users with held-out items."""

    users: Examples
    """The train split of these users, numbered from 0."""
    user_rows: IntArray
    """[Q] int64, ascending."""
    masked_offsets: IntArray
    """[Q + 1] int64."""
    masked_rows: IntArray
    """Items of the train split of each user, those that were only shown to him left out."""
    relevant_offsets: IntArray
    """[Q + 1] int64."""
    relevant_rows: IntArray
    """Held-out items of each user."""


def held_out(
    blocks: Callable[[], Iterable[Interactions]], inputs: TowerInputs, max_users: int, seed: int
) -> HeldOut:
    """Return users with positive catalogue items in the validation split, drawn once where there are more.

    Args:
        blocks: makes an iterator over the interactions, none of which parts a user; called twice.
        inputs: of the dataset.
        max_users: the most users returned.
        seed: of the draw.
    """

    def relevant(interactions: Interactions) -> npt.NDArray[np.bool_]:
        return (
            (interactions.split == SPLITS["validation"])
            & (interactions.kind == KINDS["positive"])
            & (interactions.item_row < inputs.num_catalogue_items)
        )

    found = [np.unique(block.user_row[relevant(block)]) for block in blocks()]
    users = np.concatenate([*found, np.empty(0, np.int32)]).astype(np.int64)
    if len(users) > max_users:
        users = np.sort(np.random.default_rng([seed, 1]).choice(users, max_users, replace=False))
    theirs = of_users(blocks(), users)
    return HeldOut(
        Examples(inputs, theirs.select(theirs.split == SPLITS["train"]), users),
        users,
        *_rows_of(theirs.select((theirs.split == SPLITS["train"]) & ~theirs.is_impression)),
        *_rows_of(theirs.select(relevant(theirs))),
    )


def of_users(blocks: Iterable[Interactions], users: IntArray) -> Interactions:
    """Return the interactions of some users (ascending rows), who are numbered from 0 in the result."""
    parts = []
    for block in blocks:
        mine = block.select(np.isin(block.user_row, users))
        columns = mine.columns()
        columns["user_row"] = np.searchsorted(users, mine.user_row).astype(np.int32)
        parts.append(columns)
    names = Interactions.of(0, **_empty()).columns()
    joined = {n: np.concatenate([p[n] for p in parts] or [names[n]]) for n in names}
    return Interactions.of(len(users), **joined)


def validate(model: TwoTower, inputs: TowerInputs, held: HeldOut, world: World, k: int) -> dict[str, float]:
    """Return the mean metrics of the held-out users, such as ``recall@100``.

    Each rank encodes a share of the catalogue, all ranks get all of it, each ranks a share of the users.
    Collective: all ranks.
    """
    vectors = encode_catalogue(model, inputs, world)
    sums = MetricSums([k])
    begin, end = world.share(len(held.user_rows))
    for first in range(begin, end, _QUERIES_AT_ONCE):
        last = min(first + _QUERIES_AT_ONCE, end)
        batch = to_device(held.users.latest_queries(np.arange(first, last)), world.device)
        queries = model.encode_queries(batch).cpu().numpy()
        masked = _part(held.masked_offsets, held.masked_rows, first, last)
        ranked = rank_block(queries, vectors, *masked, k)
        sums.add(ranked, *_part(held.relevant_offsets, held.relevant_rows, first, last))
    total = sum_over_ranks(torch.from_numpy(sums.state()).to(world.device), world)
    merged = MetricSums([k])
    merged.merge(total.cpu().numpy())
    return merged.result()


def encode_catalogue(model: TwoTower, inputs: TowerInputs, world: World) -> npt.NDArray[np.float32]:
    """Return all catalogue vectors, [N, D] float32, on every rank; each rank encodes a share.

    Collective: all ranks.
    """
    count = inputs.num_catalogue_items
    begin, end = world.share(count)
    each = -(-count // world.size)
    mine = torch.zeros(each, model.embedding_dim, device=world.device)
    for first in range(begin, end, _ITEMS_AT_ONCE):
        rows = np.arange(first, min(first + _ITEMS_AT_ONCE, end))
        vectors = model.encode_items(to_device(inputs.items(rows), world.device))
        mine[first - begin : first - begin + len(rows)] = vectors
    catalogue: npt.NDArray[np.float32] = gather(mine, world)[:count].cpu().numpy()
    return catalogue


def _rows_of(interactions: Interactions) -> tuple[IntArray, IntArray]:
    """Return the distinct items of each user as (offsets [Q + 1], item rows)."""
    pairs = np.stack([interactions.user_row, interactions.item_row])
    user, item = np.unique(pairs, axis=1).astype(np.int64)
    counts = np.bincount(user, minlength=interactions.num_users)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), item


def _part(offsets: IntArray, rows: IntArray, first: int, last: int) -> tuple[IntArray, IntArray]:
    """Return the compressed rows of queries [first, last)."""
    return offsets[first : last + 1] - offsets[first], rows[offsets[first] : offsets[last]]


def _empty() -> dict[str, npt.NDArray[np.generic]]:
    from twotower.data.interactions import COLUMNS

    return {name: np.empty(0, kind) for name, kind in COLUMNS.items()}
