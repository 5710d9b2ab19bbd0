"""The host's part of a step: a share of a global batch made into what the towers and the loss read.

Nothing here asks other ranks or touches the device, so a thread can work ahead of a GPU.

Shapes: as in ``batches``; a rank's item rows are its b positives, its m drawn candidates and its own
negatives that are there, one after the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from twotower.config import Config
from twotower.model.batch import Bag, FeatureBatch, Sequences, forget, leave_out, part_of, pinned, to_device
from twotower.model.dropout import column_keys, row_keys, uniform
from twotower.schema import UNKNOWN_ROW, FeatureSchema, FittedFeature, HistoryFeature, ids_among
from twotower.training.batches import IntArray, Share
from twotower.training.collectives import World
from twotower.training.negatives import CandidateMemory, CandidateSampler

_UNKNOWN_STREAM = 1 << 20
_LEFT_OUT_STREAM = 1 << 21
# Streams of row keys: dropout masks of equal row numbers differ between these.
_QUERY, _POSITIVE, _DRAWN, _OWN, _WINDOW = range(5)


@dataclass(frozen=True)
class Side:
    """The rows that go through one tower."""

    features: FeatureBatch
    keys: torch.Tensor
    """[rows] int64, the seeds of dropout masks."""
    valid: torch.Tensor
    """[rows] bool, false at padding."""

    def part(self, rows: slice) -> Side:
        """Return some of the rows."""
        return Side(part_of(self.features, rows), self.keys[rows], self.valid[rows])

    def pinned(self) -> Side:
        """Return the rows in pinned memory."""
        return Side(pinned(self.features), self.keys.pin_memory(), self.valid.pin_memory())

    def to(self, device: torch.device) -> Side:
        """Return the rows on a device."""
        return Side(
            to_device(self.features, device),
            self.keys.to(device, non_blocking=True),
            self.valid.to(device, non_blocking=True),
        )

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Batch:
    """What a rank computes a step from, on the host."""

    share: Share
    queries: Side
    """[b]"""
    items: Side
    """[b + m + o]"""
    num_shared: int
    """b + m, the item rows that all ranks see."""
    candidate_rows: torch.Tensor
    """[W (b + m) + K] int64 item rows, -1 padding."""
    log_q: torch.Tensor
    """[W (b + m) + K] float32."""
    own_place: torch.Tensor
    """[o] int64, where each own negative belongs in a flat [b * H]."""
    own_log_q: torch.Tensor
    """[b, H] float32, infinite where there is none."""
    left_out: tuple[torch.Tensor, torch.Tensor] | None
    """Offsets [b + 1] and item rows: what the users have had of the candidates, and the own negatives."""

    def pinned(self) -> Batch:
        """Return the batch with its large part, the towers' rows, in pinned memory."""
        return replace(self, queries=self.queries.pinned(), items=self.items.pinned())


