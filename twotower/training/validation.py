"""The measurement after each epoch: held-out items against the whole catalogue, shared out over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from twotower.data.interactions import Interactions
from twotower.data.knowledge import Holdout, Rules, holdout, known, nothing_relevant
from twotower.errors import DataError
from twotower.evaluation.metrics import MetricSums
from twotower.evaluation.ranking import rank_block
from twotower.model.batch import to_device
from twotower.model.towers import TwoTower
from twotower.training.collectives import World, gather, sum_over_ranks
from twotower.training.examples import Examples, TowerInputs

_ITEMS_AT_ONCE = 8_192
_QUERIES_AT_ONCE = 512
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Validation:
    """Queries of the validation split."""

    queries: Holdout
    """Q users, what is masked and what is relevant."""
    known: Examples
    """What each of these users' queries knows, numbered from 0."""


def validation_queries(
    blocks: Callable[[], Iterable[Interactions]], inputs: TowerInputs, rules: Rules, max_users: int, seed: int
) -> Validation:
    """Return the queries of the validation split, drawn once where there are more.

    Args:
        blocks: makes an iterator over the interactions, none of which parts a user; called twice.
        inputs: of the dataset.
        rules: of the dataset.
        max_users: the most queries returned.
        seed: of the draw.

    Raises:
        DataError: no user has a relevant item, so that no epoch could be measured.
    """
    found = [holdout(block, "validation", rules).user_rows for block in blocks()]
    users = np.concatenate([*found, np.empty(0, np.int64)])
    if len(users) == 0:
        raise DataError(nothing_relevant("validation", rules))
    if len(users) > max_users:
        users = np.sort(np.random.default_rng([seed, 1]).choice(users, max_users, replace=False))
    theirs = of_users(blocks(), users)
    queries = replace(holdout(theirs, "validation", rules), user_rows=users)
    return Validation(queries, Examples(inputs, theirs.select(known(theirs, "validation", rules)), users))


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


def validate(
    model: TwoTower, inputs: TowerInputs, validation: Validation, world: World, k: int
) -> dict[str, float]:
    """Return the mean metrics of the validation queries, such as ``recall@100``.

    Each rank encodes a share of the catalogue, all ranks get all of it, each ranks a share of the users.
    Collective: all ranks.
    """
    vectors = encode_catalogue(model, inputs, world)
    sums = MetricSums([k])
    held = validation.queries
    begin, end = world.share(len(held))
    for first in range(begin, end, _QUERIES_AT_ONCE):
        last = min(first + _QUERIES_AT_ONCE, end)
        batch = to_device(validation.known.latest_queries(np.arange(first, last)), world.device)
        queries = model.encode_queries(batch).cpu().numpy()
        part = held.part(first, last)
        ranked = rank_block(queries, vectors, part.masked_offsets, part.masked_rows, k)
        sums.add(ranked, part.relevant_offsets, part.relevant_rows)
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


def _empty() -> dict[str, npt.NDArray[np.generic]]:
    from twotower.data.interactions import COLUMNS

    return {name: np.empty(0, kind) for name, kind in COLUMNS.items()}
