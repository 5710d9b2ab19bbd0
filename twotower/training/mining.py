"""Hard negatives mined with the current towers: encode the catalogue, search it, train on what it finds.

For each example the best-ranked items are searched exactly. What the user has had takes no rank, the best
``skip`` ranks and items that score too close to the positive are left out as likely false negatives, and of
the ``window`` ranks behind some are drawn.

Shapes: n examples, H items mined for each, R ranks looked at, D embedding_dim.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from twotower.config.training import MinedConfig
from twotower.evaluation.ranking import rank_block
from twotower.model.batch import to_device
from twotower.model.dropout import row_keys, uniform
from twotower.model.towers import TwoTower
from twotower.training.collectives import World, gather_ragged
from twotower.training.examples import Examples
from twotower.training.validation import encode_catalogue

_QUERIES_AT_ONCE = 1_024
_STREAM = 1 << 21


def mine(
    model: TwoTower, examples: Examples, world: World, config: MinedConfig, seed: int, step: int
) -> npt.NDArray[np.int32]:
    """Return hard negatives of all examples on every rank, [n, H] int32 item rows, -1 where there are fewer.

    Each rank encodes a share of the catalogue and mines for a share of the examples.
    Collective: all ranks.

    Args:
        model: as trained so far, in evaluation mode.
        examples: the same on all ranks.
        world: this process's place.
        config: window, margin and number.
        seed: of the run.
        step: optimiser steps so far; another step draws other items of the window.

    Source: Xiong et al.: Approximate nearest neighbor negative contrastive learning (ICLR 2021); the margin
        relative to the positive is that of de Souza P. Moreira et al.: NV-Retriever (2024), section 3.
    """
    vectors = encode_catalogue(model, examples.inputs, world)
    begin, end = world.share(len(examples))
    mined = np.empty((end - begin, config.per_query), np.int32)
    for first in range(begin, end, _QUERIES_AT_ONCE):
        some = np.arange(first, min(first + _QUERIES_AT_ONCE, end))
        queries = model.encode_queries(to_device(examples.queries(some), world.device)).cpu().numpy()
        # Removing every known positive from the search is over-fetching by as many as each user has.
        ranked = rank_block(queries, vectors, *examples.known_positives(some), config.skip + config.window)
        ranked = ranked[:, config.skip :]
        positive = np.einsum("bd,bd->b", queries, vectors[examples.item_rows(some)])
        scores = np.einsum("bd,brd->br", queries, vectors[ranked])
        limit = positive - config.margin * np.abs(positive)
        allowed = (ranked >= 0) & (scores <= limit[:, None])
        keys = row_keys(seed, step, torch.from_numpy(some), _STREAM)
        mined[some - begin] = _draw(ranked, allowed, uniform(keys, ranked.shape[1]).numpy(), config.per_query)
    return gather_ragged(torch.from_numpy(mined).to(world.device), world).cpu().numpy()


def _draw(
    ranked: npt.NDArray[np.int64], allowed: npt.NDArray[np.bool_], ticket: npt.NDArray[np.float32], count: int
) -> npt.NDArray[np.int64]:
    """Return ``count`` of the allowed items of each row at random, [B, count], -1 behind the last."""
    order = np.argsort(np.where(allowed, ticket, 2.0), axis=1, kind="stable")[:, :count]
    drawn = np.where(np.take_along_axis(allowed, order, 1), np.take_along_axis(ranked, order, 1), -1)
    short = count - drawn.shape[1]
    return np.pad(drawn, ((0, 0), (0, short)), constant_values=-1) if short > 0 else drawn