class Assembler:
    """Makes batches of shares."""

    def __init__(
        self, config: Config, world: World, sampler: CandidateSampler, memory: CandidateMemory
    ) -> None:
        """Keep what every batch needs."""
        self._seed = config.seed
        self._loss = config.train.loss
        self._negatives = config.train.negatives
        self._world = world
        self._sampler = sampler
        self._memory = memory
        self.mined: npt.NDArray[np.int32] | None = None
        """Hard negatives of each example, from ``mining.mine``."""

    def __call__(self, share: Share, step: int) -> Batch:
        """Return the batch of a share.

        Args:
            share: of a rank.
            step: optimiser steps before it.
        """
        world, b = self._world, len(share.rows)
        first = world.rank * b
        global_rows = torch.arange(first, first + b)
        drawn = self._drawn(step)
        m = drawn.shape[1]
        own = self._own(share)
        own_place = np.flatnonzero(own >= 0)

        rows = np.concatenate([share.item_rows[world.rank], drawn[world.rank], own.ravel()[own_place]])
        keys = [
            row_keys(self._seed, step, global_rows, _POSITIVE),
            row_keys(self._seed, step, torch.arange(world.rank * m, (world.rank + 1) * m), _DRAWN),
            row_keys(self._seed, step, torch.from_numpy(own_place) + first * own.shape[1], _OWN),
        ]
        examples = share.examples
        schema = examples.inputs.schema
        query_keys, item_keys = row_keys(self._seed, step, global_rows, _QUERY), torch.cat(keys)
        queries = _forgetful(schema.query, examples.queries(share.rows), query_keys)
        queries = self._keyed(queries, query_keys, step)
        queries = _with_items_left_out(schema, queries, query_keys)
        unchosen = None
        if schema.new_items_by_features:
            # As the index has them: what no example has is a negative by its features.
            unchosen = torch.from_numpy((rows >= 0) & self._sampler.unchosen[rows])
        inputs = examples.inputs.items(rows)
        items = _forgetful(schema.item, inputs, item_keys, unchosen, self._sampler.unchosen_row)

        in_use = self._memory_in_use(step)
        shared = np.concatenate([share.item_rows, drawn], axis=1).ravel()
        candidates = np.concatenate([shared, in_use])
        log_q = self._sampler.log_q(candidates, share.size, int((in_use >= 0).sum()))
        # An own negative is there for certain and needs no estimate: it counts ``own_weight``, and copies of
        # it that come by chance, which would count once more on average, are left out.
        own_log_q = np.where(own >= 0, -math.log(self._negatives.own_weight), np.inf).astype(np.float32)
        left_out = None
        if self._loss.mask_known_positives:
            left_out = examples.known_positives(share.rows, candidates)
        if own.shape[1]:
            left_out = _with_own(left_out, own)
        return Batch(
            share,
            Side(queries, query_keys, torch.from_numpy(share.rows >= 0)),
            Side(items, item_keys, torch.from_numpy(rows >= 0)),
            b + m,
            torch.from_numpy(candidates),
            torch.from_numpy(log_q * np.float32(self._loss.log_q)),
            torch.from_numpy(own_place),
            torch.from_numpy(own_log_q),
            None if left_out is None else (torch.from_numpy(left_out[0]), torch.from_numpy(left_out[1])),
        )

    def _keyed(self, batch: FeatureBatch, query_keys: torch.Tensor, step: int) -> FeatureBatch:
        """Return the queries with the seeds of the dropout masks of their sequences.

        Those of a window are the same wherever a part of its examples is, and those of a query's own sequence
        are the query's.
        """
        for name, value in batch.items():
            if isinstance(value, Sequences):
                if value.names is None:
                    keys = query_keys[value.read >= 0]
                else:
                    keys = row_keys(self._seed, step, torch.from_numpy(value.names), _WINDOW)
                batch[name] = value.keyed(keys)
        return batch

    def _drawn(self, step: int) -> IntArray:
        """Return the drawn candidates of all ranks, [W, m], padded with -1."""
        size = self._world.size
        if self._sampler.num_drawn == 0:
            return np.empty((size, 0), np.int64)
        drawn = self._sampler.draw(step)
        each = -(-len(drawn) // size)
        return np.concatenate([drawn, np.full(each * size - len(drawn), -1)]).reshape(size, each)

    def _own(self, share: Share) -> IntArray:
        """Return the own negatives of the share's queries, [b, H] different items, -1 where there is none."""
        own = np.empty((len(share.rows), 0), np.int64)
        if self._negatives.explicit:
            own = share.examples.explicit_negatives(share.rows, self._negatives.explicit)
        if self._negatives.mined.per_query:
            shape = (len(share.rows), self._negatives.mined.per_query)
            mined = np.full(shape, -1) if self.mined is None else self.mined[np.maximum(share.rows, 0)]
            # An explicit negative that is mined too is one negative.
            gone = (share.rows < 0)[:, None] | (mined[:, :, None] == own[:, None, :]).any(2)
            own = np.concatenate([own, np.where(gone, -1, mined)], axis=1)
        if self._negatives.unchosen == "new":
            own = np.where((own >= 0) & self._sampler.unchosen[own], -1, own)
        return own

    def _memory_in_use(self, step: int) -> IntArray:
        """Return the items of the memory, [K] with -1 where it is not filled, or [0] before it begins."""
        if step < self._negatives.memory_start:
            return np.empty(0, np.int64)
        return self._memory.item_rows.numpy().copy()


def _with_own(left_out: tuple[IntArray, IntArray] | None, own: IntArray) -> tuple[IntArray, IntArray]:
    """Return compressed rows of items, offsets [b + 1] and item rows, with own negatives [b, H] added."""
    query, place = np.nonzero(own >= 0)
    items, counts = own[query, place], np.bincount(query, minlength=len(own))
    if left_out is not None:
        lengths = np.diff(left_out[0])
        query = np.concatenate([np.repeat(np.arange(len(own)), lengths), query])
        items, counts = np.concatenate([left_out[1], items]), counts + lengths
    return np.concatenate([[0], np.cumsum(counts)]), items[np.argsort(query, kind="stable")]


def _forgetful(
    features: list[FittedFeature],
    batch: FeatureBatch,
    keys: torch.Tensor,
    unchosen: torch.Tensor | None = None,
    unchosen_row: int = UNKNOWN_ROW,
) -> FeatureBatch:
    """Replace a share of the ids of an id feature by the unknown id, and unchosen items by what they read.

    So the rows of both are trained as the others are.

    Args:
        features: of a side.
        batch: its input.
        keys: [rows] int64, of the rows.
        unchosen: [rows] bool, items without an example; none where not given.
        unchosen_row: of the table, that these read whatever the draw.
    """
    for spec in ids_among([f.spec for f in features]):
        if spec.unknown_rate > 0:
            value = batch[spec.name]
            assert isinstance(value, Bag)
            value = forget(value, uniform(keys, 1, _UNKNOWN_STREAM)[:, 0] < spec.unknown_rate)
            batch[spec.name] = value if unchosen is None else forget(value, unchosen, unchosen_row)
    return batch


def _with_items_left_out(schema: FeatureSchema, batch: FeatureBatch, keys: torch.Tensor) -> FeatureBatch:
    """Leave a share of the items out of the histories, each feature's by draws of its own."""
    table = schema.item_id
    hashes = table.hashes if table is not None and table.buckets is not None else 1
    for number, feature in enumerate(schema.query):
        spec = feature.spec
        if not isinstance(spec, HistoryFeature) or spec.left_out == 0:
            continue
        value, stream = batch[spec.name], _LEFT_OUT_STREAM + number
        if isinstance(value, Sequences):
            assert value.keys is not None
            item_keys = column_keys(value.keys, value.position).flatten()
            left_out = uniform(item_keys, 1, stream) < spec.left_out
            batch[spec.name] = replace(value, items=leave_out(value.items, left_out, pooled=False))
        else:
            assert isinstance(value, Bag)
            rows_of_item = hashes if spec.share else 1
            items = value.ids.shape[1] // rows_of_item
            left_out = uniform(keys, items, stream) < spec.left_out
            batch[spec.name] = leave_out(value, left_out, pooled=True)
    return batch
